"""Stories told by the machines, line by line. After a wanted change: `pytest tests/core --rewrite`, and read the diff.

A transcript is a list of commands (`> command`, see stage.py), each with what the machines did then; `#` comments.
"""

from pathlib import Path

import pytest

from tests.core.agent_stage import AgentStage
from tests.core.group_stage import GroupStage
from tests.core.stage import Stage
from tests.core.story import told_again

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: str(path.stem))
def test_the_machines_still_tell_the_story(path: Path, rewrite: bool) -> None:
    recorded = path.read_text()
    stage: Stage = GroupStage() if "> ranks" in recorded else AgentStage() if "> agents" in recorded else Stage()
    told = told_again(recorded, stage.run)
    if rewrite:
        path.write_text(told)
    assert told == path.read_text()


def test_there_are_stories() -> None:
    assert len(TRANSCRIPTS) >= 15
