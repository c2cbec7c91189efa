"""Stories of a rendezvous, line by line. After a wanted change: `pytest tests/core --rewrite`, and read the diff."""

from pathlib import Path

import pytest

from tests.core.rendezvous_stage import RendezvousStage
from tests.core.story import told_again

TRANSCRIPTS = sorted((Path(__file__).parent / "rendezvous_transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: str(path.stem))
def test_the_rendezvous_still_tells_the_story(path: Path, rewrite: bool) -> None:
    recorded = path.read_text()
    told = told_again(recorded, RendezvousStage().run)
    if rewrite:
        path.write_text(told)
    assert told == path.read_text()


def test_there_are_stories_of_rendezvous() -> None:
    assert len(TRANSCRIPTS) >= 12
