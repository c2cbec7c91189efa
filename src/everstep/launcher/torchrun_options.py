"""Every option of torchrun 2.13, and what becomes of it under `everstep run`.

tests/launcher/test_torchrun_options.py compares this with the parser of the torch that is installed.
"""

import dataclasses

from everstep.launcher.option import Fate, Kind, Option, Value, torchruns

HONOURED, TRANSLATED, REFUSED = Fate.HONOURED, Fate.TRANSLATED, Fate.REFUSED


def _of_kind(kind: Kind, option: Option, default: Value, **changes: object) -> Option:
    return dataclasses.replace(option, kind=kind, default=default, **changes)  # type: ignore[arg-type]


SIZE = (
    torchruns(
        "nnodes",
        HONOURED,
        "Of one replica group, where there are several.",
        "Number of nodes, N or MIN:MAX.",
        "1:1",
    ),
    torchruns(
        "nproc_per_node",
        HONOURED,
        "Of one replica group. Devices are counted without torch: CUDA devices by `CUDA_VISIBLE_DEVICES`, `/proc` and "
        "`/dev`. `xpu` and other accelerators are refused: give the number.",
        "Workers on each node: a number, auto, gpu or cpu.",
        "1",
    ),
)
MEETING = (
    torchruns(
        "rdzv_backend",
        TRANSLATED,
        "`static`, `c10d` and `everstep` all meet at a lighthouse. `etcd` and `etcd-v2` are refused: use "
        "`--lighthouse`, or `--rdzv-backend=c10d`.",
        "How nodes meet: static, c10d or everstep.",
        "static",
    ),
    torchruns(
        "rdzv_endpoint",
        TRANSLATED,
        "The lighthouse is there: in the agent of the node whose address it is, unless one runs there already. Not "
        "used where `--lighthouse` is given.",
        "Where nodes meet, HOST:PORT.",
    ),
    torchruns(
        "rdzv_id",
        HONOURED,
        "The job at the lighthouse; by default `EVERSTEP_JOB_ID`, else a random one for a single node that has its "
        "lighthouse in its agent, or no replica groups, else `default`.",
        "The job's id.",
        "none",
    ),
    torchruns(
        "rdzv_conf",
        HONOURED,
        "Keys as in [rendezvous.md](rendezvous.md#keys-of---rdzv-conf); of torch's c10d backend `is_host` is honoured, "
        "and what sets its store's timeouts has no effect.",
        "More of the rendezvous, KEY=VALUE,KEY=VALUE.",
    ),
    torchruns(
        "standalone",
        TRANSLATED,
        "A lighthouse in this agent, on loopback, at a free port; the one of `--lighthouse` where that is given.",
        "Meet on this node alone.",
        False,
    ),
    _of_kind(
        Kind.INTEGER,
        torchruns(
            "node_rank",
            HONOURED,
            "Node 0 has the lighthouse. It is the node's rank, whatever the backend, and numbers replica groups.",
            "This node's rank.",
        ),
        0,
    ),
    torchruns(
        "master_addr",
        TRANSLATED,
        "Where the lighthouse is, for the static backend. Workers get the `MASTER_ADDR` of their store, a new one for "
        "each round.",
        "Address of node 0, for the static backend.",
        "127.0.0.1",
    ),
    _of_kind(
        Kind.INTEGER,
        torchruns("master_port", TRANSLATED, "As `--master-addr`; 29500 by default.", "Port on node 0, likewise."),
        None,
    ),
    torchruns(
        "local_addr",
        HONOURED,
        "By default the address of this node's link to the lighthouse.",
        "Where others reach this node.",
        None,
    ),
)
WORKERS = (
    _of_kind(
        Kind.INTEGER,
        torchruns("max_restarts", HONOURED, "A budget of the job.", "Restarts before giving up."),
        0,
    ),
    _of_kind(
        Kind.NUMBER,
        torchruns(
            "monitor_interval", TRANSLATED, "Nothing is polled: deaths are noticed as they happen.", "Not needed."
        ),
        0.1,
    ),
    _of_kind(
        Kind.TEXT,
        torchruns(
            "start_method",
            TRANSLATED,
            "No effect on scripts, as under torchrun; `--no-template` chooses new interpreters over forks.",
            "Not needed.",
        ),
        "spawn",
        choices=("spawn", "fork", "forkserver"),
    ),
    torchruns("role", HONOURED, "", "Role of the workers.", "default"),
    torchruns("module", HONOURED, "", "The script is a module, as of `python -m`.", False, short="-m"),
    torchruns("no_python", HONOURED, "", "The script is any program; run it as it is.", False),
    torchruns(
        "run_path",
        TRANSLATED,
        "A script is run as a script. Wins over `--no-python` and `-m`, as there.",
        "Run the script by its path.",
        False,
    ),
    torchruns("virtual_local_rank", HONOURED, "", "LOCAL_RANK is 0, and each worker sees its own device alone.", False),
    _of_kind(
        Kind.TEXT,
        torchruns(
            "numa_binding",
            REFUSED,
            "Start a program that binds itself: `--no-python numactl ... python script.py`, or `os.sched_setaffinity` "
            "in the script.",
            "Bind workers to the CPUs near their devices.",
            env=False,
        ),
        None,
        choices=("node", "socket", "exclusive", "core-complex"),
    ),
    torchruns(
        "signals_to_handle",
        HONOURED,
        "",
        "Signals that are passed on to the workers.",
        "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    ),
    _of_kind(
        Kind.INTEGER,
        torchruns(
            "shutdown_timeout",
            HONOURED,
            "By default `TORCH_ELASTIC_SHUTDOWN_TIMEOUT`, else 30.",
            "Seconds from the first signal to SIGKILL.",
        ),
        None,
    ),
)
LOGS = (
    torchruns("log_dir", HONOURED, "", "Folder of the workers' logs.", None),
    torchruns("redirects", HONOURED, "", "Streams that go to files: 0 to 3, or RANK:0-3,RANK:0-3.", "0", short="-r"),
    torchruns("tee", HONOURED, "", "Streams that go to files and the console.", "0", short="-t"),
    torchruns("local_ranks_filter", HONOURED, "", "Whose output the console shows, RANK,RANK.", ""),
    _of_kind(
        Kind.LIST,
        torchruns("duplicate_stdout_filters", HONOURED, "", "Lines of stdout with one of these go to a file too."),
        (),
        escapes_commas=True,
    ),
    _of_kind(
        Kind.LIST,
        torchruns("duplicate_stderr_filters", HONOURED, "", "The same of stderr."),
        (),
        escapes_commas=True,
    ),
    torchruns(
        "logs_specs",
        REFUSED,
        "Use `--log-dir`, `--redirects`, `--tee` and the filters.",
        "Plug-in of the logs.",
        None,
        env=False,
    ),
    torchruns(
        "event_log_handler",
        REFUSED,
        "Any but `null`: what happens is told by `everstep events`.",
        "Plug-in of the agent's events.",
        "null",
    ),
)
TORCHRUN_OPTIONS: tuple[Option, ...] = (*SIZE, *MEETING, *WORKERS, *LOGS)
