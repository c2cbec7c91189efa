"""All that an agent needs to know, resolved and checked: nothing in here is a wish any more.

Made by `job_settings.job_settings` from the command line, the environment and a configuration file.
"""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path

from everstep.core.policies import RestartPolicyName
from everstep.core.ranks import RankPolicy
from everstep.launcher.starting import RunAs
from everstep.monitor.settings import MonitorSettings

__all__ = ["JobSettings", "RankPolicy", "RestartPolicyName", "RunAs", "Streams"]


class Streams(enum.IntFlag):
    """Which of a worker's streams; the numbers are torchrun's (`--redirects 3`)."""

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What to run, on how many nodes, where they meet, and what follows a failure. Durations in seconds."""

    run_as: RunAs
    target: str
    args: tuple[str, ...] = ()
    python: str  # the interpreter of plain workers: PYTHON_EXEC, as under torchrun, else this one; run with -u
    environment: Mapping[str, str] = dataclasses.field(
        repr=False
    )  # of the agent, and a token file's name: workers inherit it
    use_template: bool = True  # False too where `python` is another interpreter, or `run_as` is COMMAND
    preload: tuple[str, ...] = ()  # modules that the template imports after torch

    min_nodes: int = 1  # of one replica group, or of the world where there are none
    max_nodes: int = 1
    nproc_per_node: int = 1  # workers on this node of one replica group, or of the world
    replica_groups: tuple[str, ...] = ()  # ids of those that this node runs a part of; (): a plain world, as torchrun's
    replica_groups_total: int = 0  # how many the first step waits for, NUM_REPLICA_GROUPS; 0: not known
    devices: tuple[tuple[str, ...], ...] = ()  # for each of `replica_groups` its CUDA_VISIBLE_DEVICES; (): not split
    virtual_local_rank: bool = False  # LOCAL_RANK is 0 for every worker, and it sees its own device only

    restart_policy: RestartPolicyName = RestartPolicyName.ANY_FAILED
    max_restarts: int = 0
    rank_assignment: RankPolicy = RankPolicy.PREVIOUS
    infrastructure_rank: int | None = None  # this node's number, for RankPolicy.INFRASTRUCTURE
    domain: str = ""  # for RankPolicy.TOPOLOGY
    domain_size: int = 0  # nodes that make a domain whole; 0: as many as the largest has

    job_id: str = "default"  # --rdzv-id: the job at the lighthouse, and TORCHELASTIC_RUN_ID
    role: str = "default"
    rendezvous_group: str = (
        ""  # where there are no replica groups: several rendezvous in one job (`group` of rdzv-conf)
    )
    lighthouse: str | None = None  # base URL to connect to; None: the embedded one, wherever it listens
    hosts_lighthouse: bool = False  # this node runs one inside its agent, at `lighthouse_bind`:`lighthouse_port`
    hosts_only_if_free: bool = False  # … unless another process has that port already: then connect to `lighthouse`
    lighthouse_bind: str = "127.0.0.1"
    lighthouse_port: int = 0  # 0: any free one
    token: bytes | None = dataclasses.field(default=None, repr=False)
    tls_ca: Path | None = None
    connect_timeout_s: float = 60.0  # for the lighthouse to answer for the first time
    close_timeout_s: float = 30.0

    node_id: str
    machine: str = ""  # what is excluded where a script asks for it; "": the node_id
    local_addr: str | None = None  # where the other nodes reach this one; None: the address of its lighthouse link
    join_timeout_s: float = 600.0
    last_call_s: float = 5.0

    log_dir: Path | None = None  # None: a temporary one, where one is needed
    redirects: tuple[Streams, ...] = ()  # of each local rank; always nproc_per_node long once resolved
    tee: tuple[Streams, ...] = ()
    local_ranks_filter: frozenset[int] | None = None  # whose output is shown on the console; None: of all
    duplicate_stdout_filters: tuple[str, ...] = ()
    duplicate_stderr_filters: tuple[str, ...] = ()
    log_line_prefix: str | None = None  # TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE: ${role_name}, ${rank}, ${local_rank}

    shutdown_timeout_s: float = 30.0  # from the first signal to SIGKILL; 0: SIGKILL at once
    drain_timeout_s: float | None = None  # the same after a signal to the agent; None: no other
    monitor: MonitorSettings = dataclasses.field(default_factory=MonitorSettings)
    max_no_progress_cycles: int = 3  # restarts in a row without a step beyond the last; 0: never give up for that

    signals_to_handle: tuple[int, ...] = (15, 2, 1, 3)  # forwarded to the workers
