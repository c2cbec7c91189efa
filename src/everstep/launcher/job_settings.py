"""Makes JobSettings of what was said: every wish resolved, every contradiction a ConfigError that says what to do."""

import re
import secrets
import signal
from collections.abc import Mapping
from pathlib import Path

from everstep.config import check_job_id, job_token, node_environment
from everstep.core.policies import RestartPolicyName
from everstep.core.ranks import RankPolicy
from everstep.errors import ConfigError
from everstep.launcher.groups import Place, group_ids, groups_in_total, split_devices, workers_per_node
from everstep.launcher.hang_settings import max_no_progress_cycles, monitor_settings
from everstep.launcher.machine import Machine
from everstep.launcher.meeting import C10D_KEYS, OTHER_TORCH_KEYS, Meeting, number_of_node, where_to_meet
from everstep.launcher.option import Fate
from everstep.launcher.options import OPTIONS
from everstep.launcher.settings import JobSettings, Streams
from everstep.launcher.starting import RunAs
from everstep.launcher.values import Values
from everstep.rendezvous_conf import NodeNumber, RendezvousConf, rank_policy, rendezvous_conf

SHUTDOWN_TIMEOUT_S = 30  # torchrun's
SHUTDOWN_TIMEOUT_MAX_S = 86_400
RESTARTS_MAX = 1_000_000
NODES_MAX = 100_000
NODES = re.compile(r"(\d{1,6})(?::(\d{1,6}))?")
ONE_FOR_ALL = re.compile(r"[0-3]")
FOR_EACH = re.compile(r"\d{1,5}:[0-3](?:,\d{1,5}:[0-3])*")
MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
NEVER_HANDLED = (signal.SIGKILL, signal.SIGSTOP)


def job_settings(values: Values, machine: Machine) -> JobSettings:
    """Raises ConfigError. Asks the resolver where it must know whether an endpoint is this machine."""
    _check_fates(values)
    run_as, target = _what_to_run(values)
    min_nodes, max_nodes = _nodes(values)
    node_rank = number_of_node(values, machine.environ)
    pairs = _pairs(values)
    conf = rendezvous_conf(pairs, also_known=(*C10D_KEYS, *OTHER_TORCH_KEYS))
    meeting = where_to_meet(values, pairs, max_nodes, node_rank, machine)
    place = Place(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        node_rank=node_rank,
        is_alone=meeting.is_alone,
        hostname=machine.hostname,
    )
    meeting = _kept_at_home(meeting, place, groups := group_ids(values, place))
    ranks, infrastructure_rank = _ranks(values, pairs, place, groups, machine.environ)
    workers, python = workers_per_node(values, len(groups), machine), _python(machine)
    return JobSettings(
        run_as=run_as,
        target=target,
        args=values.script_args.value if isinstance(values.script_args.value, tuple) else (),
        python=python,
        environment=_inherited(values, conf, machine.environ),
        use_template=not values.flag("no_template") and run_as is not RunAs.COMMAND and python == machine.python,
        preload=_modules(values),
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        nproc_per_node=workers,
        replica_groups=groups,
        replica_groups_total=groups_in_total(values, place, len(groups)),
        devices=split_devices(values, len(groups), machine.devices),
        virtual_local_rank=values.flag("virtual_local_rank"),
        restart_policy=_restart_policy(values, groups),
        max_restarts=_count(values, "max_restarts", RESTARTS_MAX),
        rank_assignment=ranks,
        infrastructure_rank=infrastructure_rank,
        domain=conf.domain,
        domain_size=conf.domain_size,
        job_id=_job_id(values, place, groups, machine.environ),
        role=values.text("role"),
        rendezvous_group=_rendezvous_group(conf, groups),
        lighthouse=meeting.lighthouse,
        hosts_lighthouse=meeting.hosts_lighthouse,
        hosts_only_if_free=meeting.hosts_only_if_free,
        lighthouse_bind=meeting.lighthouse_bind,
        lighthouse_port=meeting.lighthouse_port,
        token=_token(values, conf, meeting, machine.environ),
        tls_ca=conf.tls_ca or _path(values, "tls_ca"),
        connect_timeout_s=conf.connect_timeout_s,
        close_timeout_s=conf.close_timeout_s,
        node_id=conf.node_id or f"{values.optional_text('local_addr') or machine.hostname}_{machine.pid}",
        machine=conf.node_id or values.optional_text("local_addr") or machine.hostname,
        local_addr=values.optional_text("local_addr"),
        join_timeout_s=conf.join_timeout_s,
        last_call_s=conf.last_call_s,
        log_dir=_path(values, "log_dir"),
        redirects=_streams(values, "redirects", workers),
        tee=_streams(values, "tee", workers),
        local_ranks_filter=_local_ranks(values),
        duplicate_stdout_filters=values.items("duplicate_stdout_filters"),
        duplicate_stderr_filters=values.items("duplicate_stderr_filters"),
        log_line_prefix=machine.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        shutdown_timeout_s=_shutdown_timeout(values, machine.environ),
        drain_timeout_s=_seconds(values, "term_timeout"),
        signals_to_handle=_signals(values),
        monitor=monitor_settings(values),
        max_no_progress_cycles=max_no_progress_cycles(values),
    )


