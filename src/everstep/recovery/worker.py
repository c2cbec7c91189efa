"""Fetches from one source, over one connection after another."""

from everstep.errors import EverstepError, RecoveryFailed, RemoteProtocolError
from everstep.recovery.connection import Connection, Run
from everstep.recovery.gathering import Gathering
from everstep.recovery.readers import Readers, reader_count
from everstep.recovery.same_host import PeerMemory
from everstep.recovery.source import Damaged
from everstep.recovery.staging import in_host


class Worker:
    """`run` on a thread of its own: what it gets, and what becomes of the source, is the gathering's."""

    def __init__(self, gathering: Gathering, number: int) -> None:
        self._gathering = gathering
        self._number = number
        self._failures = 0  # since something arrived
        self._may_read_memory = gathering.request.may_read_memory

    def run(self) -> None:
        gathering, number = self._gathering, self._number
        while gathering.wait_until_needed(number):
            connection = gathering.connection_to(number)
            try:
                self._fetch_over(connection)
            except (OSError, UnicodeError, Damaged) as error:  # UnicodeError: of a host name
                connection.close()
                was_robbed = gathering.ended(number)
                self._failures += not was_robbed
                is_silent = isinstance(error, TimeoutError) and not was_robbed
                retry_after_s = gathering.request.retry_after_s
                if is_silent or self._failures > len(retry_after_s):
                    return self._give_up(connection, error)
                self._pause(retry_after_s[self._failures - 1] if self._failures else 0.0)
            except (EverstepError, RemoteProtocolError) as error:
                connection.close()  # first: what it was to fetch may be written by others from then on
                gathering.ended(number)
                return gathering.lose(number, error)  # type: ignore[arg-type]
            finally:
                connection.close()
        return None

    def _give_up(self, connection: Connection, error: Exception) -> None:
        failure = RecoveryFailed(f"fetching live state from {connection.url} failed: {error}")
        failure.__cause__ = error
        self._gathering.lose(self._number, failure)

    def _fetch_over(self, connection: Connection) -> None:
        """Until it is over; raises when the connection is of no more use."""
        gathering, number = self._gathering, self._number
        connection.connect()
        offered, its_id = connection.manifest(may_wait=not gathering.has_begun(number))
        gathering.admit(number, offered, its_id)
        memory = connection.memory(offered, its_id) if self._may_read_memory else None
        while (todo := gathering.next_run(number)) is not None:
            if memory is not None:
                self._read(connection, memory, todo)
                continue
            connection.ask_for_chunks(todo.manifest, todo.snapshot_id, todo.chunks, with_digests=todo.needs_digests)
            for chunk in todo.chunks:
                pieces = gathering.pieces_of(chunk)
                gathering.landed(number, chunk, *connection.receive(pieces))
                self._failures = 0

    def _read(self, connection: Connection, memory: PeerMemory, todo: Run) -> None:
        """From the source's memory, while it computes the digests."""
        gathering, chunks = self._gathering, todo.chunks
        connection.ask_for_digests(todo.snapshot_id, chunks)
        gathering.report.transport[connection.url] = "memory"
        left = iter(chunks)
        with Readers(memory, todo.manifest, lambda chunk: in_host(gathering.pieces_of(chunk))) as readers:
            readers.start(chunks, reader_count(len(gathering.sources)))
            for digests in connection.digests(len(chunks)):
                for sent, chunk in zip(digests, left, strict=False):
                    try:
                        computed = readers.digest_of(chunk)
                    except PermissionError:
                        self._may_read_memory = False
                        raise
                    gathering.landed(self._number, chunk, sent, computed)
                    self._failures = 0

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with self._gathering.changed:
                self._gathering.changed.wait_for(lambda: self._gathering.is_over, seconds)
