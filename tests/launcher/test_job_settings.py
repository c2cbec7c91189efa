"""What an agent is told for what a user types."""

import signal
from pathlib import Path

import pytest

from everstep.core.policies import RestartPolicyName
from everstep.core.ranks import RankPolicy
from everstep.errors import ConfigError
from everstep.launcher.settings import JobSettings, Streams
from everstep.launcher.starting import RunAs
from tests.launcher.typed import TOKEN, settings


def where(found: JobSettings) -> tuple[str | None, bool, bool, str, int]:
    return (
        found.lighthouse,
        found.hosts_lighthouse,
        found.hosts_only_if_free,
        found.lighthouse_bind,
        found.lighthouse_port,
    )


ALONE = (None, True, False, "127.0.0.1", 0)


def test_a_bare_script_runs_alone_on_this_machine_as_under_torchrun() -> None:
    found = settings("train.py --lr 1")
    assert (found.run_as, found.target, found.args) == (RunAs.SCRIPT, "train.py", ("--lr", "1"))
    assert (found.min_nodes, found.max_nodes, found.nproc_per_node, found.max_restarts) == (1, 1, 1, 0)
    assert where(found) == ALONE
    assert (found.replica_groups, found.restart_policy) == ((), RestartPolicyName.ANY_FAILED)
    assert (found.role, found.shutdown_timeout_s, found.node_id) == ("default", 30, "here_7")
    assert found.signals_to_handle == (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    assert found.use_template
    assert found.job_id != settings("train.py --lr 1").job_id, "nobody else is meant"


# ---- what to run


@pytest.mark.parametrize(
    ("line", "run_as"),
    [
        ("-m a.b", RunAs.MODULE),
        ("--no-python ls", RunAs.COMMAND),
        ("--run-path /a.py", RunAs.SCRIPT),
        ("--run-path --no-python /a.py", RunAs.SCRIPT),
    ],
)
def test_how_the_script_is_run(line: str, run_as: RunAs) -> None:
    assert settings(line).run_as is run_as


def test_a_program_and_another_interpreter_need_no_template() -> None:
    assert not settings("--no-python ls").use_template
    assert not settings("--no-template x.py").use_template
    other = settings("x.py", {"PYTHON_EXEC": "/opt/python"})
    assert (other.python, other.use_template) == ("/opt/python", False)


# ---- where nodes meet


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--standalone x.py", ALONE),
        ("--nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0 x.py", ALONE),
        ("--rdzv-backend c10d x.py", ("http://localhost:29400", True, True, "127.0.0.1", 29400)),
        (
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:5 x.py",
            ("http://127.0.0.1:5", True, True, "127.0.0.1", 5),
        ),
        (
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint here x.py",
            ("http://here:29400", True, True, "0.0.0.0", 29400),
        ),
        (
            "--nnodes 2 --rdzv-backend everstep --rdzv-endpoint there x.py",
            ("http://there:29520", False, False, "0.0.0.0", 29520),
        ),
        (
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint there:1 --rdzv-conf is_host=1 x.py",
            ("http://there:1", True, False, "0.0.0.0", 1),
        ),
        (
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint here:1 --rdzv-conf is_host=false x.py",
            ("http://here:1", False, False, "0.0.0.0", 1),
        ),
        (
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint [fd00::1]:5 x.py",
            ("http://[fd00::1]:5", False, False, "::", 5),
        ),
        (
            "--nnodes 2 --master-addr there --node-rank 0 x.py",
            ("http://there:29500", True, False, "0.0.0.0", 29500),
        ),
        (
            "--nnodes 2 --master-addr here --master-port 9 --node-rank 1 x.py",
            ("http://here:9", False, False, "0.0.0.0", 9),
        ),
        ("--nnodes 2 --master-addr here x.py", ("http://here:29500", True, True, "0.0.0.0", 29500)),
        ("--nnodes 2 --rdzv-endpoint there:8 --node-rank 1 x.py", ("http://there:8", False, False, "0.0.0.0", 8)),
        ("--master-port 9 x.py", ("http://127.0.0.1:9", True, True, "127.0.0.1", 9)),
        ("--lighthouse there:8 --nnodes 4 x.py", ("http://there:8", False, False, "127.0.0.1", 0)),
        ("--lighthouse https://there --standalone x.py", ("https://there", False, False, "127.0.0.1", 0)),
        (
            "--nnodes 2 --rdzv-backend everstep --rdzv-endpoint https://there:1 x.py",
            ("https://there:1", False, False, "127.0.0.1", 0),
        ),
    ],
)
def test_who_has_the_lighthouse_and_who_connects(line: str, expected: tuple[str | None, bool, bool, str, int]) -> None:
    assert where(settings(line, TOKEN)) == expected