def _python(machine: Machine) -> str:
    return machine.environ.get("PYTHON_EXEC") or machine.python


def _check_fates(values: Values) -> None:
    for option in OPTIONS:
        given = values.options[option.name]
        if option.fate is Fate.REFUSED and given.value != option.default:
            note = option.note[0].lower() + option.note[1:]
            raise ConfigError(f"{values.named(option.name)}={given.value} is not supported: {note.replace('`', '')}")


def _what_to_run(values: Values) -> tuple[RunAs, str]:
    target = values.script.value
    if not isinstance(target, str) or not target:
        raise ConfigError("there is no script to run: give its path after the options")
    if values.flag("run_path"):
        return RunAs.SCRIPT, target
    if values.flag("module") and values.flag("no_python"):
        raise ConfigError(f"{values.named('module')} and {values.named('no_python')} contradict each other; give one")
    if values.flag("no_python"):
        return RunAs.COMMAND, target
    return (RunAs.MODULE if values.flag("module") else RunAs.SCRIPT), target


def _nodes(values: Values) -> tuple[int, int]:
    text, name = values.text("nnodes").strip(), values.named("nnodes")
    match = NODES.fullmatch(text)
    if match is None:
        raise ConfigError(f"{name}={text!r} must be a number of nodes, or MIN:MAX")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 0 < low <= high <= NODES_MAX:
        raise ConfigError(f"{name}={text}: it takes 1 <= MIN <= MAX <= {NODES_MAX} nodes")
    return low, high


def _pairs(values: Values) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, values.text("rdzv_conf").strip().split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        if not key or not value:
            raise ConfigError(f"{values.named('rdzv_conf')}: {pair!r} is no KEY=VALUE")
        found[key] = value
    if found.get("store_type", "tcp").lower() != "tcp":
        raise ConfigError(
            f"{values.named('rdzv_conf')}: store_type={found['store_type']} is not supported; nodes meet at a "
            "lighthouse, leave it out"
        )
    return found


def _kept_at_home(meeting: Meeting, place: Place, groups: tuple[str, ...]) -> Meeting:
    """A world of one node needs no port open to the network, whatever its endpoint's name is."""
    if meeting.is_open_to_the_network and meeting.hosts_lighthouse and place.max_nodes == 1 and not groups:
        port = meeting.lighthouse_port
        return Meeting(
            lighthouse=f"http://127.0.0.1:{port}",
            hosts_lighthouse=True,
            hosts_only_if_free=meeting.hosts_only_if_free,
            lighthouse_port=port,
            is_alone=True,
        )
    return meeting


def _token(values: Values, conf: RendezvousConf, meeting: Meeting, environ: Mapping[str, str]) -> bytes | None:
    token = job_token(None, conf.token_file or values.optional_text("token_file"), environ)
    if token is None and meeting.is_open_to_the_network:
        raise ConfigError(
            f"the lighthouse of this job, in a node's agent at {meeting.lighthouse}, is open to the network, and there "
            "is no job token: put one into a file with mode 0600 and set EVERSTEP_TOKEN_FILE (or --token-file) on "
            "every node: (umask 077; head -c 32 /dev/urandom | base64 > token)"
        )
    return token


def _inherited(values: Values, conf: RendezvousConf, environ: Mapping[str, str]) -> dict[str, str]:
    """Workers find the token and the authorities where the agent was told of them, by an option too."""
    said = {
        "EVERSTEP_TOKEN_FILE": conf.token_file or values.optional_text("token_file"),
        "EVERSTEP_TLS_CA": str(conf.tls_ca) if conf.tls_ca else values.optional_text("tls_ca"),
    }
    return dict(environ) | {name: value for name, value in said.items() if value}


def _ranks(
    values: Values, pairs: Mapping[str, str], place: Place, groups: tuple[str, ...], environ: Mapping[str, str]
) -> tuple[RankPolicy, int | None]:
    name, option = values.optional_text("rank_assignment"), values.named("rank_assignment")
    in_conf = pairs.get("ranks")
    if name and in_conf and name != in_conf:
        raise ConfigError(f"{option}={name} and --rdzv-conf ranks={in_conf} contradict each other; give one")
    if not name:
        name, option = in_conf, "--rdzv-conf ranks"
    slurm = node_environment(environ)
    if values.is_given("node_rank") or groups:
        number = place.node_rank if place.node_rank is not None else slurm.number
        tasks = None  # of other groups, too
        if number is not None and groups:
            number %= place.max_nodes
    else:
        number, tasks = slurm.number, slurm.slurm_tasks
        if number is None:
            number = place.node_rank
    if (
        number is not None
        and values.is_given("node_rank")
        and number >= place.max_nodes
        and name
        in (
            None,
            RankPolicy.INFRASTRUCTURE.value,
        )
    ):
        raise ConfigError(
            f"{values.named('node_rank')}={number} is beyond the {place.max_nodes} nodes of {values.named('nnodes')}: "
            "nodes are numbered from 0"
        )
    node = NodeNumber(
        number=number,
        tasks=tasks,
        is_default=values.is_given("node_rank") or slurm.slurm_number is not None,
        variables="--node-rank, SLURM_PROCID or GROUP_RANK",
    )
    return rank_policy(name, node, place.max_nodes, option)


