"""What a lighthouse remembers of its jobs over its own death: one append-only file a job.

A file is a line that names the format, then frames: length (4 bytes), checksum of the length (4), checksum of the
payload (8), payload (a JournalRecord in MessagePack). Each record replaces the one before, so only the last counts.

A crash in the middle of an append leaves a torn last frame, which is ignored: what rests on a record is sent only once
`append` has returned. Damage anywhere else is not a crash's doing, and people have to look at it: ConfigError.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import msgspec
import xxhash

from everstep import fork_guard
from everstep.core.messages import JournalRecord
from everstep.errors import ConfigError

COMPACT_BYTES = 1 << 20  # a file above it is rewritten with its last record alone
RECORD_BYTES_MAX = 64 << 20

_FORMAT = b"everstep journal 1\n"
_HEADER = struct.Struct("<IIQ")
_FILE_NAME_BYTES_MAX = 200

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(JournalRecord)


class StateDir:
    """The directory of a lighthouse's journals. While it is open, no other lighthouse can open it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_fd = -1
        self._unguard: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Make the directory if need be, and lock it; raises ConfigError."""
        try:
            self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"state directory {self._path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"state directory {self._path} is in use by another lighthouse: stop that one, or give this one a "
                "directory of its own"
            ) from error
        self._lock_fd = fd
        # A forked child would hold the lock after this process is gone.
        self._unguard = fork_guard.guard(lambda: [self._lock_fd] if self._lock_fd >= 0 else [])

    def close(self) -> None:
        self._unguard()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def journal(self, job_id: str) -> "Journal":
        return Journal(self._path / _file_name(job_id), job_id)

    def check(self) -> None:
        """Read every journal there is; raises ConfigError for the first that its job could not use."""
        for path in sorted(self._path.glob("job-*.journal")):
            record = Journal(path, None).load()
            if record is not None and path.name != _file_name(record.job_id):
                raise _misplaced(path, record.job_id)


class Journal:
    """One job's file. `load` comes first; `append` returns when the record is on disk. One thread at a time."""

    def __init__(self, path: Path, job_id: str | None) -> None:
        self.path = path
        self._job_id = job_id  # None: any
        self._fd = -1
        self._bytes = 0
        self._must_rewrite = True  # the file is missing, or has an end that nothing may follow
        self.torn_bytes = 0  # what `load` ignored at the end

    def load(self) -> JournalRecord | None:
        """The last record, None for a new job; raises ConfigError, having changed nothing."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"journal {self.path} cannot be read: {error.strerror}") from error
        payload, end = self._last_payload(content)
        self.torn_bytes = len(content) - end
        if payload is None:
            return None
        try:
            record = _decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._damaged(end, f"undecodable record: {error}") from error
        if self._job_id is not None and record.job_id != self._job_id:
            raise _misplaced(self.path, record.job_id)
        self._must_rewrite = self.torn_bytes > 0
        self._bytes = len(content)
        return record

    def append(self, record: JournalRecord) -> None:
        """Make it durable. After an OSError the next call writes the file anew: the old one's end is not known."""
        payload = _encoder.encode(record)
        if len(payload) > RECORD_BYTES_MAX:
            raise OSError(f"a record of {len(payload)} bytes exceeds {RECORD_BYTES_MAX}")
        frame = _header_of(payload) + payload
        is_long = self._bytes + len(frame) > COMPACT_BYTES and self._bytes > 2 * len(frame)
        if self._must_rewrite or is_long:
            self._rewrite(frame)
            return
        self._must_rewrite = True
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        _write_all(self._fd, frame)
        os.fdatasync(self._fd)
        self._bytes += len(frame)
        self._must_rewrite = False

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _rewrite(self, frame: bytes) -> None:
        """A new file with this record alone, put in the old one's place."""
        self._must_rewrite = True
        self.close()
        new = self.path.with_name(self.path.name + ".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            _write_all(fd, _FORMAT + frame)
            os.fsync(fd)
            os.rename(new, self.path)
            _sync_directory(self.path.parent)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        self._fd = fd
        self._bytes = len(_FORMAT) + len(frame)
        self._must_rewrite = False

    def _last_payload(self, content: bytes) -> tuple[bytes | None, int]:
        """The last whole frame's payload, and where it ends."""
        if not content.startswith(_FORMAT):
            if _FORMAT.startswith(content) or not content.strip(b"\0"):
                return None, 0  # torn in its first line; nothing was ever sent that rests on it
            raise ConfigError(
                f"{self.path} is no journal of this release of everstep (its first bytes: {content[:24]!r}): run the "
                "release that wrote it, or move the file away to give up that job's memory"
            )
        payload, at = None, len(_FORMAT)
        while at < len(content):
            rest = len(content) - at
            if rest < _HEADER.size:
                break
            length, length_sum, payload_sum = _HEADER.unpack_from(content, at)
            if _length_sum(length) != length_sum:
                if not content[at:].strip(b"\0"):
                    break  # the file had grown, its bytes had not arrived
                raise self._damaged(at, "wrong checksum of a length")
            end = at + _HEADER.size + length
            if end > len(content):
                break
            found = content[at + _HEADER.size : end]
            if xxhash.xxh3_64_intdigest(found) != payload_sum:
                if end == len(content):
                    break
                raise self._damaged(at, "wrong checksum of a record")
            payload, at = found, end
        return payload, at

    def _damaged(self, at: int, what: str) -> ConfigError:
        return ConfigError(
            f"journal {self.path} is damaged at byte {at} ({what}), which no crash of a lighthouse does. Restore the "
            "file from a copy; or stop the members of the job, move the file away and start the job anew from its "
            "checkpoints"
        )


def _file_name(job_id: str) -> str:
    """Safe on every file system, and readable where the id is; other ids never share a name."""
    name = quote(job_id, safe="")
    if len(name) > _FILE_NAME_BYTES_MAX or name != name.lower():
        digest = hashlib.blake2b(job_id.encode(), digest_size=12).hexdigest()
        name = f"{name[: _FILE_NAME_BYTES_MAX - 40].lower()}+{digest}"
    return f"job-{name}.journal"


def _misplaced(path: Path, job_id: str) -> ConfigError:
    return ConfigError(
        f"journal {path} belongs to job {job_id!r}, whose file is {_file_name(job_id)}: give it that name again, or "
        "move it out of the state directory"
    )


def _header_of(payload: bytes) -> bytes:
    return _HEADER.pack(len(payload), _length_sum(len(payload)), xxhash.xxh3_64_intdigest(payload))


def _length_sum(length: int) -> int:
    return xxhash.xxh3_64_intdigest(length.to_bytes(4, "little")) & 0xFFFFFFFF


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
