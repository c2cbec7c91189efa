"""The settings of rank monitoring, by the names that users of NVIDIA's ft_launcher know, and what becomes of each.

Every one can be said as `--ft-NAME` (dashes or underscores), in the `fault_tolerance:` section of a YAML file
(`--ft-cfg-path`, or of `--config`), and is explained by `everstep config explain NAME`. docs/hangs.md has this table.
"""

import dataclasses
import enum

from everstep.launcher.option import Fate, Kind, Option

SECTION = "fault_tolerance"
PREFIX = "ft_"


class Form(enum.Enum):
    """How a value is written; text on the command line, and YAML's own types in a file."""

    LIMIT = "seconds, or null: no limit"
    SECONDS = "seconds"
    NUMBER = "number"
    COUNT = "whole number"
    SECTIONS = "name:seconds,name:null,… or a table"
    SIGNAL = "name or number of a signal"
    LEVEL = "debug, info, warning, error or critical"
    MODE = "auto or given"
    TEXT = "text"


@dataclasses.dataclass(frozen=True)
class FtKey:
    """`accepts`: of a refused one, the values that ask for nothing. `is_new`: ours, not that launcher's."""

    name: str
    form: Form
    default: str
    fate: Fate
    note: str
    accepts: tuple[str, ...] = ()
    is_new: bool = False

    @property
    def option_name(self) -> str:
        return PREFIX + self.name


def _honoured(name: str, form: Form, default: str, note: str, *, is_new: bool = False) -> FtKey:
    return FtKey(name, form, default, Fate.HONOURED, note, is_new=is_new)


def _without_effect(name: str, note: str) -> FtKey:
    return FtKey(name, Form.TEXT, "", Fate.WITHOUT_EFFECT, note)


def _refused(name: str, note: str, *accepts: str) -> FtKey:
    return FtKey(name, Form.TEXT, "", Fate.REFUSED, note, accepts)


_OFF = ("false", "0", "no", "none", "null", "")
_LOGS = "workers' output goes where --log-dir, --redirects and --tee say"
_NIC = "only matters to the monitor of network cards, which there is not"
_ANALYSIS = "failures are not sent to a service for analysis; the agent's report and `everstep events` say what failed"

FT_KEYS: tuple[FtKey, ...] = (
    _honoured(
        "initial_rank_heartbeat_timeout",
        Form.LIMIT,
        "null",
        "From the start of the process to its first heartbeat or section: imports, joining, loading a checkpoint. "
        "There the clock starts at init_workload_monitoring().",
    ),
    _honoured(
        "rank_heartbeat_timeout",
        Form.LIMIT,
        "auto",
        "Between heartbeats, once a rank has sent one. Not given: learned.",
    ),
    _honoured(
        "rank_section_timeouts",
        Form.SECTIONS,
        "auto",
        "Of each section by name; every open one counts. A section that is not named is learned.",
    ),
    _honoured(
        "rank_out_of_section_timeout",
        Form.LIMIT,
        "auto",
        "Between two sections, once a rank has used one. Not given: learned.",
    ),
    _honoured("safety_factor", Form.NUMBER, "5", "A learned limit is this times the longest interval of late."),
    _honoured(
        "rank_termination_signal",
        Form.SIGNAL,
        "SIGKILL",
        "Goes to a hung rank's whole process group, with SIGCONT; another one than SIGKILL is followed by SIGKILL.",
    ),
    _honoured("log_level", Form.LEVEL, "info", "Of the monitor in the agent."),
    _honoured(
        "timeouts",
        Form.MODE,
        "auto",
        "`auto`: limits that are not given are learned; `given`: only what is given or calculated limits a rank.",
        is_new=True,
    ),
    _honoured("learned_timeout_floor", Form.SECONDS, "10", "No learned limit of a section is shorter.", is_new=True),
    _honoured(
        "learned_mixed_timeout_floor",
        Form.SECONDS,
        "300",
        "The same between heartbeats and outside of sections, where anything may happen.",
        is_new=True,
    ),
    _honoured("stopped_timeout", Form.LIMIT, "30", "Of a process that a signal has stopped.", is_new=True),
    _honoured(
        "uninterruptible_timeout",
        Form.LIMIT,
        "600",
        "Of a process in state D (disk, network file system, driver) that uses no CPU time.",
        is_new=True,
    ),
    _honoured("suspect_share", Form.NUMBER, "0.5", "Of a limit, after which a rank is suspect.", is_new=True),
    _honoured(
        "kill_after",
        Form.SECONDS,
        "10",
        "From rank_termination_signal to SIGKILL.",
        is_new=True,
    ),
    FtKey("restart_policy", Form.TEXT, "", Fate.TRANSLATED, "The same as --restart-policy."),
    FtKey(
        "use_infra_group_rank",
        Form.TEXT,
        "",
        Fate.TRANSLATED,
        "True: --rank-assignment=infrastructure; false: previous.",
    ),
    _honoured(
        "max_no_progress_cycles",
        Form.COUNT,
        "3",
        "Restarts in a row that pass no step beyond the one before, after which they stop (exit code 93). 0: never.",
    ),
    _without_effect("workload_check_interval", "A rank is looked at when its next deadline comes, to the millisecond."),
    _without_effect("restart_check_interval", "The agent hears of a restart at once."),
    _without_effect("node_health_check_interval", "There are no periodic checks of a node."),
    _without_effect("skip_section_response", "Heartbeats and sections never have a response to wait for."),
    _without_effect("num_warmup_iterations", "The first 3 intervals of each kind in a process are not learned from."),
    _without_effect("min_progress_iterations", "Any committed step is progress."),
    _without_effect("checkpoint_iteration_file", "Progress is what workers' Managers commit."),
    _without_effect("install_exception_hook", "The agent reports a worker's traceback without one."),
    _without_effect("check_remaining_processes", "A worker's whole process group is ended, always."),
    _without_effect("gpu_memory_reclaim_timeout", "Workers start when the processes before them have ended."),
    _without_effect("gpu_memory_tolerance_mb", "Workers start when the processes before them have ended."),
    _without_effect("gpu_memory_poll_interval", "Workers start when the processes before them have ended."),
    _without_effect("numa_bind_strict", "Nothing is bound to NUMA nodes."),
    _without_effect("enable_nic_healthcheck", "Network cards are not checked."),
    _without_effect("pci_topo_file", f"It {_NIC}."),
    _without_effect("link_down_path_template", f"It {_NIC}."),
    _without_effect("link_state_path_template", f"It {_NIC}."),
    _refused("enable_nic_monitor", "network cards are not monitored; leave it out", *_OFF),
    _refused("enable_dist_storage_healthcheck", "storage is not checked; check it in the job's script", *_OFF),
    _refused("storage_healthcheck_path", "storage is not checked; check it in the job's script", "", "null"),
    _refused("segment_health_check_dir", "nodes are not checked before they join", "", "null"),
    _refused("segment", "use --rdzv-conf ranks=topology,topology=DOMAIN,topology_size=N", "", "null"),
    _refused("node_health_check_endpoint", "nodes are not checked before they join", "", "null"),
    _without_effect("per_cycle_applog_prefix", f"Instead {_LOGS}."),
    _without_effect("nvrx_logfile", "The agent logs to its standard error."),
    _without_effect("enable_log_server", f"Instead {_LOGS}."),
    _without_effect("log_server_port", f"Instead {_LOGS}."),
    _without_effect("log_aggregator_count", f"Instead {_LOGS}."),
    _without_effect("log_leaf_max_queue_chunks", f"Instead {_LOGS}."),
    _without_effect("log_server_log_prefix", f"Instead {_LOGS}."),
    _without_effect("log_server_graceful_shutdown_timeout", f"Instead {_LOGS}."),
    _without_effect("cycle_info_dir", "`everstep status` and `everstep events` say what a job is doing."),
    _without_effect("cycle_info_job_id", "`everstep status` and `everstep events` say what a job is doing."),
    _refused("attribution_stop_action", f"{_ANALYSIS}; leave it out", "log", "", "null"),
    *(
        _without_effect(f"attribution_{name}", _ANALYSIS[0].upper() + _ANALYSIS[1:] + ".")
        for name in (
            "endpoint",
            "startup_timeout",
            "llm_api_key_file",
            "llm_base_url",
            "llm_model",
            "analysis_backend",
            "compute_timeout",
            "log_level",
            "export_url",
        )
    ),
)
BY_KEY = {key.name: key for key in FT_KEYS}


