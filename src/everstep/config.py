"""Settings of a trainer and of a lighthouse: explicit arguments first, then the environment, then the default.

Every wrong value is a ConfigError that names the argument or variable, the value, and what to do. Nothing else in the
package reads the environment, and nothing writes it, but for `replace_environment` in a worker that is forked.

| variable | means |
|---|---|
| EVERSTEP_LIGHTHOUSE | `host:port` or an http(s) URL; unset: the script trains alone |
| EVERSTEP_JOB_ID | the job among those of the lighthouse; "default" |
| EVERSTEP_TOKEN_FILE, EVERSTEP_TOKEN | the job token: its file (mode 0600), or itself |
| EVERSTEP_TLS_CA | PEM file of the authority that signed the lighthouse's certificate |
| REPLICA_GROUP_ID | this replica group's stable name |
| NUM_REPLICA_GROUPS | how many groups the first step waits for |
| EVERSTEP_PROACTIVE_RECOVERY | 0: a notice of a failure interrupts nothing; collectives must fail by themselves |
| RANK, WORLD_SIZE | this process among the ranks of its group, as torchrun sets them; unset: a group of one |
| EVERSTEP_GROUP_LEADER | `host:port` where rank 0 of the group listens for the others; unset: torchrun's store says |
| EVERSTEP_WORKER, EVERSTEP_STEPS_FILE | the agent's name for this start; where it reads the steps committed |
| MASTER_ADDR, MASTER_PORT | where torchrun's agent has its store, if TORCHELASTIC_USE_AGENT_STORE says so |
"""

import dataclasses
import ipaddress
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from everstep.core.types import JOB_ID_CHARS_MAX, REPLICA_ID_CHARS_MAX
from everstep.errors import ConfigError

