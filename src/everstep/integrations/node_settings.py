"""What `--rdzv-endpoint`, `--rdzv-id` and `--rdzv-conf` of torchrun say, for its handler."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from everstep.config import check_job_id, job_token, lighthouse_url, node_environment
from everstep.core.node_messages import NodeSpec
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.rendezvous_conf import NodeNumber, rank_policy, rendezvous_conf


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
    said = rendezvous_conf(conf)
    check_job_id("--rdzv-id", run_id)
    environment = node_environment(environ)
    credentials = Credentials(job_id=run_id, role="node", token=job_token(None, said.token_file, environ))
    target = LinkTarget(
        url=lighthouse_url(endpoint, "--rdzv-endpoint"),
        credentials=credentials,
        connect_timeout_s=said.connect_timeout_s,
        tls_ca=said.tls_ca or environment.tls_ca,
        named_by="--rdzv-endpoint",
    )
    number = NodeNumber(
        number=environment.number,
        tasks=environment.slurm_tasks,
        is_default=environment.slurm_number is not None,
    )
    ranks, infrastructure_rank = rank_policy(str(conf["ranks"]) if "ranks" in conf else None, number, nodes[1])
    spec = NodeSpec(
        node_id=said.node_id or node_id,
        nonce=nonce,
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        join_timeout_s=said.join_timeout_s,
        last_call_s=said.last_call_s,
        ranks=ranks,
        infrastructure_rank=infrastructure_rank,
        domain=said.domain,
        domain_size=said.domain_size,
    )
    return TorchrunSettings(
        target=target,
        group=said.group,
        spec=spec,
        close_timeout_s=said.close_timeout_s,
        shares_store=environment.shares_store,
    )
