"""Settings: arguments win over the environment, and every wrong value is named together with what to do."""

import math
from pathlib import Path
from typing import Any

import pytest

from everstep.config import (
    LIGHTHOUSE_PORT,
    LighthouseSettings,
    ManagerSettings,
    job_token,
    lighthouse_url,
    manager_settings,
)
from everstep.errors import ConfigError

ENV = {
    "EVERSTEP_LIGHTHOUSE": "lh.example:1234",
    "EVERSTEP_JOB_ID": "from-env",
    "EVERSTEP_TOKEN": "token of the environment",
    "EVERSTEP_TLS_CA": "/etc/ca.pem",
    "REPLICA_GROUP_ID": "3",
    "NUM_REPLICA_GROUPS": "5",
}


def token_file(folder: Path, content: bytes = b"token of a file\n", mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_the_environment_fills_in_what_no_argument_says() -> None:
    settings = manager_settings(environ=ENV)
    assert settings == ManagerSettings(
        lighthouse="http://lh.example:1234",
        job_id="from-env",
        token=b"token of the environment",
        tls_ca=Path("/etc/ca.pem"),
        replica_group_id="3",
        replica_groups=5,
    )


def test_every_argument_wins_over_the_environment(tmp_path: Path) -> None:
    settings = manager_settings(
        lighthouse="https://other/prefix/",
        job_id="mine",
        token_file=token_file(tmp_path),
        tls_ca="ca.pem",
        replica_group_id=7,
        replica_groups=9,
        min_replicas=4,
        environ=ENV,
    )
    assert settings == ManagerSettings(
        lighthouse="https://other/prefix",
        job_id="mine",
        token=b"token of a file",
        tls_ca=Path("ca.pem"),
        replica_group_id="7",
        replica_groups=9,
        min_replicas=4,
    )


def test_without_a_lighthouse_a_script_trains_alone_and_needs_no_name() -> None:
    settings = manager_settings(environ={"EVERSTEP_LIGHTHOUSE": "", "NUM_REPLICA_GROUPS": ""})
    assert settings.lighthouse is None
    assert (settings.job_id, settings.replica_group_id, settings.replica_groups) == ("default", "0", 0)
    assert settings.token is None


def test_the_token_is_never_shown(tmp_path: Path) -> None:
    settings = manager_settings(environ=ENV)
    assert "token of" not in repr(settings)
    assert "secret" not in repr(LighthouseSettings(token=b"a secret token"))
    with pytest.raises(ConfigError) as caught:
        manager_settings(environ={**ENV, "EVERSTEP_TOKEN": "secret"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"EVERSTEP_LIGHTHOUSE": "ftp://x:1"}, "EVERSTEP_LIGHTHOUSE='ftp://x:1'"),
        ({"EVERSTEP_LIGHTHOUSE": "host:port"}, "EVERSTEP_LIGHTHOUSE='host:port'"),
        ({"EVERSTEP_LIGHTHOUSE": "host:99999"}, "EVERSTEP_LIGHTHOUSE='host:99999'"),
        ({"EVERSTEP_LIGHTHOUSE": ":29520"}, "no host"),
        ({"EVERSTEP_LIGHTHOUSE": "a b:1"}, "blanks"),
        ({"EVERSTEP_LIGHTHOUSE": "http://user:pass@host:1"}, "no user"),
        ({"REPLICA_GROUP_ID": ""}, "set REPLICA_GROUP_ID"),
        ({"REPLICA_GROUP_ID": "x" * 129}, "REPLICA_GROUP_ID"),
        ({"REPLICA_GROUP_ID": "a\tb"}, "printable"),
        ({"NUM_REPLICA_GROUPS": "three"}, "NUM_REPLICA_GROUPS='three'"),
        ({"NUM_REPLICA_GROUPS": "-1"}, "NUM_REPLICA_GROUPS='-1'"),
        ({"NUM_REPLICA_GROUPS": "9" * 5000}, "NUM_REPLICA_GROUPS"),
        ({"EVERSTEP_JOB_ID": "two\nlines"}, "EVERSTEP_JOB_ID"),
        ({"EVERSTEP_TOKEN": "short"}, "EVERSTEP_TOKEN has 5 bytes"),
        ({"EVERSTEP_TOKEN_FILE": "/nonexistent/token"}, "/nonexistent/token cannot be read"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        manager_settings(environ={**ENV, **changes})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"min_replicas": 6}, "min_replicas=6 is above the number of replica groups, 5"),
        ({"min_replicas": 0}, "min_replicas=0"),
        ({"min_replicas": True}, "min_replicas=True"),
        ({"connect_timeout_s": math.nan}, "connect_timeout_s=nan is no duration"),
        ({"connect_timeout_s": -1.0}, "connect_timeout_s=-1.0"),
        ({"connect_timeout_s": "5"}, "connect_timeout_s='5'"),
        ({"lighthouse": "host:0"}, "lighthouse='host:0'"),
        ({"lighthouse": ""}, "lighthouse=''"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        manager_settings(environ=ENV, **arguments)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"port": 65536}, "port=65536"),
        ({"port": -1}, "port=-1"),
        ({"join_timeout_s": math.inf}, "join_timeout_s=inf"),
        ({"heartbeat_timeout_s": 0}, "heartbeat_timeout_s=0"),
        ({"min_replicas": 0}, "min_replicas=0"),
        ({"bind": "0.0.0.0"}, "bind=0.0.0.0 opens the lighthouse to the network"),
        ({"bind": "::"}, "bind=::"),
        ({"bind": "node7"}, "bind=node7"),
        ({"bind": ""}, "bind is empty"),
        ({"tls_cert": Path("c")}, "belong together"),
        ({"jobs": ("",)}, "jobs"),
        ({"token": b"short"}, "token has 5 bytes"),
    ],
)
def test_a_wrong_setting_of_a_lighthouse_is_named_with_its_value(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LighthouseSettings(**arguments)
    assert named in str(caught.value)


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(bind: str) -> None:
    assert LighthouseSettings(bind=bind).token is None


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("host:1", "http://host:1"),
        ("host", f"http://host:{LIGHTHOUSE_PORT}"),
        (" 10.0.0.1:29520 ", "http://10.0.0.1:29520"),
        ("[::1]:1", "http://[::1]:1"),
        ("https://host", "https://host"),
        ("http://host:1/a/b/", "http://host:1/a/b"),
    ],
)
def test_an_address_becomes_a_base_url(address: str, url: str) -> None:
    assert lighthouse_url(address) == url


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_token_file_that_others_can_read_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, mode=mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}, so others can read it: chmod 600"):
        job_token(token_file=path, environ={})


def test_a_token_comes_from_the_argument_then_the_file_then_the_variable(tmp_path: Path) -> None:
    path = str(token_file(tmp_path))
    both = {"EVERSTEP_TOKEN_FILE": path, "EVERSTEP_TOKEN": "token of a variable"}
    assert job_token(b"an argument", path, both) == b"an argument"
    assert job_token(None, None, both) == b"token of a file"
    assert job_token(None, None, {"EVERSTEP_TOKEN": "token of a variable\n"}) == b"token of a variable"
    assert job_token(None, None, {}) is None


@pytest.mark.parametrize("content", [b"", b"  \n", b"short\n", b"x" * 5000])
def test_a_token_file_with_no_token_in_it_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"token file .* bytes; a job token has 8 to 4096"):
        job_token(token_file=token_file(tmp_path, content), environ={})
