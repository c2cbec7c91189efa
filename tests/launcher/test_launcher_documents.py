"""What documents and examples say to type is understood, and means what they say it does."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep import cli
from everstep.core.policies import RestartPolicyName
from everstep.exit_codes import ExitCode, of_signal
from everstep.launcher.settings import JobSettings
from tests.launcher.typed import settings, values

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "examples/slurm/train.sbatch"
VARIABLE = re.compile(r"\$\{?(\w+)\}?|\$(\d)")
ENVIRONMENT = {"folder": "/shared", "EVERSTEP_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "4"}
TYPED_IN = [ROOT / name for name in ("docs/launcher.md", "docs/exit-codes.md", "README.md")]


def commands(text: str, name: str) -> list[list[str]]:
    """The words of every `everstep NAME` of a shell script, with its variables replaced."""
    joined = text.replace("\\\n", " ")
    found = re.findall(rf"^(?:[^#\n]*\s)?everstep {name} ([^;|&\n]*)", joined, flags=re.MULTILINE)
    return [shlex.split(VARIABLE.sub(_value, line), comments=True) for line in found]


def _value(match: re.Match[str]) -> str:
    return ENVIRONMENT.get(match[1] or "", "value")


def typed(words: list[str], environ: dict[str, str], devices: int) -> JobSettings:
    return settings(shlex.join(words), environ, devices=devices)


# ---- Slurm


def test_the_sbatch_script_is_one() -> None:
    checked = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, timeout=30, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    directives = re.findall(r"^#SBATCH --([\w-]+)", SBATCH.read_text(), flags=re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "no-kill", "signal"} <= set(directives)


def test_each_gpu_of_the_slurm_job_is_a_group_of_its_own() -> None:
    """The example's model is whole on each rank, and nothing is averaged between the ranks of one group."""
    (words,) = commands(SBATCH.read_text(), "run")
    exported = {"EVERSTEP_LIGHTHOUSE": "node0:29520", "EVERSTEP_JOB_ID": "77", "NUM_REPLICA_GROUPS": "32"}
    for name in exported:
        assert f"export {name}=" in SBATCH.read_text()
    nodes = [
        typed(words, exported | {"SLURM_NODEID": str(n), "SLURM_PROCID": str(n), "SLURM_NTASKS": "4"}, devices=8)
        for n in range(4)
    ]
    assert [node.replica_groups for node in nodes] == [tuple(str(8 * n + i) for i in range(8)) for n in range(4)]
    assert {(node.lighthouse, node.job_id, node.nproc_per_node) for node in nodes} == {("http://node0:29520", "77", 1)}
    assert {node.replica_groups_total for node in nodes} == {32}
    assert {node.restart_policy for node in nodes} == {RestartPolicyName.GROUP}


def test_the_lighthouse_of_the_slurm_job_listens_where_its_agents_look() -> None:
    text = SBATCH.read_text()
    (words,) = commands(text, "lighthouse")
    port = words[words.index("--port") + 1]
    assert f"export EVERSTEP_LIGHTHOUSE=$first:{port}" in text
    assert _flags(words) <= _lighthouse_flags()
    assert "--bind" in words
    assert "export EVERSTEP_TOKEN_FILE=" in text


# ---- Kubernetes


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "examples/kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            assert {"apiVersion", "kind", "metadata", "spec"} <= set(document), path
            found[document["kind"]] = document
    return found


def test_the_lighthouses_probes_ask_its_port_for_its_health(manifests: dict[str, dict[str, Any]]) -> None:
    spec = manifests["Deployment"]["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    (container,) = spec["template"]["spec"]["containers"]
    (port,) = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    words = container["args"]
    assert container["command"] == ["everstep", "lighthouse"]
    assert _flags(words) <= _lighthouse_flags()
    assert words[words.index("--port") + 1] == str(port["containerPort"])
    assert words[words.index("--state-dir") + 1] == container["volumeMounts"][0]["mountPath"]
    (volume,) = spec["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == manifests["PersistentVolumeClaim"]["metadata"]["name"]
    service = manifests["Service"]
    assert service["spec"]["selector"] == spec["selector"]["matchLabels"]
    assert service["spec"]["ports"] == [{"name": "link", "port": port["containerPort"], "targetPort": port["name"]}]


def test_each_job_of_the_set_is_a_replica_group(manifests: dict[str, dict[str, Any]]) -> None:
    (replicated,) = manifests["JobSet"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environ = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert environ["NUM_REPLICA_GROUPS"] == str(replicated["replicas"])
    service = manifests["Service"]
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert environ["EVERSTEP_LIGHTHOUSE"] == address
    by_the_cluster = {"REPLICA_GROUP_ID": "2", "EVERSTEP_TOKEN": "a token of a job", "JOB_COMPLETION_INDEX": "1"}
    words = [word.replace("$(POD_IP)", "10.1.2.3") for word in container["args"]]
    assert container["command"] == ["everstep", "run"]
    found = typed(words, environ | by_the_cluster, devices=container["resources"]["limits"]["nvidia.com/gpu"])
    assert (found.replica_groups, found.replica_groups_total) == (("2",), 4)
    assert found.min_nodes == found.max_nodes == job["completions"] == job["parallelism"]
    assert (found.nproc_per_node, found.lighthouse, found.local_addr) == (8, f"http://{address}", "10.1.2.3")
    assert pod["terminationGracePeriodSeconds"] > found.shutdown_timeout_s
    assert (pod["restartPolicy"], job["completionMode"]) == ("Never", "Indexed")
    failing = next(rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert failing["onExitCodes"]["containerName"] == container["name"]
    assert failing["onExitCodes"]["values"] == [ExitCode.USAGE, ExitCode.CONFIGURATION, ExitCode.DO_NOT_RESTART]


# ---- documents


@pytest.mark.parametrize("path", TYPED_IN, ids=lambda path: path.name)
def test_the_command_lines_of_a_document_are_understood(path: Path) -> None:
    blocks = re.findall(r"^```(?:ba)?sh\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for words in [words for block in blocks for words in commands(block, "run")]:
        assert typed(words, {}, devices=8).target.endswith(".py")


def test_the_configuration_file_of_the_document_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs/launcher.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    path = tmp_path / "job.yaml"
    path.write_text(text)
    found = values(f"--config {path}")
    assert found.text("nnodes") == "1:4"
    assert found.script_args.value == ("--lr", "3e-4")


def test_the_exit_codes_to_start_again_after_are_those_of_the_code() -> None:
    text = (ROOT / "docs/exit-codes.md").read_text()
    (line,) = re.findall(r"does well to do so after\n?\s*(.*?) and signals, and to leave it after (.*?):", text)
    again, leave = ({int(number) for number in re.findall(r"\d+", part)} for part in line)
    assert again == {code for code in ExitCode if code.should_restart}
    assert leave == {code for code in ExitCode if not code.should_restart}
    assert of_signal(9) == 137


def _flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def _lighthouse_flags() -> set[str]:
    names = cli.lighthouse.__annotations__
    return {f"--{name.replace('_', '-')}" for name in names}