def test_a_lighthouse_of_the_environment_is_where_a_standalone_group_meets() -> None:
    found = settings("--standalone x.py", {"EVERSTEP_LIGHTHOUSE": "there:1", "REPLICA_GROUP_ID": "3"})
    assert (found.lighthouse, found.hosts_lighthouse, found.replica_groups) == ("http://there:1", False, ("3",))


def test_a_world_of_one_node_is_not_open_to_the_network() -> None:
    found = settings("--rdzv-backend c10d --rdzv-endpoint here:5 x.py")
    assert where(found) == ("http://127.0.0.1:5", True, True, "127.0.0.1", 5)


def test_a_lighthouse_that_is_open_to_the_network_needs_a_token() -> None:
    line = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint here:5 x.py"
    with pytest.raises(ConfigError, match=r"open to the network, and there is no job token.*EVERSTEP_TOKEN_FILE"):
        settings(line)
    assert settings(line, TOKEN).token == TOKEN["EVERSTEP_TOKEN"].encode()
    assert "a token" not in repr(settings(line, TOKEN))


def test_workers_inherit_the_environment_and_where_the_token_is(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("a token of a job")
    found = settings(f"--lighthouse there --token-file {token} --rdzv-conf tls_ca=/ca.pem x.py", {"A": "b"})
    assert found.environment == {"A": "b", "EVERSTEP_TOKEN_FILE": str(token), "EVERSTEP_TLS_CA": "/ca.pem"}
    assert (found.token, found.tls_ca) == (b"a token of a job", Path("/ca.pem"))


def test_the_job_is_the_rdzv_id_else_the_variable_else_default() -> None:
    line = "--nnodes 2 --lighthouse there {} x.py"
    assert settings(line.format("--rdzv-id a"), {"EVERSTEP_JOB_ID": "b"}).job_id == "a"
    assert settings(line.format(""), {"EVERSTEP_JOB_ID": "b"}).job_id == "b"
    assert settings(line.format("")).job_id == "default"


def test_rdzv_conf_has_the_keys_of_the_handler_and_torchs_own_do_no_harm() -> None:
    conf = "join_timeout=7,last_call_timeout=0.5,close_timeout=3,connect_timeout=4,node_id=n1,group=g,read_timeout=9"
    found = settings(f"--nnodes 1:2 --lighthouse there --rdzv-conf {conf},topology=rack,topology_size=2 x.py")
    assert (found.join_timeout_s, found.last_call_s, found.close_timeout_s, found.connect_timeout_s) == (7, 0.5, 3, 4)
    assert (found.node_id, found.rendezvous_group, found.domain, found.domain_size) == ("n1", "g", "rack", 2)
    assert settings("--rdzv-conf timeout=60 x.py").join_timeout_s == 60
    assert settings("--rdzv-conf timeout=900 x.py").join_timeout_s == 600


# ---- replica groups


@pytest.mark.parametrize(
    ("line", "environ", "expected"),
    [
        ("x.py", {}, ()),
        ("--replica-groups 1 x.py", {}, ("0",)),
        ("--replica-groups 3 x.py", {}, ("0", "1", "2")),
        ("--replica-group-id a x.py", {}, ("a",)),
        ("x.py", {"REPLICA_GROUP_ID": "5"}, ("5",)),
        ("--replica-groups 2 --lighthouse h --replica-group-id a x.py", {}, ("a-0", "a-1")),
        ("--replica-groups 2 --lighthouse h --node-rank 3 x.py", {}, ("6", "7")),
        ("--replica-groups 2 --lighthouse h x.py", {"SLURM_NODEID": "1"}, ("2", "3")),
        ("--replica-groups 1 --lighthouse h x.py", {"JOB_COMPLETION_INDEX": "4"}, ("4",)),
        ("--replica-groups 1 --lighthouse h x.py", {}, ("here",)),
        ("--replica-groups 2 --lighthouse h x.py", {}, ("here-0", "here-1")),
        ("--replica-groups 1 --nnodes 2 --lighthouse h --node-rank 5 x.py", {}, ("2",)),
        ("--replica-groups 2 --nnodes 2 --lighthouse h --node-rank 2 x.py", {}, ("2", "3")),
    ],
)
def test_what_replica_groups_are_called(line: str, environ: dict[str, str], expected: tuple[str, ...]) -> None:
    found = settings(line, environ)
    assert found.replica_groups == expected
    assert found.restart_policy is (RestartPolicyName.GROUP if expected else RestartPolicyName.ANY_FAILED)


def test_groups_that_are_alone_know_how_many_they_are() -> None:
    assert settings("--replica-groups 3 x.py").replica_groups_total == 3
    assert settings("--replica-groups 3 --lighthouse h x.py").replica_groups_total == 0
    assert settings("--replica-groups 3 --lighthouse h x.py", {"NUM_REPLICA_GROUPS": "6"}).replica_groups_total == 6


def test_devices_are_split_between_groups_and_counted_for_each() -> None:
    found = settings("--replica-groups 2 --nproc-per-node gpu x.py", devices=8)
    assert found.devices == (("0", "1", "2", "3"), ("4", "5", "6", "7"))
    assert found.nproc_per_node == 4
    shared = settings("--replica-groups 3 --share-devices --nproc-per-node auto x.py", devices=8)
    assert (shared.devices, shared.nproc_per_node) == ((), 8)
    assert settings("--replica-groups 3 x.py").devices == ()
    assert settings("--nproc-per-node gpu x.py", devices=8).devices == ()


def test_workers_are_counted_by_devices_else_by_cpus() -> None:
    assert settings("--nproc-per-node auto x.py", devices=2).nproc_per_node == 2
    assert settings("--nproc-per-node auto x.py").nproc_per_node == 6
    assert settings("--nproc-per-node cpu x.py", devices=2).nproc_per_node == 6


# ---- ranks


def test_where_a_nodes_rank_comes_from() -> None:
    def ranks(line: str, environ: dict[str, str] | None = None) -> tuple[RankPolicy, int | None]:
        found = settings(f"--lighthouse h {line} x.py", environ)
        return found.rank_assignment, found.infrastructure_rank

    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NODEID": "2"}
    assert ranks("--nnodes 4") == (RankPolicy.PREVIOUS, None)
    assert ranks("--nnodes 4", slurm) == (RankPolicy.INFRASTRUCTURE, 3)
    assert ranks("--nnodes 2", slurm) == (RankPolicy.PREVIOUS, None), "with spares"
    assert ranks("--nnodes 4 --node-rank 1") == (RankPolicy.INFRASTRUCTURE, 1)
    assert ranks("--nnodes 4 --rank-assignment previous", slurm) == (RankPolicy.PREVIOUS, None)
    assert ranks("--nnodes 4 --rdzv-conf ranks=topology", slurm) == (RankPolicy.TOPOLOGY, None)
    assert ranks("--nnodes 2 --replica-groups 1 --node-rank 5") == (RankPolicy.INFRASTRUCTURE, 1)


# ---- logs, signals and what else there is


def test_streams_are_said_for_all_or_for_each_local_rank() -> None:
    found = settings("--nproc-per-node 3 -r 3 -t 0:1,2:2,12:3 --local-ranks-filter 0,2 --log-dir /logs x.py")
    assert found.redirects == (Streams.ALL,) * 3
    assert found.tee == (Streams.OUT, Streams.NONE, Streams.ERR)
    assert (found.local_ranks_filter, found.log_dir) == (frozenset({0, 2}), Path("/logs"))
    assert settings("--duplicate-stdout-filters a,,b,c x.py").duplicate_stdout_filters == ("a,b", "c")


def test_how_long_and_by_which_signals_workers_are_ended() -> None:
    found = settings("--signals-to-handle SIGUSR1,SIGTERM --shutdown-timeout 5 x.py")
    assert (found.signals_to_handle, found.shutdown_timeout_s) == ((signal.SIGUSR1, signal.SIGTERM), 5)
    assert settings("x.py", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}).shutdown_timeout_s == 9


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("--nnodes 0 x.py", "--nnodes=0: it takes 1 <= MIN"),
        ("--nnodes 3:2 x.py", "1 <= MIN <= MAX"),
        ("--nnodes 1:2:3 x.py", "must be a number of nodes, or MIN:MAX"),
        ("--nproc-per-node 0 x.py", "--nproc-per-node=0 must be"),
        ("--nproc-per-node tpu x.py", "must be a number, auto, gpu or cpu"),
        ("--nproc-per-node xpu x.py", "give the number of workers instead"),
        ("--nproc-per-node gpu x.py", "no CUDA device is visible"),
        ("--max-restarts -1 x.py", "--max-restarts=-1 must be"),
        ("--rdzv-backend etcd x.py", "etcd is not supported: run `everstep lighthouse` and give --lighthouse"),
        ("--rdzv-backend zk x.py", "'zk' is unknown; use one of static, c10d, everstep"),
        ("--nnodes 2 --rdzv-backend c10d x.py", "needs --rdzv-endpoint: HOST:PORT"),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h:0 x.py", "port 0 is for a single node"),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h:99999 x.py", "no port from 0 to 65535"),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 'h h:1' x.py", "is no address"),
        ("--nnodes 2 --rdzv-endpoint h x.py", "has no port"),
        ("--nnodes 2 --standalone x.py", "--standalone is one node, and --nnodes asks for 2"),
        ("--nnodes 2 --master-port 70000 x.py", "are no address"),
        ("--nnodes 2 --lighthouse h --node-rank 2 x.py", "--node-rank=2 is beyond the 2 nodes"),
        ("--node-rank -1 x.py", "--node-rank=-1 must be 0 or more"),
        ("--lighthouse a --rdzv-backend everstep --rdzv-endpoint b x.py", "are two lighthouses"),
        ("--lighthouse ftp://a x.py", "--lighthouse='ftp://a' is no address"),
        ("--rdzv-conf a x.py", "'a' is no KEY=VALUE"),
        ("--rdzv-conf rank_s=a x.py", "did you mean ranks"),
        ("--rdzv-conf store_type=file x.py", "store_type=file is not supported"),
        ("--rdzv-backend c10d --rdzv-conf is_host=maybe x.py", "must be true or false"),
        ("--rank-assignment best x.py", "--rank-assignment='best' is unknown"),
        ("--rank-assignment infrastructure x.py", "needs the node's number"),
        ("--rank-assignment previous --rdzv-conf ranks=topology x.py", "contradict each other"),
        ("--restart-policy none x.py", "use one of any-failed, min-healthy, group"),
        ("--restart-policy group x.py", "needs replica groups"),
        ("--replica-groups -1 x.py", "--replica-groups=-1 must be"),
        ("--replica-groups 0 --replica-group-id a x.py", "leave one of them out"),
        ("--replica-groups 1 --nnodes 1:2 --lighthouse h --node-rank 0 x.py", "must call it by one name"),
        ("--replica-groups 2 --rdzv-conf group=a x.py", "leave it out"),
        ("--replica-groups 4 --num-replica-groups 2 x.py", "is less than the 4 replica groups"),
        ("--replica-group-id ' a' x.py", "printable characters"),
        ("-r 4 x.py", "--redirects='4' is neither 0"),
        ("-t 0:1,1 x.py", "--tee='0:1,1' is neither"),
        ("--local-ranks-filter a x.py", "must be local ranks"),
        ("--signals-to-handle SIGKILL x.py", "'SIGKILL' is no signal that can be handled"),
        ("--signals-to-handle TERM x.py", "'TERM' is no signal"),
        ("--shutdown-timeout -1 x.py", "--shutdown-timeout=-1 must be"),
        ("--preload a-b x.py", "'a-b' is no name of a module"),
        ("-m --no-python x", "contradict each other"),
        ("--numa-binding node x.py", "--numa-binding=node is not supported: start a program that binds itself"),
        ("--logs-specs mine x.py", "use --log-dir"),
        ("--event-log-handler console x.py", "everstep events"),
        ("--token-file /nonexistent x.py", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(line: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        settings(line)


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        ({"SLURM_NODEID": "x"}, "SLURM_NODEID='x' must be a whole number"),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "x"}, "must be whole seconds"),
        ({"PET_NNODES": "x"}, r"--nnodes \(PET_NNODES\)='x'"),
        ({"EVERSTEP_JOB_ID": " "}, "EVERSTEP_JOB_ID"),
    ],
)
def test_a_wrong_variable_is_named_with_what_to_do(environ: dict[str, str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        settings("x.py", environ)


def test_devices_that_cannot_be_split_are_said() -> None:
    with pytest.raises(ConfigError, match=r"1 devices cannot be split between 3 replica groups.*--share-devices"):
        settings("--replica-groups 3 x.py", devices=1)
    for accelerator, wrong in (("hip", "ROCm"), ("cpu", "the installed torch has no CUDA")):
        with pytest.raises(ConfigError, match=wrong):
            settings("--nproc-per-node gpu x.py", accelerator=accelerator)
