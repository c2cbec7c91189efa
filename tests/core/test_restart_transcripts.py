"""Stories of a node's restarts. After a wanted change: `pytest tests/core --rewrite`, and read the diff."""

from pathlib import Path

import pytest

from tests.core.restart_stage import RestartStage

TRANSCRIPTS = sorted((Path(__file__).parent / "restart_transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: str(path.stem))
def test_the_node_still_restarts_as_told(path: Path, rewrite: bool) -> None:
    told = _tell(path.read_text())
    if rewrite:
        path.write_text(told)
    assert told == path.read_text()


def test_there_are_stories_of_restarts() -> None:
    assert len(TRANSCRIPTS) >= 10


def _tell(recorded: str) -> str:
    stage, lines = RestartStage(), []
    for line in recorded.splitlines():
        if line.startswith("> "):
            lines.append("\n".join(filter(None, [line, stage.run(line[2:])])))
        elif line.startswith("#") or not line:
            lines.append(line)
    return "\n".join(lines) + "\n"
