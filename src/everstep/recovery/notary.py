"""The thread that hears from the primary what each chunk's digest is, beside those that fetch."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from everstep.errors import EverstepError, RemoteProtocolError
from everstep.recovery.connection import Connection
from everstep.recovery.source import Damaged

Learn = Callable[[int, list[bytes]], None]
Distrust = Callable[[str, Exception], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A primary, and what it has offered. `dial` makes a connection to it; `retry_after_s`: pauses before others."""

    url: str
    dial: Callable[[], Connection]
    snapshot_id: str
    chunk_count: int
    retry_after_s: tuple[float, ...]


class Notary:
    """`run` on a thread of its own; the rest with `changed` held, as `learn` and `distrust` are called.

    `learn(first, digests)`: of the chunks from `first` on, as the present primary has them. `distrust(url, error)`: it
    does not say them.
    """

    def __init__(self, changed: threading.Condition, learn: Learn, distrust: Distrust) -> None:
        self.connection: Connection | None = None  # the present one; read without a lock, too
        self._changed = changed
        self._learn = learn
        self._distrust = distrust
        self._asked: Asked | None = None
        self._is_over = False

    def ask(self, asked: Asked) -> None:
        """From here on nothing counts that was said by whoever was asked before."""
        self.dismiss()
        self._asked = asked
        self._changed.notify_all()

    def dismiss(self) -> None:
        """Nobody is asked any more."""
        self._asked = None
        if self.connection is not None:
            self.connection.shut()
            self.connection = None
        self._changed.notify_all()

    def end(self) -> None:
        """So that `run` returns."""
        self._is_over = True
        self.dismiss()

    def run(self) -> None:
        heard: Asked | None = None
        while True:
            with self._changed:
                while self._asked in (None, heard) and not self._is_over:
                    self._changed.wait()
                if self._is_over or self._asked is None:
                    return
                heard = self._asked
            self._hear_out(heard)

    def _hear_out(self, asked: Asked) -> None:
        first = failures = 0
        while (connection := self._dialled(asked)) is not None:
            begun = first
            try:
                for digests in self._said(asked, connection, first):
                    with self._changed:
                        if not self._counts(asked):
                            return
                        self._learn(first, digests)
                    first += len(digests)
            except (OSError, UnicodeError, Damaged) as error:  # UnicodeError: of a host name
                failures = 1 if first > begun else failures + 1
                is_final = isinstance(error, TimeoutError) or failures > len(asked.retry_after_s)
                if not self._may_go_on(asked, error, None if is_final else asked.retry_after_s[failures - 1]):
                    return
            except (EverstepError, RemoteProtocolError) as error:
                self._may_go_on(asked, error, None)
                return
            else:
                return
            finally:
                connection.close()

    def _dialled(self, asked: Asked) -> Connection | None:
        with self._changed:
            if not self._counts(asked):
                return None
            self.connection = asked.dial()
            return self.connection

    def _said(self, asked: Asked, connection: Connection, first: int) -> Iterator[list[bytes]]:
        connection.connect()
        connection.ask_for_digests(asked.snapshot_id, range(first, asked.chunk_count))
        yield from connection.digests(asked.chunk_count - first)

    def _may_go_on(self, asked: Asked, error: Exception, after_s: float | None) -> bool:
        """Waits for so long; None: it is given up."""
        with self._changed:
            if after_s is None and self._counts(asked):
                self._distrust(asked.url, error)
            elif after_s is not None:
                self._changed.wait_for(lambda: not self._counts(asked), after_s)
            return after_s is not None and self._counts(asked)

    def _counts(self, asked: Asked) -> bool:
        return self._asked is asked and not self._is_over
