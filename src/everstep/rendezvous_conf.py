"""What `--rdzv-conf` says, checked: for torchrun's handler and for `everstep run` alike.

| key of --rdzv-conf | default | meaning |
|---|---|---|
| join_timeout | 600 | seconds for min nodes to come together; then all who came fail |
| last_call_timeout | 5 | seconds to wait for more once there are min nodes |
| close_timeout | 30 | seconds for the lighthouse to confirm that the rendezvous is closed |
| connect_timeout | 60 | seconds for the lighthouse to answer for the first time |
| timeout | | torchrun's own; join_timeout where that is not given and this is not torchrun's default, 900 |
| ranks | see docs/rendezvous.md | previous, infrastructure or topology |
| node_id | host_pid_n | this node's name: it orders the ranks, naturally, and must be its own |
| group | empty | several rendezvous in one job: one for each replica group, say |
| topology | empty | this node's domain, for ranks=topology |
| topology_size | 0 | nodes that make a domain whole; 0: as many as the largest has |
| token_file | EVERSTEP_TOKEN_FILE | file of the job token |
| tls_ca | EVERSTEP_TLS_CA | PEM file of authorities for an https endpoint |
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from everstep.core.ranks import RankPolicy
from everstep.core.rendezvous_nodes import DURATION_MAX_S
from everstep.errors import ConfigError

DURATIONS = {"join_timeout": 600.0, "last_call_timeout": 5.0, "close_timeout": 30.0, "connect_timeout": 60.0}
OTHERS = ("timeout", "ranks", "node_id", "group", "topology", "topology_size", "token_file", "tls_ca")
TORCHRUN_TIMEOUT_S = 900  # torch puts it into every configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class RendezvousConf:
    """All keys but `ranks`. None: not given. Durations in seconds."""

    join_timeout_s: float
    last_call_s: float
    close_timeout_s: float
    connect_timeout_s: float
    node_id: str | None
    group: str
    domain: str
    domain_size: int
    token_file: str | None
    tls_ca: Path | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeNumber:
    """What the scheduler says of this node. `variables` names, for an error, where it would say it."""

    number: int | None = None
    tasks: int | None = None  # nodes that it started in all, spares too
    is_default: bool = False  # ranks are the scheduler's numbers where nobody asks for another policy
    variables: str = "SLURM_PROCID or GROUP_RANK"


def rendezvous_conf(conf: Mapping[str, Any], *, also_known: Collection[str] = ()) -> RendezvousConf:
    """Raises ConfigError, with the nearest name for a key that is in neither table nor `also_known`."""
    for key in conf:
        if key not in also_known:
            check_key("--rdzv-conf ", key, (*DURATIONS, *OTHERS))
    durations = {key: _duration(conf, key, default) for key, default in DURATIONS.items()}
    if "join_timeout" not in conf and str(conf.get("timeout", TORCHRUN_TIMEOUT_S)) != str(TORCHRUN_TIMEOUT_S):
        durations["join_timeout"] = _duration(conf, "timeout", 0.0)
    tls_ca, token_file, node_id = conf.get("tls_ca"), conf.get("token_file"), conf.get("node_id")
    return RendezvousConf(
        join_timeout_s=durations["join_timeout"],
        last_call_s=durations["last_call_timeout"],
        close_timeout_s=durations["close_timeout"],
        connect_timeout_s=durations["connect_timeout"],
        node_id=str(node_id) if node_id else None,
        group=str(conf.get("group", "")),
        domain=str(conf.get("topology", "")),
        domain_size=_count(conf, "topology_size"),
        token_file=str(token_file) if token_file else None,
        tls_ca=Path(str(tls_ca)) if tls_ca else None,
    )


def rank_policy(
    name: str | None, node: NodeNumber, nodes_max: int, option: str = "--rdzv-conf ranks"
) -> tuple[RankPolicy, int | None]:
    """The policy called `name`, or the default, and the number that INFRASTRUCTURE takes for the rank."""
    policy = _policy(name, node, nodes_max, option)
    return policy, node.number if policy is RankPolicy.INFRASTRUCTURE else None


def _policy(name: str | None, node: NodeNumber, nodes_max: int, option: str) -> RankPolicy:
    if name is None:
        has_no_spares = node.tasks is None or node.tasks <= nodes_max
        is_numbered = node.is_default and node.number is not None and node.number < nodes_max
        return RankPolicy.INFRASTRUCTURE if is_numbered and has_no_spares else RankPolicy.PREVIOUS
    try:
        policy = RankPolicy(name)
    except ValueError:
        known = ", ".join(policy.value for policy in RankPolicy)
        raise ConfigError(f"{option}={name!r} is unknown; use one of {known}") from None
    if policy is RankPolicy.INFRASTRUCTURE and node.number is None:
        raise ConfigError(f"{option}=infrastructure needs the node's number in {node.variables}; neither is set")
    if policy is RankPolicy.INFRASTRUCTURE and (node.tasks or 0) > nodes_max:
        raise ConfigError(
            f"{option}=infrastructure refuses spares: Slurm started {node.tasks} nodes, at most "
            f"{nodes_max} take part (--nnodes), so a spare's number could never be its rank; use ranks=previous"
        )
    return policy


def check_key(prefix: str, key: str, known: Collection[str]) -> None:
    """Raises ConfigError with the nearest of `known`, or with all of it."""
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        raise ConfigError(f"{prefix}{key} is unknown; {hint}")


def _duration(conf: Mapping[str, Any], key: str, default: float) -> float:
    value = conf.get(key, default)
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds <= DURATION_MAX_S or (seconds == 0 and key != "last_call_timeout"):
        raise ConfigError(f"--rdzv-conf {key}={value!r} is no duration: give seconds, up to {DURATION_MAX_S:g}")
    return seconds


def _count(conf: Mapping[str, Any], key: str) -> int:
    text = str(conf.get(key, "0"))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ConfigError(f"--rdzv-conf {key}={text!r} must be a whole number")
    return int(text)
