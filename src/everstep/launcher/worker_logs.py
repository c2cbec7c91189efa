"""What workers write: to the console, to files, to both with a prefix; with torchrun's options and file names.

    LOG_DIR/JOB_xxxx/[group_ID/]attempt_N/LOCAL_RANK/{stdout.log,stderr.log,error.json}
    LOG_DIR/JOB_xxxx/[group_ID/]attempt_N/filtered_{stdout,stderr}.log

N counts restarts after failures, as torchrun's. An attempt that begins without one (nodes came or went) goes on in the
same files; torchrun begins them anew.

Streams that are redirected go through a pipe to this process and from here into the file. A worker whose file were its
own stdout would end with an OSError when the disk is full; so it only loses its log, which is said once. One thread
serves all pipes. A worker that writes faster than the disk takes it waits, once the pipe is full.
"""

import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import selectors
import string
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from everstep.launcher.settings import JobSettings, Streams

__all__ = ["AttemptLogs", "Pump", "WorkerFiles", "WorkerLogs"]

CHUNK_BYTES = 1 << 16
PIPE_BYTES = 1 << 20
LINE_BYTES_MAX = 1 << 16  # of a line that is shown; the rest is shown as another one
DRAIN_S = 2.0  # for what ended workers have written to come through

log = logging.getLogger("everstep.launcher")
_LINE = re.compile(rb"\r\n|\r|\n")


class WorkerLogs:
    """Of one run of an agent. Context manager; `folder` is None where nothing is written (`--log-dir /dev/null`).

    What nobody has asked for, error files, whose content is printed, is in `scratch`, and goes with that.
    """

    def __init__(self, settings: JobSettings, scratch: Path) -> None:
        self._settings = settings
        self._scratch = scratch
        self._pump = Pump()
        self._is_off = settings.log_dir is not None and str(settings.log_dir) == os.devnull
        self.folder: Path | None = None

    def __enter__(self) -> "WorkerLogs":
        if not self._is_off:
            try:
                self.folder = self._make_folder()
            except OSError as error:
                log.warning("no log directory: %s; workers' output goes to the console, tracebacks are lost", error)
        if self._writes_files and self.folder is not None:
            log.info("log directory set to: %s", self.folder)
        self._pump.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pump.close()

    def attempt(self, group: str, restarts: int, ranks: Mapping[int, int]) -> "AttemptLogs":
        """For workers that are about to start; `ranks`: their ranks by local rank."""
        return AttemptLogs(self._settings, self._pump, self._attempt_folder(group, restarts), ranks)

    @property
    def _writes_files(self) -> bool:
        settings = self._settings
        return any(settings.redirects) or any(settings.tee)

    def _make_folder(self) -> Path:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self._settings.job_id)
        if self._settings.log_dir is None:
            return Path(tempfile.mkdtemp(prefix=f"everstep_{name}_", dir=None if self._writes_files else self._scratch))
        self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}_", dir=self._settings.log_dir))

    def _attempt_folder(self, group: str, restarts: int) -> Path | None:
        if self.folder is None:
            return None
        parent = self.folder / f"group_{group.replace('/', '_')}" if group else self.folder
        return parent / f"attempt_{restarts}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerFiles:
    """What one worker gets: descriptors (None: the agent's own stream), and where `@record` writes ("": nowhere)."""

    stdout: int | None = None
    stderr: int | None = None
    error_file: str = ""


