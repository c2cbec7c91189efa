"""`everstep lighthouse` as operators run it: a real process."""

import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import msgspec
import pytest

from everstep import __version__
from everstep.core.messages import Refused, Switch
from everstep.core.recovery_report import RecoveryReport
from everstep.core.types import QuorumId, RefusalCode
from everstep.exit_codes import ExitCode
from tests.link.parties import TOKEN, Member, Party
from tests.support import proc
from tests.support.processes import Spawner
from tests.support.waiting import wait_until

EMBEDDED = """
import os, sys
from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
    child = os.fork()
    if child == 0:
        os.write(1, f"forked {os.getpid()} {lighthouse.address}\\n".encode())
        sys.stdin.readline()
        os._exit(0)
    os.waitpid(child, 0)
"""
NO_TORCH = "import sys; from everstep.lighthouse import app; from everstep import cli; print('torch' in sys.modules)"
CLEAN = dict.fromkeys(("EVERSTEP_TOKEN", "EVERSTEP_TOKEN_FILE", "EVERSTEP_LIGHTHOUSE"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_serves_and_ends_cleanly(spawn: Spawner, tmp_path: Path, number: int) -> None:
    token_file = tmp_path / "token"
    token_file.write_bytes(TOKEN + b"\n")
    token_file.chmod(0o600)
    files = ["--state-dir", str(tmp_path / "state"), "--token-file", str(token_file)]
    process = spawn(["-m", "everstep.cli", "lighthouse", "--port", "0", *files], env=CLEAN)
    address = process.expect_line("listening on").rpartition(" ")[2]
    with urllib.request.urlopen(f"http://{address}/healthz", timeout=10.0) as response:
        assert response.read() == b"ok\n"
    with Party(f"http://{address}", token=TOKEN) as party:
        party.events.expect("open")
        process.kill(number)
        party.events.expect("close")
        assert process.wait() == 0
    assert TOKEN.decode() not in process.output()
    assert "Traceback" not in process.output()


def test_a_taken_port_is_one_line_and_exit_90(spawn: Spawner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn(["-m", "everstep.cli", "lighthouse", "--port", str(port)], env=CLEAN)
        assert process.wait() == ExitCode.CONFIGURATION
    lines = process.stderr_path.read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"everstep: port {port} of 127.0.0.1 is in use")


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--heartbeat-timeout", "nan"], "heartbeat_timeout_s=nan"),
        (["--bind", "0.0.0.0"], "no job token"),
        (["--min-replicas", "0"], "min_replicas=0"),
        (["--token-file", "/nonexistent"], "token file /nonexistent cannot be read"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_90(spawn: Spawner, arguments: list[str], wrong: str) -> None:
    process = spawn(["-m", "everstep.cli", "lighthouse", "--port", "0", *arguments], env=CLEAN)
    assert process.wait() == ExitCode.CONFIGURATION
    lines = process.stderr_path.read_text().splitlines()
    assert len(lines) == 1
    assert wrong in lines[0]


def test_the_version_is_printed(spawn: Spawner) -> None:
    process = spawn(["-m", "everstep.cli", "--version"])
    assert process.read_line() == f"everstep {__version__}"
    assert process.wait() == 0


def test_neither_the_command_nor_the_lighthouse_imports_torch(spawn: Spawner) -> None:
    process = spawn(["-c", NO_TORCH])
    assert process.read_line() == "False"
    assert process.wait() == 0


def test_a_forked_child_does_not_keep_a_dead_lighthouses_port_and_links(spawn: Spawner) -> None:
    process = spawn(["-c", EMBEDDED])
    _, child, address = process.expect_line("forked").split()
    host, port = address.split(":")
    with Party(f"http://{address}") as party:
        party.events.expect("open")
        process.kill()
        party.events.expect("close")
        process.wait()
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port)), timeout=10.0):
            pass
    os.kill(int(child), signal.SIGKILL)
    wait_until(lambda: not proc.of_session(process.pid), what="the child has ended")


