"""The commands of the examples' READMEs, as they stand there, all jobs at once on one lighthouse."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep import subscribe_events
from everstep.config import LighthouseSettings
from everstep.core.events import EventKind
from everstep.lighthouse.app import Lighthouse

ROOT = Path(__file__).parent.parent
DEADLINE_S = 90.0
PROACTIVE = ROOT / "examples" / "ddp_proactive" / "README.md"
LIVE = ROOT / "examples" / "live_recovery" / "README.md"


def commands(readme: Path) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL)


class Shell:
    """A user's shell with one block of commands in it."""

    def __init__(self, commands: str, address: str, job: str, out: Path, **env: str) -> None:
        assert "localhost:29520" in commands
        self.path = out
        self.address = address
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ = os.environ | {
            "PATH": path,
            "EVERSTEP_JOB_ID": job,
            "PYTHONUNBUFFERED": "1",
        }
        with out.open("wb") as file:
            self.process = subprocess.Popen(
                ["bash", "-euc", commands.replace("localhost:29520", address)],
                cwd=ROOT,
                env=environ | env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> str:
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.text}") from None
        return self.text

    @property
    def text(self) -> str:
        return self.path.read_text(errors="replace")

    def end(self) -> None:
        """Also a process that stopped itself."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Shell]]]:
    path = tmp_path_factory.mktemp("examples")
    lighthouse, first, second = commands(PROACTIVE)
    assert lighthouse == "everstep lighthouse\n"
    assert second.endswith("--fail leave\n")
    shells: dict[str, list[Shell]] = {}
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as running:
        try:
            for how, proactive in (("leave", "1"), ("die", "1"), ("die", "0"), ("stop", "1"), ("stop", "0")):
                job = f"{how}-{proactive}"
                blocks = [first, second.replace("--fail leave", f"--fail {how}")]
                shells[job] = [
                    Shell(block, running.address, job, path / f"{job}-{i}", EVERSTEP_PROACTIVE_RECOVERY=proactive)
                    for i, block in enumerate(blocks)
                ]
            _, *blocks, drawn = commands(LIVE)
            shells["live"] = [
                Shell(block, running.address, "live", path / f"live-{i}") for i, block in enumerate(blocks)
            ]
            for transport in ("http", "process_group"):
                block = drawn.replace("--state-gib 1", f"--state-gib 0.125 --transport {transport}")
                block = block.replace("gigabyte", transport).replace("step_times", f"{path}/{transport}")
                shells[transport] = [Shell(block, running.address, "set by the block", path / transport)]
            yield shells
        finally:
            for shell in (shell for pair in shells.values() for shell in pair):
                shell.end()


def pause_after_step_3(text: str) -> float:
    """Seconds until step 4, as the example says it; 0 when it is under half a second."""
    (said,) = re.findall(r"step 4 committed by . groups, loss [\d.]+(?:, ([\d.]+) s after the last)?\n", text)
    return float(said or 0)


def expect(text: str, *parts: str) -> None:
    for part in parts:
        assert re.search(part, text), f"no {part!r} in\n{text}"
    assert "Traceback" not in text, text


@pytest.mark.soak
def test_a_group_that_leaves_takes_part_in_one_more_vote_and_disturbs_nobody(outputs: dict[str, list[Shell]]) -> None:
    stays, leaves = (shell.wait() for shell in outputs["leave-1"])
    assert [shell.process.returncode for shell in outputs["leave-1"]] == [0, 0]
    expect(
        stays, "listener started", "adopted quorum=1.2 members=1", "step 8 committed by 1 groups", "listener stopped"
    )
    expect(leaves, "this group is going to leave", "left quorum=1.2", "listener stopped")
    assert "notice" not in stays
    assert "failed in quorum" not in stays


@pytest.mark.soak
@pytest.mark.parametrize("proactive", ["1", "0"])
def test_a_group_that_dies_costs_the_other_no_step(outputs: dict[str, list[Shell]], proactive: str) -> None:
    text = outputs[f"die-{proactive}"][0].wait()
    expect(
        text, "listener: group 1 failed in quorum 1.1", "granted round=1/1 quorum=1.2", "step 8 committed by 1 groups"
    )
    assert "not committed" not in text
    assert pause_after_step_3(text) < 3.0


@pytest.mark.soak
def test_a_stopped_group_is_given_up_after_the_heartbeat_timeout(outputs: dict[str, list[Shell]]) -> None:
    text = outputs["stop-1"][0].wait()
    expect(text, "notice round=1/1 cause=silent", "nothing heard for 2 s", "step 8 committed by 1 groups")
    assert 1.0 < pause_after_step_3(text) < 5.0


@pytest.mark.soak
def test_without_proactive_recovery_it_takes_the_collectives_timeout(outputs: dict[str, list[Shell]]) -> None:
    text = outputs["stop-0"][0].wait()
    expect(text, "notice put off round=1/1 cause=silent", "nothing heard for 2 s", "step 8 committed by 1 groups")
    assert 9.0 < pause_after_step_3(text) < 20.0


@pytest.mark.soak
def test_a_group_that_comes_ten_seconds_later_takes_the_state_over(outputs: dict[str, list[Shell]]) -> None:
    early, late = (shell.wait() for shell in outputs["live"])
    assert [shell.process.returncode for shell in outputs["live"]] == [0, 0]
    expect(early, r"offering step=[1-9]\d* to=1#2", "adopted quorum=1.2 members=2")
    expect(late, r"state_from=0#1", r"recovered step=[1-9]\d* from=0#1", "all digests verified")
    ends = [re.findall(r"the end: (.*)", text) for text in (early, late)]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 1


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "names"), [("http", {"http", "memory"}), ("process_group", {"process_group"})])
def test_the_step_times_around_the_join_are_drawn_and_the_lighthouse_has_seen_the_recovery(
    outputs: dict[str, list[Shell]], transport: str, names: set[str]
) -> None:
    (shell,) = outputs[transport]
    text = shell.wait()
    assert shell.process.returncode == 0, text
    ends = re.findall(r"the end: (.*)", text)
    assert len(ends) == 2
    assert ends[0] == ends[1]
    assert shell.path.with_name(f"{transport}.png").read_bytes().startswith(b"\x89PNG\r\n")
    with subscribe_events(lighthouse=shell.address, job_id=transport, after="oldest", follow=False) as events:
        (ended,) = [event for event in events if event.kind is EventKind.RECOVERY_ENDED]
    assert (ended.member, ended.donors, ended.outcome) == ("1#2", ("0#1",), "done")
    assert ended.done_bytes == ended.total_bytes > 1 << 27
    assert set(ended.transport.split("+")) <= names