LIGHTHOUSE_PORT = 29520
TOKEN_BYTES_MIN = 8
TOKEN_BYTES_MAX = 4096
REPLICA_GROUPS_MAX = 100_000
GROUP_RANKS_MAX = 10_000
WORKER_CHARS_MAX = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """This process among the ranks of its replica group; rank 0 leads.

    `leader` is where it listens, if that is fixed; else it publishes its address in torchrun's store under a key of
    `namespace`, or in the store of the script's own process group.
    """

    rank: int = 0
    size: int = 1
    leader: tuple[str, int] | None = None
    store: tuple[str, int] | None = None
    namespace: str = ""

    def __post_init__(self) -> None:
        check_count("group_size (WORLD_SIZE)", self.size, 1, GROUP_RANKS_MAX)
        check_count("group_rank (RANK)", self.rank, 0, self.size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManagerSettings:
    """What a trainer needs to know. `lighthouse` is a base URL; None: train alone, with no network."""

    lighthouse: str | None = None
    job_id: str = "default"
    token: bytes | None = dataclasses.field(default=None, repr=False)
    tls_ca: Path | None = None
    replica_group_id: str = "0"
    replica_groups: int = 0  # 0: not known
    min_replicas: int = 1
    connect_timeout_s: float = 30.0
    collective_timeout_s: float = 300.0
    drain_grace_s: float = 20.0
    proactive_recovery: bool = True
    backend: str = "gloo"
    recovery_transport: object = "http"  # or an object that is one (train/transports.py)
    nccl_environment: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)  # TORCH_NCCL_*
    group: GroupSettings = dataclasses.field(default_factory=GroupSettings)
    worker: str = ""  # the token that its agent gave this process; "": no agent
    steps_file: str = ""  # where that agent reads how many steps it has committed

    def __post_init__(self) -> None:
        if self.backend not in ("gloo", "nccl"):
            raise ConfigError(f"backend={self.backend!r} is unknown; use gloo, or nccl for tensors on GPUs")
        check_duration("collective_timeout_s", self.collective_timeout_s)
        check_duration("drain_grace_s", self.drain_grace_s)
        check_job_id("job_id", self.job_id)
        check_token("token", self.token)
        _check_name("replica_group_id (REPLICA_GROUP_ID)", self.replica_group_id, REPLICA_ID_CHARS_MAX)
        check_count("replica_groups (NUM_REPLICA_GROUPS)", self.replica_groups, 0, REPLICA_GROUPS_MAX)
        _check_name("EVERSTEP_WORKER", self.worker or "none", WORKER_CHARS_MAX)
        check_count("min_replicas", self.min_replicas, 1, REPLICA_GROUPS_MAX)
        check_duration("connect_timeout_s", self.connect_timeout_s)
        if 0 < self.replica_groups < self.min_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} is above the number of replica groups, {self.replica_groups}: no "
                "step would ever commit; lower min_replicas or raise NUM_REPLICA_GROUPS"
            )
        leader = self.group.leader
        if leader is not None and self.token is None and not is_loopback(leader[0]):
            raise ConfigError(
                f"EVERSTEP_GROUP_LEADER={leader[0]}:{leader[1]} opens the group to the network, and there is no job "
                "token: set EVERSTEP_TOKEN_FILE"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LighthouseSettings:
    """What a lighthouse needs to know. Durations in seconds; port 0 takes any free one."""

    bind: str = "127.0.0.1"
    port: int = LIGHTHOUSE_PORT
    min_replicas: int = 1
    join_timeout_s: float = 10.0
    heartbeat_timeout_s: float = 2.0
    link_grace_s: float = 0.02
    crash_loop_limit: int = 8  # deaths of a group in a row at one place, before it is left out; 0: never, and no pauses
    node_timeout_s: float = 6.0  # of silence, until a node is held to be dead
    stuck_timeout_s: float | None = None  # None: learned from each job's steps
    stuck_floor_s: float = 10.0  # the least that is learned
    stuck_initial_s: float = 300.0  # for the first steps of a process
    state_dir: Path | None = None  # None: the lighthouse's memory ends with its process
    token: bytes | None = dataclasses.field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    jobs: tuple[str, ...] = ()  # the only jobs that are served; (): any
    jobs_max: int = 1000
    events_kept_max: int = 4096  # of each job, for readers that come late or fall behind

    def __post_init__(self) -> None:
        check_count("port", self.port, 0, 65535)
        check_count("min_replicas", self.min_replicas, 1, REPLICA_GROUPS_MAX)
        check_count("crash_loop_limit", self.crash_loop_limit, 0, 1_000_000)
        check_count("jobs_max", self.jobs_max, 1, 1_000_000)
        check_count("events_kept_max", self.events_kept_max, 1, 1_000_000)
        check_duration("join_timeout_s", self.join_timeout_s)
        check_duration("heartbeat_timeout_s", self.heartbeat_timeout_s)
        check_duration("link_grace_s", self.link_grace_s)
        check_duration("node_timeout_s", self.node_timeout_s)
        check_duration("stuck_floor_s", self.stuck_floor_s)
        check_duration("stuck_initial_s", self.stuck_initial_s)
        if self.stuck_timeout_s is not None:
            check_duration("stuck_timeout_s", self.stuck_timeout_s)
        check_token("token", self.token)
        for job_id in self.jobs:
            check_job_id("jobs", job_id)
        if not self.bind:
            raise ConfigError("bind is empty: give an address, 127.0.0.1 or 0.0.0.0, say")
        if self.token is None and not is_loopback(self.bind):
            raise ConfigError(
                f"bind={self.bind} opens the lighthouse to the network, and there is no job token: give --token-file "
                "(EVERSTEP_TOKEN_FILE), or bind 127.0.0.1"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both, or neither")

    @property
    def heartbeat_interval_s(self) -> float:
        return self.heartbeat_timeout_s / 4


def replace_environment(environment: Mapping[bytes, bytes]) -> None:
    """Make this the whole environment of this process: in a process that was forked to be another program."""
    os.environb.clear()
    os.environb.update(environment)


def manager_settings(
    *,
    lighthouse: str | None = None,
    job_id: str | None = None,
    token: bytes | None = None,
    token_file: str | Path | None = None,
    tls_ca: str | Path | None = None,
    replica_group_id: str | int | None = None,
    replica_groups: int | None = None,
    min_replicas: int = 1,
    connect_timeout_s: float = 30.0,
    collective_timeout_s: float = 300.0,
    drain_grace_s: float = 20.0,
    proactive_recovery: bool | None = None,
    backend: str = "gloo",
    recovery_transport: object = "http",
    group_rank: int | None = None,
    group_size: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> ManagerSettings:
    """Settings from these arguments and, where they are None, from the environment. Raises ConfigError."""
    env = os.environ if environ is None else environ
    address = _given(lighthouse, "lighthouse", env, "EVERSTEP_LIGHTHOUSE")
    group = str(replica_group_id) if replica_group_id is not None else env.get("REPLICA_GROUP_ID", "")
    if address and not group:
        raise ConfigError("this replica group has no name: set REPLICA_GROUP_ID (0, 1, 2, …), or pass replica_group_id")
    return ManagerSettings(
        lighthouse=lighthouse_url(address[1], address[0]) if address else None,
        job_id=job_id if job_id is not None else env.get("EVERSTEP_JOB_ID") or "default",
        token=job_token(token, token_file, env),
        tls_ca=_path(tls_ca, env, "EVERSTEP_TLS_CA"),
        replica_group_id=group or "0",
        replica_groups=replica_groups if replica_groups is not None else _count_in(env, "NUM_REPLICA_GROUPS"),
        min_replicas=min_replicas,
        connect_timeout_s=connect_timeout_s,
        collective_timeout_s=collective_timeout_s,
        drain_grace_s=drain_grace_s,
        backend=backend,
        recovery_transport=recovery_transport,
        nccl_environment={name: value for name, value in env.items() if name.startswith("TORCH_NCCL_")},
        proactive_recovery=(
            proactive_recovery if proactive_recovery is not None else _flag_in(env, "EVERSTEP_PROACTIVE_RECOVERY", True)
        ),
        group=_group_settings(group_rank, group_size, env),
        worker=env.get("EVERSTEP_WORKER", ""),
        steps_file=env.get("EVERSTEP_STEPS_FILE", ""),
    )


def _group_settings(rank: int | None, size: int | None, env: Mapping[str, str]) -> GroupSettings:
    if (rank is None) != (size is None):
        raise ConfigError(f"group_rank={rank} and group_size={size} belong together: give both, or neither")
    if rank is None or size is None:
        if not (env.get("RANK") and env.get("WORLD_SIZE")):
            return GroupSettings()
        rank, size = _count_in(env, "RANK"), _count_in(env, "WORLD_SIZE")
    leader, store = env.get("EVERSTEP_GROUP_LEADER"), None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        store = env["MASTER_ADDR"], _count_in(env, "MASTER_PORT")
    return GroupSettings(
        rank=rank,
        size=size,
        leader=_host_and_port("EVERSTEP_GROUP_LEADER", leader) if leader else None,
        store=store,
        # Not the restart count: the agents of several nodes count differently, as each counts only failures of its own.
        namespace=env.get("TORCHELASTIC_RUN_ID", ""),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeEnvironment:
    """What the environment says of a node that torchrun starts an agent on."""

    slurm_number: int | None = None  # SLURM_PROCID
    slurm_tasks: int | None = None  # SLURM_NTASKS
    group_rank: int | None = None  # GROUP_RANK
    tls_ca: Path | None = None
    shares_store: bool = True

    @property
    def number(self) -> int | None:
        return self.slurm_number if self.slurm_number is not None else self.group_rank


def node_environment(environ: Mapping[str, str] | None = None) -> NodeEnvironment:
    """Raises ConfigError for a number that is none."""
    env = os.environ if environ is None else environ

    def number(variable: str) -> int | None:
        return _count_in(env, variable) if env.get(variable) else None

    return NodeEnvironment(
        slurm_number=number("SLURM_PROCID"),
        slurm_tasks=number("SLURM_NTASKS"),
        group_rank=number("GROUP_RANK"),
        tls_ca=_path(None, env, "EVERSTEP_TLS_CA"),
        shares_store=env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1",  # torch's own switch
    )


def job_token(
    token: bytes | None = None, token_file: str | Path | None = None, environ: Mapping[str, str] | None = None
) -> bytes | None:
    """The token given, else that of the file given, else of EVERSTEP_TOKEN_FILE, else EVERSTEP_TOKEN, else None."""
    env = os.environ if environ is None else environ
    if token is not None:
        return token
    path = token_file if token_file is not None else env.get("EVERSTEP_TOKEN_FILE")
    if path:
        return read_token_file(Path(path))
    text = env.get("EVERSTEP_TOKEN", "").strip()
    if not text:
        return None
    found = os.fsencode(text)  # the very bytes that were set, UTF-8 or not
    check_token("EVERSTEP_TOKEN", found)
    return found


def read_token_file(path: Path) -> bytes:
    """The token, without surrounding blanks. A file that others can read is refused: its token is no secret."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(TOKEN_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"token file {path} has mode {mode:04o}, so others can read it: chmod 600 {path}")
    token = content.strip()
    check_token(f"token file {path}", token)
    return token


def lighthouse_url(address: str, name: str = "lighthouse") -> str:
    """`host:port` or an http(s) URL as a base URL without a slash at its end. `name` is for the error."""
    text = address.strip()
    hint = f"{name}={address!r} is no address of a lighthouse; give host:port or http://host:port"
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{hint} ({error})") from error
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"{hint} (scheme {parts.scheme!r})")
    if not parts.hostname or any(c.isspace() for c in text):
        raise ConfigError(f"{hint} (no host)" if not parts.hostname else f"{hint} (blanks)")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"{hint} (no user, query or fragment)")
    if port is None and "://" not in text:
        port = LIGHTHOUSE_PORT
    if port == 0:
        raise ConfigError(f"{hint} (port 0)")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- checks, for settings here and for arguments elsewhere


def check_duration(name: str, value: object) -> None:
    """Finite and above zero, in seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r} is no duration: give seconds, a finite number above 0")


def check_count(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ConfigError(f"{name}={value!r} must be a whole number from {lowest} to {highest}")


def check_job_id(name: str, value: str) -> None:
    _check_name(f"{name} (EVERSTEP_JOB_ID)", value, JOB_ID_CHARS_MAX)


def check_token(name: str, token: bytes | None) -> None:
    """The value is never part of the message."""
    if token is not None and not TOKEN_BYTES_MIN <= len(token) <= TOKEN_BYTES_MAX:
        raise ConfigError(
            f"{name} has {len(token)} bytes; a job token has {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX}. Make one with: "
            "(umask 077; head -c 32 /dev/urandom | base64 > token)"
        )


def _check_name(name: str, value: str, chars_max: int) -> None:
    if not 0 < len(value) <= chars_max or not value.isprintable() or value != value.strip():
        raise ConfigError(f"{name}={value[:chars_max]!r} must have 1 to {chars_max} printable characters")


def _given(argument: str | None, name: str, env: Mapping[str, str], variable: str) -> tuple[str, str] | None:
    """(where it was given, value), or None where it was not."""
    if argument is not None:
        return (name, argument)
    return (variable, env[variable]) if env.get(variable) else None


def _host_and_port(name: str, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        raise ConfigError(f"{name}={value!r} is no address; give host:port")
    return host.strip("[]"), int(port)


def _path(argument: str | Path | None, env: Mapping[str, str], variable: str) -> Path | None:
    value = argument if argument is not None else env.get(variable)
    return Path(value) if value else None


def _count_in(env: Mapping[str, str], variable: str) -> int:
    text = env.get(variable, "")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{variable}={text!r} must be a whole number")
    return int(text[:12])


def _flag_in(env: Mapping[str, str], variable: str, default: bool) -> bool:
    text = env.get(variable, "").strip().lower()
    if not text:
        return default
    if text not in ("0", "1", "true", "false", "yes", "no", "on", "off"):
        raise ConfigError(f"{variable}={text!r} must be 1 or 0")
    return text in ("1", "true", "yes", "on")
