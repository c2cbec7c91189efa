"""What `--rdzv-endpoint`, `--rdzv-id` and `--rdzv-conf` of torchrun say, checked.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everstep.config import (
    NodeEnvironment,
    check_job_id,
    job_token,
    lighthouse_url,
    node_environment,
)
from everstep.core.node_messages import NodeSpec
from everstep.core.ranks import RankPolicy
from everstep.core.rendezvous_nodes import DURATION_MAX_S
from everstep.errors import ConfigError
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget

DURATIONS = {"join_timeout": 600.0, "last_call_timeout": 5.0, "close_timeout": 30.0, "connect_timeout": 60.0}
OTHERS = ("timeout", "ranks", "node_id", "group", "topology", "topology_size", "token_file", "tls_ca")
TORCHRUN_TIMEOUT_S = 900  # torch puts it into every configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchrunSettings:
    """All that a handler needs. `shares_store`: the workers meet in the store that rank 0's agent hosts."""

    target: LinkTarget
    group: str
    spec: NodeSpec
    close_timeout_s: float
    shares_store: bool


def torchrun_settings(
    *,
    endpoint: str,
    run_id: str,
    nodes: tuple[int, int],
    conf: Mapping[str, Any],
    node_id: str,
    nonce: str,
    environ: Mapping[str, str] | None = None,
) -> TorchrunSettings:
    """Raises ConfigError, with the nearest name for a key that is not known."""
    for key in conf:
        _check_key(key)
    check_job_id("--rdzv-id", run_id)
    environment = node_environment(environ)
    durations = {key: _duration(conf, key, default) for key, default in DURATIONS.items()}
    if "join_timeout" not in conf and conf.get("timeout", TORCHRUN_TIMEOUT_S) != TORCHRUN_TIMEOUT_S:
        durations["join_timeout"] = _duration(conf, "timeout", 0.0)
    token_file, tls_ca = conf.get("token_file"), conf.get("tls_ca") or environment.tls_ca
    credentials = Credentials(job_id=run_id, role="node", token=job_token(None, token_file, environ))
    target = LinkTarget(
        url=lighthouse_url(endpoint, "--rdzv-endpoint"),
        credentials=credentials,
        connect_timeout_s=durations["connect_timeout"],
        tls_ca=Path(tls_ca) if tls_ca else None,
        named_by="--rdzv-endpoint",
    )
    ranks = _ranks(conf, environment, nodes[1])
    spec = NodeSpec(
        node_id=str(conf.get("node_id") or node_id),
        nonce=nonce,
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        join_timeout_s=durations["join_timeout"],
        last_call_s=durations["last_call_timeout"],
        ranks=ranks,
        infrastructure_rank=environment.number if ranks is RankPolicy.INFRASTRUCTURE else None,
        domain=str(conf.get("topology", "")),
        domain_size=_count(conf, "topology_size"),
    )
    return TorchrunSettings(
        target=target,
        group=str(conf.get("group", "")),
        spec=spec,
        close_timeout_s=durations["close_timeout"],
        shares_store=environment.shares_store,
    )


def _check_key(key: str) -> None:
    known = (*DURATIONS, *OTHERS)
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        raise ConfigError(f"--rdzv-conf {key} is unknown; {hint}")


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


def _ranks(conf: Mapping[str, Any], environment: NodeEnvironment, nodes_max: int) -> RankPolicy:
    if "ranks" not in conf:
        has_no_spares = environment.slurm_tasks is None or environment.slurm_tasks <= nodes_max
        is_slurm = environment.slurm_number is not None and environment.slurm_number < nodes_max
        return RankPolicy.INFRASTRUCTURE if is_slurm and has_no_spares else RankPolicy.PREVIOUS
    name = str(conf["ranks"])
    try:
        policy = RankPolicy(name)
    except ValueError:
        known = ", ".join(policy.value for policy in RankPolicy)
        raise ConfigError(f"--rdzv-conf ranks={name!r} is unknown; use one of {known}") from None
    if policy is RankPolicy.INFRASTRUCTURE and environment.number is None:
        raise ConfigError(
            "--rdzv-conf ranks=infrastructure needs the node's number in SLURM_PROCID or GROUP_RANK; neither is set"
        )
    if policy is RankPolicy.INFRASTRUCTURE and (environment.slurm_tasks or 0) > nodes_max:
        raise ConfigError(
            f"--rdzv-conf ranks=infrastructure refuses spares: Slurm started {environment.slurm_tasks} nodes, at most "
            f"{nodes_max} take part (--nnodes), so a spare's number could never be its rank; use ranks=previous"
        )
    return policy
