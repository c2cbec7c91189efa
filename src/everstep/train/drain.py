"""SIGTERM as a request to leave: what a cluster sends before it takes a node away."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("everstep")


class DrainOnSigterm:
    """Takes SIGTERM over while it is installed, where nobody else has; a second SIGTERM ends the process as ever."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._is_installed = False
        self._pid = 0

    def install(self) -> None:
        """From the main thread; elsewhere, or where the script handles SIGTERM itself, nothing changes."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            self._is_installed, self._pid = True, os.getpid()

    def remove(self) -> None:
        if self._is_installed and threading.current_thread() is threading.main_thread():
            self._is_installed = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self.remove()
        if os.getpid() != self._pid:  # a forked child inherits the handler, and is no member
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._ask()
        with contextlib.suppress(OSError):  # nobody holds the other end
            os.write(2, b"everstep: SIGTERM: this group leaves at the next step boundary\n")