def _restart_policy(values: Values, groups: tuple[str, ...]) -> RestartPolicyName:
    text = values.optional_text("restart_policy")
    if text is None:
        return RestartPolicyName.GROUP if groups else RestartPolicyName.ANY_FAILED
    known = ", ".join(policy.value for policy in RestartPolicyName)
    try:
        policy = RestartPolicyName(text)
    except ValueError:
        raise ConfigError(f"{values.named('restart_policy')}={text!r} is unknown; use one of {known}") from None
    if policy is RestartPolicyName.GROUP and not groups:
        raise ConfigError(
            f"{values.named('restart_policy')}=group needs replica groups: give --replica-groups or --replica-group-id"
        )
    return policy


def _job_id(values: Values, place: Place, groups: tuple[str, ...], environ: Mapping[str, str]) -> str:
    if values.is_given("rdzv_id"):
        found, name = values.text("rdzv_id"), values.named("rdzv_id")
    elif environ.get("EVERSTEP_JOB_ID"):
        found, name = environ["EVERSTEP_JOB_ID"], "EVERSTEP_JOB_ID"
    elif place.max_nodes == 1 and (place.is_alone or not groups):
        return secrets.token_hex(8)  # nobody else needs to know it
    else:
        return "default"
    check_job_id(name, found)
    return found


def _rendezvous_group(conf: RendezvousConf, groups: tuple[str, ...]) -> str:
    if conf.group and groups:
        raise ConfigError(
            f"--rdzv-conf group={conf.group}: each replica group has a rendezvous of its own name; leave it out"
        )
    return conf.group


def _streams(values: Values, name: str, workers: int) -> tuple[Streams, ...]:
    text, called = values.text(name).strip(), values.named(name)
    if ONE_FOR_ALL.fullmatch(text):
        return (Streams(int(text)),) * workers
    if not FOR_EACH.fullmatch(text):
        raise ConfigError(
            f"{called}={text!r} is neither 0 (none), 1 (stdout), 2 (stderr) or 3 (both), nor a list of local ranks "
            "with one of these: 0:1,1:2"
        )
    each = {int(rank): Streams(int(which)) for rank, _, which in (item.partition(":") for item in text.split(","))}
    return tuple(each.get(rank, Streams.NONE) for rank in range(workers))


def _local_ranks(values: Values) -> frozenset[int] | None:
    text = values.text("local_ranks_filter").strip()
    if not text:
        return None
    items = [item.strip() for item in text.split(",")]
    if not all(item.isascii() and item.isdigit() and len(item) < 10 for item in items):
        raise ConfigError(f"{values.named('local_ranks_filter')}={text!r} must be local ranks: 0,1,2")
    return frozenset(int(item) for item in items)


def _signals(values: Values) -> tuple[int, ...]:
    found: dict[signal.Signals, None] = {}
    for name in filter(None, (item.strip() for item in values.text("signals_to_handle").split(","))):
        if name not in signal.Signals.__members__ or signal.Signals[name] in NEVER_HANDLED:
            raise ConfigError(
                f"{values.named('signals_to_handle')}: {name!r} is no signal that can be handled; SIGTERM,SIGUSR1, say"
            )
        found[signal.Signals[name]] = None
    return tuple(int(number) for number in found)


def _shutdown_timeout(values: Values, environ: Mapping[str, str]) -> float:
    if values.options["shutdown_timeout"].value is not None:
        return _count(values, "shutdown_timeout", SHUTDOWN_TIMEOUT_MAX_S)
    stop_s = _seconds(values, "workers_stop_timeout")
    if stop_s is not None:
        return stop_s
    text = environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "").strip() or str(SHUTDOWN_TIMEOUT_S)
    if not (text.isascii() and text.isdigit() and int(text[:9]) <= SHUTDOWN_TIMEOUT_MAX_S):
        raise ConfigError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={text!r} must be whole seconds")
    return int(text)


def _seconds(values: Values, name: str) -> float | None:
    number = values.options[name].value
    if number is not None and not (isinstance(number, int | float) and 0 <= number <= SHUTDOWN_TIMEOUT_MAX_S):
        raise ConfigError(f"{values.named(name)}={number} must be a number of seconds up to {SHUTDOWN_TIMEOUT_MAX_S}")
    return number


def _count(values: Values, name: str, highest: int) -> int:
    number = values.integer(name)
    if not 0 <= number <= highest:
        raise ConfigError(f"{values.named(name)}={number} must be a whole number from 0 to {highest}")
    return number


def _modules(values: Values) -> tuple[str, ...]:
    for name in values.items("preload"):
        if not MODULE.fullmatch(name):
            raise ConfigError(f"{values.named('preload')}: {name!r} is no name of a module")
    return values.items("preload")


def _path(values: Values, name: str) -> Path | None:
    text = values.optional_text(name)
    return Path(text) if text else None