def _option(key: FtKey) -> Option:
    """`--ft-a-b`, `--ft-a_b`, and `--ft-param-a_b` as older releases of that launcher had it. None: not given."""
    dashed = key.name.replace("_", "-")
    flags = [f"--ft-{dashed}", f"--ft-{key.name}", f"--ft_{key.name}", f"--ft-param-{key.name}"]
    flags += [f"--ft-param-{dashed}", f"--ft_param_{key.name}"]
    fate = Fate.HONOURED if key.fate is Fate.REFUSED and key.accepts else key.fate
    return Option(
        name=key.option_name,
        flags=tuple(dict.fromkeys(flags)),
        kind=Kind.TEXT,
        fate=fate,
        note=key.note,
        help=f"{key.note[0].upper()}{key.note[1:]}",
        is_hangs=True,
    )


def _timeout(name: str, fate: Fate, note: str, help_text: str) -> Option:
    return Option(
        name=name,
        flags=(f"--{name.replace('_', '-')}", f"--{name}"),
        kind=Kind.NUMBER,
        variable=f"PET_{name.upper()}",
        fate=fate,
        note=note,
        help=help_text,
        is_hangs=True,
    )


# What that launcher has beside torchrun's options and `--ft-…`.
FT_LAUNCHER_OPTIONS: tuple[Option, ...] = (
    _timeout(
        "workers_stop_timeout",
        Fate.TRANSLATED,
        "The same as --shutdown-timeout, which wins. Default 30.",
        "Seconds from SIGTERM to SIGKILL when workers are stopped for a restart.",
    ),
    _timeout(
        "term_timeout",
        Fate.HONOURED,
        "By default --shutdown-timeout; 1800 there.",
        "Seconds from the signal that ends the agent, which its workers get too, to their SIGKILL.",
    ),
    Option(
        name="ft_cfg_path",
        flags=("--ft-cfg-path", "--ft-cfg_path", "--ft_cfg_path", "--fault-tol-cfg-path"),
        variable="PET_FT_CFG_PATH",
        help=f"YAML file with a section `{SECTION}`, at any depth.",
        is_hangs=True,
    ),
    Option(
        name="ignore_missing_fault_tol_cfg",
        flags=("--ignore-missing-fault-tol-cfg",),
        kind=Kind.FLAG,
        default=False,
        fate=Fate.WITHOUT_EFFECT,
        note="No configuration is needed.",
        help="No configuration is needed.",
        is_hangs=True,
    ),
)
FT_OPTIONS: tuple[Option, ...] = (*(_option(key) for key in FT_KEYS), *FT_LAUNCHER_OPTIONS)