def test_events_and_drain_show_and_ask_what_a_job_does(spawn: Spawner) -> None:
    server = spawn(["-m", "everstep.cli", "lighthouse", "--port", "0", "--log-format", "json"], env=CLEAN)
    address = server.expect_line("listening on").rpartition(" ")[2]
    where = ["--lighthouse", address, "--job", "job"]
    with Member(f"http://{address}", "a", expected_replicas=2) as a:
        a.events.expect("message")
        reader = spawn(["-m", "everstep.cli", "events", "--follow", *where], env=CLEAN)
        assert reader.expect_line("member-waiting").endswith("group a (incarnation 1)")
        with Member(f"http://{address}", "b", expected_replicas=2) as b:
            assert "2 members: a#1, b#2" in reader.expect_line("job-founded")
            b.events.expect("message", lambda seen: isinstance(seen.value, Switch))
            with b.lock:
                report = RecoveryReport(quorum_id=QuorumId(1, 1), step=0, donors=("a#1",), total_bytes=2_000_000_000)
                report = msgspec.structs.replace(report, done_bytes=512_000_000, bytes_per_s=430_000_000, retries=1)
                b.driver.run(lambda now: b.replica.show_recovery(report, now))
            assert "step 0  from a#1  512.00 of 2000.00 MB" in reader.expect_line("recovery-started")
            assert reader.expect_line("recovery-retried").endswith("retries 1")
            showing = spawn(["-m", "everstep.cli", "status", *where], env=CLEAN | {"COLUMNS": "160"})
            assert showing.expect_line("quorum 1.1, 0 failures")
            assert "starting (512 of 2000 MB, 430 MB/s, from a#1, retries 1)" in showing.expect_line("b ")
            assert showing.expect_line("seconds of each group")
            assert showing.wait() == 0
            asking = spawn(["-m", "everstep.cli", "drain", "b", *where], env=CLEAN)
            assert asking.expect_line("group b leaves at a step boundary")
            assert reader.expect_line("drain-asked").endswith("quorum 1.1")
            reader.kill(signal.SIGINT)
            assert reader.wait() == 0
            unknown = spawn(["-m", "everstep.cli", "drain", "c", *where], env=CLEAN)
            assert unknown.wait() == ExitCode.CONFIGURATION
            assert "no group 'c' in the quorum of job 'job'; its groups: a, b" in unknown.stderr_path.read_text()
    server.kill(signal.SIGTERM)
    assert server.wait() == 0
    lines = [json.loads(line) for line in server.stderr_path.read_text().splitlines()]
    assert {"event": "drain asked", "job_id": "job", "member": "b#2"}.items() <= lines_of(lines, "drain asked").items()


def test_new_history_ends_the_groups_that_hold_state_and_those_started_next_begin_anew(spawn: Spawner) -> None:
    server = spawn(["-m", "everstep.cli", "lighthouse", "--port", "0"], env=CLEAN, until_teardown=True)
    address = server.expect_line("listening on").rpartition(" ")[2]
    where = ["--lighthouse", address, "--job", "job"]
    unknown = spawn(["-m", "everstep.cli", "new-history", *where], env=CLEAN)
    assert unknown.wait() == ExitCode.CONFIGURATION
    assert "no job 'job' here" in unknown.stderr_path.read_text()
    with Member(f"http://{address}", "a") as a:
        first = a.events.expect("message", lambda seen: isinstance(seen.value, Switch)).value.founding
        asking = spawn(["-m", "everstep.cli", "new-history", *where], env=CLEAN)
        assert "the state is given up" in asking.read_line()
        refused = a.events.expect("message", lambda seen: isinstance(seen.value, Refused)).value
        assert refused.code is RefusalCode.JOB_ENDED
        assert "start it again, from its checkpoint" in refused.detail
        assert asking.wait() == 0
    with Member(f"http://{address}", "a") as again:
        second = again.events.expect("message", lambda seen: isinstance(seen.value, Switch)).value.founding
    assert second.history != first.history


def lines_of(lines: list[dict[str, object]], event: str) -> dict[str, object]:
    return next(line for line in lines if line.get("event") == event)
