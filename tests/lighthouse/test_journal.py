"""The journal: what it holds survives any crash; damage and misuse are said, with a remedy."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.messages import JournalRecord
from everstep.core.types import Member, MemberId, Quorum, QuorumId
from everstep.errors import ConfigError
from everstep.lighthouse.journal import COMPACT_BYTES, Journal, StateDir
from tests.support.processes import Spawner

HOLDER = """
import sys
from pathlib import Path
from everstep.lighthouse.journal import StateDir
directory = StateDir(Path(sys.argv[1]))
directory.open()
print("locked")
sys.stdin.readline()
"""


def record(epoch: int, job_id: str = "job", members: int = 2) -> JournalRecord:
    quorum = Quorum(QuorumId(epoch, 1), tuple(Member(MemberId(str(n), n + 1)) for n in range(members)))
    return JournalRecord(job_id=job_id, lighthouse="lh", epoch=epoch, incarnation_limit=1000, current=quorum)


def written(path: Path, *records: JournalRecord) -> bytes:
    journal = Journal(path, "job")
    journal.load()
    for each in records:
        journal.append(each)
    journal.close()
    return path.read_bytes()


def test_the_last_record_is_what_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert Journal(path, "job").load() is None
    written(path, record(1), record(2))
    written(path, record(3))
    assert Journal(path, "job").load() == record(3)


def test_a_tail_torn_at_any_byte_leaves_the_record_before_it_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    one = written(path, record(1))
    two = written(path, record(2))
    assert two.startswith(one)
    for length in range(len(one), len(two)):
        path.write_bytes(two[:length])
        journal = Journal(path, "job")
        assert journal.load() == record(1)
        assert journal.torn_bytes == length - len(one)
        journal.append(record(9))
        journal.close()
        assert Journal(path, "job").load() == record(9)
        path.unlink()


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096])
def test_a_tail_of_zeros_is_a_torn_one(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(written(path, record(1)) + tail)
    assert Journal(path, "job").load() == record(1)


def test_a_file_torn_in_its_first_line_is_an_empty_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for content in (b"", b"everstep jour", b"\0" * 100):
        path.write_bytes(content)
        journal = Journal(path, "job")
        assert journal.load() is None
        journal.append(record(1))
        journal.close()
        assert Journal(path, "job").load() == record(1)


def test_damage_before_the_tail_is_said_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    one = written(path, record(1))
    whole = written(path, record(2))
    for at in range(len(b"everstep journal 1\n"), len(one)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"damaged at byte 19 .* Restore the file"):
            Journal(path, "job").load()
        assert path.read_bytes() == damaged


@given(at=st.integers(0, 400), bit=st.integers(0, 7))
def test_no_single_flipped_bit_makes_another_record(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    written(path, record(1))
    content = bytearray(written(path, record(2)))
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = Journal(path, "job").load()
    except ConfigError:
        return
    assert found in (None, record(1), record(2))


def test_a_file_of_another_format_is_refused_with_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"everstep journal 7\nwhatever")
    with pytest.raises(ConfigError, match=r"everstep journal 7.*run the release"):
        Journal(path, "job").load()


def test_another_jobs_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "job")
    journal.append(record(1, job_id="another"))
    journal.close()
    with pytest.raises(ConfigError, match="belongs to job 'another'"):
        Journal(path, "job").load()


def test_a_long_journal_is_compacted_and_remembers_the_same(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "job")
    epoch = 0
    sizes = []
    for epoch in range(1, 60):
        journal.append(record(epoch, members=2000))
        sizes.append(path.stat().st_size)
    journal.close()
    assert max(sizes) <= COMPACT_BYTES
    assert any(later < earlier for earlier, later in pairwise(sizes))
    assert Journal(path, "job").load() == record(epoch, members=2000)
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_after_a_failed_write_the_next_one_starts_a_new_file(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    path = folder / "j"
    journal = Journal(path, "job")
    journal.append(record(1))
    blocker = folder / "j.new"
    blocker.mkdir()  # a compaction cannot put its file here
    journal.close()
    path.unlink()
    with pytest.raises(OSError):
        journal.append(record(2))
    with pytest.raises(OSError):
        journal.append(record(2))
    blocker.rmdir()
    journal.append(record(3))
    journal.close()
    assert Journal(path, "job").load() == record(3)


def test_any_job_id_has_a_file_of_its_own_inside_the_directory(tmp_path: Path) -> None:
    names = ["job", "Job", "JOB", "a/b", "..", ".", "a%2Fb", "größe", "x" * 128, "x" * 127 + "y", "語" * 128, "a b"]
    directory = StateDir(tmp_path / "state")
    directory.open()
    for name in names:
        journal = directory.journal(name)
        journal.append(record(1, job_id=name))
        journal.close()
    files = [p for p in (tmp_path / "state").rglob("*") if p.suffix == ".journal"]
    assert len({str(p).lower() for p in files}) == len(names)
    assert all(p.parent == tmp_path / "state" for p in files)
    directory.check()
    for name in names:
        assert directory.journal(name).load() == record(1, job_id=name)
    directory.close()


def test_a_renamed_journal_is_found_at_the_start(tmp_path: Path) -> None:
    directory = StateDir(tmp_path)
    directory.open()
    journal = directory.journal("job")
    journal.append(record(1))
    journal.close()
    (tmp_path / "job-job.journal").rename(tmp_path / "job-other.journal")
    with pytest.raises(ConfigError, match=r"whose file is job-job\.journal"):
        directory.check()
    directory.close()


def test_a_second_lighthouse_on_the_directory_is_refused_until_the_first_is_dead(
    tmp_path: Path, spawn: Spawner
) -> None:
    holder = spawn(["-c", HOLDER, str(tmp_path)])
    holder.expect_line("locked")
    with pytest.raises(ConfigError, match="in use by another lighthouse"):
        StateDir(tmp_path).open()
    holder.kill()
    holder.wait()
    directory = StateDir(tmp_path)
    directory.open()
    directory.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/state cannot be used: Not a directory"):
        StateDir(tmp_path / "file" / "state").open()
