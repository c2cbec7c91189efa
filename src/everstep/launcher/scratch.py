"""An agent's temporary folder. It goes with the agent, or, where that is killed, with the next one that starts here.

Whose folder it is says a lock on a file in it, which the kernel lets go when the agent ends, however it ends.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["scratch_folder"]

PREFIX = "everstep-agent-"
OWNER = "owner"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Below TMPDIR; removed at the end of the block."""
    _remove_orphans(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        fd = os.open(folder / f".{OWNER}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nobody removes it but us
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(folder / f".{OWNER}", folder / OWNER)  # not before: it would look like an orphan
            yield folder
        finally:
            os.close(fd)


def _remove_orphans(parent: Path) -> None:
    """Folders of this user's agents that run no more."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(PREFIX):
                _remove_if_orphan(parent / name)


def _remove_if_orphan(folder: Path) -> None:
    try:
        seen = os.lstat(folder)
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
            return
        fd = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # it is gone, or just begins, or is of a version that had no lock
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its agent runs
    finally:
        os.close(fd)
