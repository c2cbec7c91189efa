"""Where the nodes of a job meet: what torchrun's rendezvous options mean with a lighthouse.

Given `--lighthouse`, everything meets there. Else a node of the job has one in its agent: this one alone
(`--standalone`, or one node and no address), the node whose address is the endpoint's, or node 0 of a static job.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from everstep.config import is_loopback, lighthouse_url
from everstep.errors import ConfigError
from everstep.launcher.machine import Machine
from everstep.launcher.values import FALSE, TRUE, Values

STATIC_PORT = 29500  # torchrun's, where only --master-addr is said
DEFAULT_PORTS = {"c10d": 29400, "everstep": 29520}  # of an endpoint without a port
KNOWN_BACKENDS = ("static", "c10d", "everstep")
NUMBERS_OF_NODE = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")
# Of torch's c10d backend. What else they set is there no longer; the lighthouse has its own.
C10D_KEYS = ("is_host", "store_type", "read_timeout", "keep_alive_interval", "keep_alive_max_attempt")
OTHER_TORCH_KEYS = ("heartbeat_timeout", "rank")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Fields as of JobSettings. `is_alone`: no other node can ever come."""

    lighthouse: str | None = None
    hosts_lighthouse: bool = False
    hosts_only_if_free: bool = False
    lighthouse_bind: str = "127.0.0.1"
    lighthouse_port: int = 0
    is_alone: bool = False

    @property
    def is_open_to_the_network(self) -> bool:
        return bool(self.lighthouse_port) and not is_loopback(self.lighthouse_bind)


ALONE = Meeting(hosts_lighthouse=True, is_alone=True)


def where_to_meet(
    values: Values, conf: Mapping[str, str], max_nodes: int, node_rank: int | None, machine: Machine
) -> Meeting:
    """Raises ConfigError for what contradicts itself, or is nowhere."""
    backend = values.text("rdzv_backend").strip()
    _check_backend(values, backend)
    endpoint = values.text("rdzv_endpoint").strip()
    lighthouse = values.optional_text("lighthouse")
    if lighthouse:
        return _external(values, lighthouse, backend, endpoint)
    has_no_address = backend == "static" and not endpoint and values.optional_integer("master_port") is None
    if values.flag("standalone") or (has_no_address and max_nodes == 1):
        if max_nodes > 1:
            raise ConfigError(
                f"{values.named('standalone')} is one node, and {values.named('nnodes')} asks for {max_nodes}; "
                "leave one of them out"
            )
        return ALONE
    if endpoint.startswith(("http://", "https://")):
        return Meeting(lighthouse=lighthouse_url(endpoint, values.named("rdzv_endpoint")))
    if backend == "static":
        return _static(values, endpoint, max_nodes, node_rank, machine)
    return _dynamic(values, conf, backend, endpoint, max_nodes, machine)


def number_of_node(values: Values, environ: Mapping[str, str]) -> int | None:
    """--node-rank, else what the scheduler says, else None. Raises ConfigError for a number that is none."""
    if values.is_given("node_rank"):
        rank = values.integer("node_rank")
        if rank < 0:
            raise ConfigError(f"{values.named('node_rank')}={rank} must be 0 or more")
        return rank
    for variable in NUMBERS_OF_NODE:
        text = environ.get(variable, "")
        if text:
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise ConfigError(f"{variable}={text!r} must be a whole number")
            return int(text)
    return None


def _check_backend(values: Values, backend: str) -> None:
    name = values.named("rdzv_backend")
    if backend.startswith("etcd"):
        raise ConfigError(
            f"{name}={backend} is not supported: run `everstep lighthouse` and give --lighthouse HOST:PORT, or use "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT, and a node of the job has it"
        )
    if backend not in KNOWN_BACKENDS:
        raise ConfigError(f"{name}={backend!r} is unknown; use one of {', '.join(KNOWN_BACKENDS)}")


