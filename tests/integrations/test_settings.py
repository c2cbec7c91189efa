"""What --rdzv-endpoint, --rdzv-id and --rdzv-conf may say, and what is answered to the rest."""

from pathlib import Path
from typing import Any

import pytest

from everstep.core.ranks import RankPolicy
from everstep.errors import ConfigError
from everstep.integrations.node_settings import TorchrunSettings, torchrun_settings

TORCHRUN = {"timeout": 900}  # what torchrun puts in by itself


def settings(
    conf: dict[str, Any] | None = None,
    *,
    environ: dict[str, str] | None = None,
    nodes: tuple[int, int] = (1, 4),
    endpoint: str = "10.0.0.1:29520",
) -> TorchrunSettings:
    return torchrun_settings(
        endpoint=endpoint,
        run_id="job",
        nodes=nodes,
        conf={**TORCHRUN, **(conf or {})},
        node_id="host_1_0",
        nonce="n",
        environ=environ or {},
    )


def test_defaults() -> None:
    found = settings()
    assert (found.target.url, found.target.credentials.job_id) == ("http://10.0.0.1:29520", "job")
    assert found.target.credentials.role == "node"
    assert (found.spec.min_nodes, found.spec.max_nodes, found.spec.node_id) == (1, 4, "host_1_0")
    assert (found.spec.join_timeout_s, found.spec.last_call_s, found.close_timeout_s) == (600.0, 5.0, 30.0)
    assert found.spec.ranks is RankPolicy.PREVIOUS
    assert found.shares_store


def test_durations_are_floats() -> None:
    found = settings({"join_timeout": "1.5", "last_call_timeout": "0.25", "close_timeout": 2})
    assert (found.spec.join_timeout_s, found.spec.last_call_s, found.close_timeout_s) == (1.5, 0.25, 2.0)
    assert settings({"last_call_timeout": "0"}).spec.last_call_s == 0.0


def test_timeout_is_the_join_timeout_where_that_is_not_given() -> None:
    assert settings({"timeout": 60}).spec.join_timeout_s == 60.0
    assert settings({"timeout": 60, "join_timeout": "5"}).spec.join_timeout_s == 5.0


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("join_timeot", "join_timeout"),
        ("last_call", "last_call_timeout"),
        ("close_time", "close_timeout"),
        ("rank", "ranks"),
        ("nodeid", "node_id"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_name(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is unknown; did you mean {nearest}"):
        settings({key: "1"})


def test_a_key_that_resembles_none_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match="zzz is unknown; known: join_timeout, "):
        settings({"zzz": "1"})


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "inf", "0", "1e12", None])
def test_a_duration_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="join_timeout"):
        settings({"join_timeout": value})


@pytest.mark.parametrize("endpoint", ["", "host:port", "ftp://host", "host:0"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--rdzv-endpoint"):
        settings(endpoint=endpoint)


def test_slurm_numbers_are_the_ranks_when_there_are_no_spares() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    found = settings(environ=slurm)
    assert (found.spec.ranks, found.spec.infrastructure_rank) == (RankPolicy.INFRASTRUCTURE, 3)
    assert settings(environ={**slurm, "SLURM_NTASKS": "5"}).spec.ranks is RankPolicy.PREVIOUS
    assert settings({"ranks": "previous"}, environ=slurm).spec.infrastructure_rank is None


def test_infrastructure_ranks_refuse_spares_and_say_why() -> None:
    with pytest.raises(ConfigError, match="refuses spares: Slurm started 5 nodes, at most 4 take part"):
        settings({"ranks": "infrastructure"}, environ={"SLURM_PROCID": "3", "SLURM_NTASKS": "5"})


def test_group_rank_stands_in_for_slurm_when_it_is_asked_for() -> None:
    assert settings(environ={"GROUP_RANK": "2"}).spec.ranks is RankPolicy.PREVIOUS
    found = settings({"ranks": "infrastructure"}, environ={"GROUP_RANK": "2"})
    assert found.spec.infrastructure_rank == 2
    with pytest.raises(ConfigError, match="SLURM_PROCID or GROUP_RANK"):
        settings({"ranks": "infrastructure"})


def test_topology_and_names() -> None:
    found = settings({"ranks": "topology", "topology": "rack7", "topology_size": "8", "node_id": "n7", "group": "g0"})
    assert (found.spec.ranks, found.spec.domain, found.spec.domain_size) == (RankPolicy.TOPOLOGY, "rack7", 8)
    assert (found.spec.node_id, found.group) == ("n7", "g0")
    with pytest.raises(ConfigError, match="previous, infrastructure, topology"):
        settings({"ranks": "random"})
    with pytest.raises(ConfigError, match="topology_size"):
        settings({"topology_size": "many"})


def test_the_token_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a very secret token\n")
    token.chmod(0o600)
    found = settings({"token_file": str(token)})
    assert found.target.credentials.token == b"a very secret token"
    assert "secret" not in repr(found)


def test_torchs_switch_for_the_agents_store_is_kept() -> None:
    assert not settings(environ={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}).shares_store
