"""Stories of a node's restarts. After a wanted change: `pytest tests/core --rewrite`, and read the diff."""

from pathlib import Path

import pytest

from tests.core.restart_stage import RestartStage
from tests.core.story import told_again

TRANSCRIPTS = sorted((Path(__file__).parent / "restart_transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: str(path.stem))
def test_the_node_still_restarts_as_told(path: Path, rewrite: bool) -> None:
    told = told_again(path.read_text(), RestartStage().run)
    if rewrite:
        path.write_text(told)
    assert told == path.read_text()


def test_there_are_stories_of_restarts() -> None:
    assert len(TRANSCRIPTS) >= 10
