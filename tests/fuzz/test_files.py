"""What is read from disk and from the environment: journals, token files, addresses, settings."""

import contextlib
from pathlib import Path

import msgspec
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from everstep.config import job_token, lighthouse_url, manager_settings, read_token_file
from everstep.core.messages import JournalRecord
from everstep.core.types import Member, MemberId, Quorum, QuorumId, in_rank_order
from everstep.errors import ConfigError
from everstep.lighthouse.journal import Journal, StateDir
from tests.fuzz.damage import packed, spoiled
from tests.fuzz.rounds import Fuzz, rounds

RECORDS = tuple(
    JournalRecord(
        "job", "lh", epoch, 1000, "history", Quorum(QuorumId(epoch, 1), (Member(MemberId("a", 1)),)), (), epoch == 2
    )
    for epoch in (1, 2, 3)
)


def written(folder: Path) -> bytes:
    path = folder / "job-job.journal"
    journal = Journal(path, "job")
    journal.load()
    for record in RECORDS:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def framed(payload: bytes) -> bytes:
    """A frame whose checksums are right: for damage inside of a record."""
    length_sum = xxhash.xxh3_64_intdigest(len(payload).to_bytes(4, "little")) & 0xFFFFFFFF
    payload_sum = xxhash.xxh3_64_intdigest(payload)
    head = len(payload).to_bytes(4, "little") + length_sum.to_bytes(4, "little") + payload_sum.to_bytes(8, "little")
    return head + payload


@rounds(120)
def test_a_damaged_journal_is_an_older_record_or_a_config_error(fuzz: Fuzz, tmp_path: Path) -> None:
    valid, path = written(tmp_path), tmp_path / "job-job.journal"

    @given(spoiled(st.just(valid), (valid[:19], valid[60:])))
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        try:
            record = Journal(path, "job").load()
        except ConfigError:
            return
        finally:
            assert path.read_bytes() == content
        assert record is None or record in RECORDS

    fuzz(holds)


@rounds(100)
def test_a_whole_record_of_any_content_is_a_record_or_a_config_error_and_stops_no_start_otherwise(
    fuzz: Fuzz, tmp_path: Path
) -> None:
    head = written(tmp_path)[:19]
    path = tmp_path / "job-job.journal"
    seeds = tuple(map(msgspec.msgpack.encode, RECORDS))

    @given(spoiled(packed(st.from_type(JournalRecord)) | st.sampled_from(seeds), seeds))
    def holds(payload: bytes) -> None:
        path.write_bytes(head + framed(payload))
        for read in (Journal(path, None).load, StateDir(tmp_path).check):
            with contextlib.suppress(ConfigError):
                read()

    fuzz(holds)


@rounds(60)
def test_any_names_have_a_rank_order(fuzz: Fuzz) -> None:
    @given(st.lists(st.text(max_size=128) | st.text("0²³①٣१x", max_size=12), unique=True, max_size=4))
    def holds(names: list[str]) -> None:
        members = [Member(MemberId(name, 1)) for name in names]
        assert in_rank_order(members) == in_rank_order(reversed(members))

    fuzz(holds)


@rounds(40)
def test_a_token_file_of_any_content_is_a_token_or_a_config_error_without_it(fuzz: Fuzz, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(0o600)

    @given(spoiled(st.just(b"a token of twenty-eight bytes\n")) | st.binary(min_size=4000, max_size=5000))
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        complaint = ""
        try:
            assert read_token_file(path) in content
        except ConfigError as error:
            complaint = str(error)
        assert len(content) < 20 or content[:20].decode("latin-1") not in complaint

    fuzz(holds)


def texts(*examples: str) -> st.SearchStrategy[str]:
    """Of an environment variable: bytes that are no UTF-8 arrive as surrogates."""
    damaged = spoiled(st.sampled_from(examples).map(str.encode), (b"://", b"[::1]:", b"@", b"\xff"))
    return damaged.map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))


@rounds(80)
def test_any_address_is_a_url_or_a_config_error(fuzz: Fuzz) -> None:
    @given(texts("host:1234", "http://[::1]:29400/prefix/", "https://lighthouse.example", "10.0.0.7"))
    def holds(text: str) -> None:
        try:
            url = lighthouse_url(text)
        except ConfigError:
            return
        assert url.startswith(("http://", "https://"))
        assert lighthouse_url(url) == url

    fuzz(holds)


@rounds(60)
def test_any_environment_is_settings_or_a_config_error(fuzz: Fuzz) -> None:
    names = {
        "EVERSTEP_LIGHTHOUSE": texts("host:1234", "http://host"),
        "EVERSTEP_JOB_ID": texts("job", "default"),
        "EVERSTEP_TOKEN": texts("a token of twenty-eight bytes"),
        "EVERSTEP_TOKEN_FILE": texts("/nonexistent/token", "."),
        "EVERSTEP_TLS_CA": texts("/etc/ca.pem"),
        "EVERSTEP_PROACTIVE_RECOVERY": texts("1", "no"),
        "REPLICA_GROUP_ID": texts("3", "node-7"),
        "NUM_REPLICA_GROUPS": texts("5", "²", "-1", "9" * 5000),
    }

    @given(st.fixed_dictionaries({}, optional=names))
    def holds(environ: dict[str, str]) -> None:
        for read in (lambda: manager_settings(environ=environ), lambda: job_token(environ=environ)):
            with contextlib.suppress(ConfigError):
                read()

    fuzz(holds)