def _external(values: Values, lighthouse: str, backend: str, endpoint: str) -> Meeting:
    url = lighthouse_url(lighthouse, values.named("lighthouse"))
    if backend == "everstep" and endpoint and lighthouse_url(endpoint, values.named("rdzv_endpoint")) != url:
        raise ConfigError(
            f"{values.named('lighthouse')}={lighthouse} and {values.named('rdzv_endpoint')}={endpoint} are two "
            "lighthouses; give one of them"
        )
    return Meeting(lighthouse=url)


def _static(values: Values, endpoint: str, max_nodes: int, node_rank: int | None, machine: Machine) -> Meeting:
    if endpoint:
        host, port = _host_and_port(values, endpoint, 0)
        if not port:
            raise ConfigError(f"{values.named('rdzv_endpoint')}={endpoint} has no port; give HOST:PORT")
    else:
        host, given = values.text("master_addr").strip().strip("[]"), values.optional_integer("master_port")
        port = STATIC_PORT if given is None else given
        if not host or not 0 < port < 65536:
            raise ConfigError(
                f"{values.named('master_addr')}={host} and {values.named('master_port')}={port} are no address; give "
                "node 0's, with a port from 1 to 65535"
            )
    hosts = machine.is_here(host) if node_rank is None else node_rank == 0
    found = _embedded(host, port, hosts, only_if_free=node_rank is None)
    return replace(found, is_alone=max_nodes == 1 and is_loopback(host) and not node_rank)


def _dynamic(
    values: Values, conf: Mapping[str, str], backend: str, endpoint: str, max_nodes: int, machine: Machine
) -> Meeting:
    name = values.named("rdzv_endpoint")
    if not endpoint and max_nodes > 1:
        raise ConfigError(f"--rdzv-backend={backend} needs {name}: HOST:PORT, the same on every node")
    host, port = _host_and_port(values, endpoint or "localhost", DEFAULT_PORTS[backend])
    said = _flag(conf, "is_host")
    hosts = machine.is_here(host) if said is None else said
    if port == 0:
        if max_nodes > 1 or not hosts:
            raise ConfigError(f"{name}={endpoint}: port 0 is for a single node; give the port that all nodes use")
        return ALONE
    return _embedded(host, port, hosts, only_if_free=said is None)


def _embedded(host: str, port: int, hosts: bool, *, only_if_free: bool) -> Meeting:
    is_ipv6 = ":" in host
    any_address = "::" if is_ipv6 else "0.0.0.0"
    loopback = "127.0.0.1" if host == "localhost" else host
    return Meeting(
        lighthouse=lighthouse_url(f"[{host}]:{port}" if is_ipv6 else f"{host}:{port}", "the rendezvous endpoint"),
        hosts_lighthouse=hosts,
        hosts_only_if_free=hosts and only_if_free,
        lighthouse_bind=loopback if is_loopback(host) else any_address,
        lighthouse_port=port,
    )


def _host_and_port(values: Values, endpoint: str, default_port: int) -> tuple[str, int]:
    host, colon, digits = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]") or (host.count(":") and not host.startswith("[")):
        host, digits = endpoint, str(default_port)  # no port: a name, an IPv4 address, an IPv6 address
    host = host.strip("[]")
    if not host or any(c.isspace() for c in host) or not digits.isascii() or not digits.isdigit():
        raise ConfigError(f"{values.named('rdzv_endpoint')}={endpoint!r} is no address; give HOST:PORT")
    if int(digits[:6]) > 65535:
        raise ConfigError(f"{values.named('rdzv_endpoint')}={endpoint!r} has no port from 0 to 65535")
    return host, int(digits)


def _flag(conf: Mapping[str, str], key: str) -> bool | None:
    if key not in conf:
        return None
    word = conf[key].strip().lower()
    if word not in (*TRUE, *FALSE, "t", "y", "f", "n"):
        raise ConfigError(f"--rdzv-conf {key}={conf[key]!r} must be true or false")
    return word in (*TRUE, "t", "y")