class AttemptLogs:
    """Of one start of a group's workers: `files` for each, `started` once they run, `finish` when they are gone."""

    def __init__(self, settings: JobSettings, pump: "Pump", folder: Path | None, ranks: Mapping[int, int]) -> None:
        self._settings = settings
        self._pump = pump
        self._folder = folder
        self._ranks = ranks
        self._ours: list[int] = []  # write ends, until the workers have theirs
        self._streams: list[_Stream] = []
        self._filtered: dict[str, _File] = {}

    def files(self, local_rank: int) -> WorkerFiles:
        folder = self._make_folder(local_rank)
        settings = self._settings
        tee = settings.tee[local_rank] if settings.tee else Streams.NONE
        redirect = settings.redirects[local_rank] if settings.redirects else Streams.NONE
        is_shown = settings.local_ranks_filter is None or local_rank in settings.local_ranks_filter
        found: dict[str, int | None] = {}
        for name, stream, console in (("stdout", Streams.OUT, 1), ("stderr", Streams.ERR, 2)):
            is_tee = bool(tee & stream)
            if folder is not None and (is_tee or redirect & stream):
                target = _File(folder / f"{name}.log")
                found[name] = self._pipe(
                    _Stream(
                        target,
                        console if is_tee and is_shown else None,
                        self._prefix(local_rank),
                        self._filter(name, is_tee),
                    )
                )
            else:
                found[name] = None if is_shown else self._devnull()
        error_file = folder / "error.json" if folder is not None else None
        if error_file is not None:
            error_file.unlink(missing_ok=True)
        return WorkerFiles(stdout=found["stdout"], stderr=found["stderr"], error_file=str(error_file or ""))

    def started(self) -> None:
        """The workers have their ends of the pipes: let go of ours."""
        for fd in self._ours:
            os.close(fd)
        self._ours.clear()

    def finish(self) -> None:
        """Let through what ended workers have written; a process that one of them left behind is not waited for."""
        self.started()
        self._pump.finish(self._streams)
        for file in self._filtered.values():
            file.close()

    def _make_folder(self, local_rank: int) -> Path | None:
        if self._folder is None:
            return None
        folder = self._folder / str(local_rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("no logs of local rank %d: %s", local_rank, error)
            return None
        return folder

    def _prefix(self, local_rank: int) -> bytes:
        settings = self._settings
        if settings.log_line_prefix:
            fields = {"role_name": settings.role, "rank": self._ranks[local_rank], "local_rank": local_rank}
            return string.Template(settings.log_line_prefix).safe_substitute(fields).encode()
        return f"[{settings.role}{local_rank}]:".encode()

    def _filter(self, name: str, is_tee: bool) -> "_Filter | None":
        words = getattr(self._settings, f"duplicate_{name}_filters")
        if not words or not is_tee or self._folder is None:
            return None
        file = self._filtered.setdefault(name, _File(self._folder / f"filtered_{name}.log"))
        return _Filter(file, tuple(word.encode() for word in words))

    def _pipe(self, stream: "_Stream") -> int:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # beyond what this user may have: the usual size does
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(ours, False)
        stream.fd = ours
        self._ours.append(theirs)
        self._streams.append(stream)
        self._pump.add(stream)
        return theirs

    def _devnull(self) -> int:
        fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._ours.append(fd)
        return fd


class _File:
    """A log file that may fail: then it is said once, and what would follow is let go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._fail(error)

    def write(self, data: bytes) -> None:
        try:
            while data and self._fd >= 0:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fail(self, error: OSError) -> None:
        log.warning("log file given up, training goes on: %s: %s", self._path, error.strerror)
        self.close()


@dataclasses.dataclass(frozen=True)
class _Filter:
    """Lines with one of the words go to this file, too."""

    file: _File
    words: tuple[bytes, ...]


class _Stream:
    """One of a worker's streams, from its pipe to the file, and to the console if there is one."""

    def __init__(self, file: _File, console: int | None, prefix: bytes, lines: _Filter | None) -> None:
        self.fd = -1
        self._file = file
        self._console = console
        self._prefix = prefix
        self._filter = lines
        self._rest = b""

    def read(self) -> bool:
        """Whether there may be more; False: the other end is closed."""
        try:
            chunk = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return True
        if chunk:
            self._file.write(chunk)
            if self._console is not None or self._filter is not None:
                self._show(chunk)
        return bool(chunk)

    def end(self) -> None:
        if self._rest:
            self._show(b"\n")
        self._file.close()
        os.close(self.fd)

    def _show(self, chunk: bytes) -> None:
        text = self._rest + chunk
        # A carriage return at the end may be half of a line's end.
        held = b"\r" if text.endswith(b"\r") else b""
        *lines, rest = _LINE.split(text[: len(text) - len(held)])
        if len(rest) > LINE_BYTES_MAX:
            lines, rest = [*lines, rest], b""
        self._rest = rest + held
        shown = b"".join(self._prefix + line + b"\n" for line in lines)
        if self._console is not None:
            _write_console(self._console, shown)
        if self._filter is not None:
            found = (line for line in lines if any(word in line for word in self._filter.words))
            self._filter.file.write(b"".join(self._prefix + line + b"\n" for line in found))


def _write_console(fd: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # whoever read it has gone: training goes on
        while data:
            data = data[os.write(fd, data) :]


class Pump:
    """Reads the pipes of all workers, on a thread of its own."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Condition()
        self._streams: dict[int, _Stream] = {}
        self._wake, self._woken = -1, -1
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="everstep-logs", daemon=True)

    def start(self) -> None:
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()

    def add(self, stream: _Stream) -> None:
        with self._lock:
            self._streams[stream.fd] = stream
            self._selector.register(stream.fd, selectors.EVENT_READ, stream)
        self._poke()

    def finish(self, streams: list[_Stream]) -> None:
        """Until all of them have ended; those that do not in time are cut off."""
        with self._lock:
            self._lock.wait_for(lambda: not any(s is self._streams.get(s.fd) for s in streams), DRAIN_S)
            for stream in streams:
                if self._streams.get(stream.fd) is stream:
                    self._drop(stream)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._poke()
        self._thread.join(DRAIN_S)
        with self._lock:
            for stream in tuple(self._streams.values()):
                self._drop(stream)
        self._selector.close()
        os.close(self._woken)
        os.close(self._wake)

    def _poke(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def _drop(self, stream: _Stream) -> None:
        del self._streams[stream.fd]
        self._selector.unregister(stream.fd)
        stream.end()
        self._lock.notify_all()

    def _run(self) -> None:
        while True:
            ready = self._selector.select()
            with self._lock:
                if self._is_closed:
                    return
                for key, _ in ready:
                    stream = key.data
                    if not isinstance(stream, _Stream):
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._woken, 4096)
                    elif self._streams.get(stream.fd) is stream and not stream.read():
                        self._drop(stream)
