"""The threads that fetch one state from all its sources at once, and what they share."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from everstep.errors import EverstepError, RecoveryFailed, StateMismatch
from everstep.recovery.assembly import Assembly, plain_leaf
from everstep.recovery.board import Board
from everstep.recovery.connection import Connection, Run, Wanted
from everstep.recovery.fit import check_fit
from everstep.recovery.landing import Landing
from everstep.recovery.manifest import Manifest, build, have_same_layout
from everstep.recovery.notary import Asked, Notary
from everstep.recovery.report import FetchReport
from everstep.recovery.request import FetchRequest, Progress
from everstep.recovery.source import SourceConnection
from everstep.recovery.staging import Piece

logger = logging.getLogger("everstep.recovery")

DAMAGED_MAX = 3  # chunks in a row from one source
OFFER_GRACE_S = 1.0  # for a donor that is later than the others
LOOK_S = 0.02  # how often one that has nothing to do looks for a slow one to help


@dataclass
class _Source:
    url: str
    connection: Connection | None = None
    manifest: Manifest | None = None
    snapshot_id: str = ""
    is_lost: bool = False
    is_robbed: bool = False  # of its present connection
    damaged_in_a_row: int = 0


class Gathering:
    """`changed` guards everything; workers call in, one at a time, and move bytes outside of it."""

    def __init__(self, request: FetchRequest, landing: Landing, on_progress: Progress | None) -> None:
        self.request = request
        self.report = FetchReport()
        self.changed = threading.Condition(threading.RLock())
        self.is_over = False
        self.errors: list[EverstepError] = []
        self.fault: Exception | None = None  # what no thread of the fetch expects
        self.sources = [_Source(url) for url in request.urls]
        self.assembly: Assembly | None = None
        self._landing = landing
        self._on_progress = on_progress
        self._board: Board | None = None
        self._pieces: list[list[Piece]] = []
        self._threads: list[threading.Thread] = []
        self._notary = Notary(self.changed, self._learn, self._distrust)
        self._has_notary = False  # its thread is there
        self._lost_at = 0.0  # the latest source

    # ---- the thread of run

    def start(self, work: Callable[[int], None]) -> None:
        """`work(number)` fetches from that source, on a thread of its own."""
        for number in range(len(self.sources)):
            self._start(partial(work, number), f"everstep-fetch-{number}")

    @property
    def is_complete(self) -> bool:
        return self._board is not None and self._board.is_complete

    @property
    def has_failed(self) -> bool:
        """Nobody is left; once somebody had offered the state, those who have not are not waited for much longer."""
        if self.fault is not None or any(isinstance(error, StateMismatch) for error in self.errors):
            return True
        left = [source for source in self.sources if not source.is_lost]
        if self._board is None or any(source.manifest is not None for source in left):
            return not left
        return not left or time.monotonic() > self._lost_at + OFFER_GRACE_S

    def end(self) -> None:
        """No thread touches the landing's memory when it returns. `shut` came first, or everything is there."""
        self.shut()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # ---- any thread

    def forget(self) -> None:
        """After `end`: errors hold the frames where they were raised, and those this; it holds the state no more."""
        self.errors, self.fault, self.assembly, self._pieces = [], None, None, []
        for source in self.sources:
            source.connection = None

    def shut(self) -> None:
        with self.changed:
            self.is_over = True
            self._notary.end()
            for connection in self._connections():
                connection.shut()
            self.changed.notify_all()

    def list_fds(self) -> list[int]:
        """Takes no lock."""
        return [fd for connection in self._connections() for fd in connection.list_fds()]

    def _connections(self) -> list[Connection]:
        found = [source.connection for source in self.sources]
        return [connection for connection in (*found, self._notary.connection) if connection is not None]

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=self._run, args=(run,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise RecoveryFailed(f"no thread to fetch the state with: {error}") from error
        self._threads.append(thread)

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # boundary of a thread: raised by who waits for the fetch
            with self.changed:
                self.fault = self.fault or error
                self.shut()

    # ---- workers

    def connection_to(self, number: int) -> Connection:
        source = self.sources[number]
        with self.changed:
            source.is_robbed = False
            source.connection = self._dial(source.url)
            if self.is_over:
                source.connection.shut()
            return source.connection

    def _dial(self, url: str, *, is_notary: bool = False) -> Connection:
        if self.request.dial is None:
            return SourceConnection(self.request, url)
        return self.request.dial(Wanted(url=url, is_notary=is_notary, pieces_of=self.pieces_of))

    def admit(self, number: int, manifest: Manifest, snapshot_id: str) -> None:
        """It offers this. The first one is the primary."""
        with self.changed:
            if self.is_over:
                raise ConnectionAbortedError("cut off")
            source = self.sources[number]
            is_new = source.snapshot_id != snapshot_id
            source.manifest, source.snapshot_id = manifest, snapshot_id
            if self._board is None:
                self._begin(manifest)
                self._appoint(number)
            elif not self._is_like_ours(manifest):
                raise RecoveryFailed(f"{source.url} offers a state of another layout")
            elif (is_new and number == self._board.primary) or self._is_orphaned:
                self._appoint(number)

    def _begin(self, manifest: Manifest) -> None:
        request = self.request
        if request.expected is not None:
            check_fit(build(manifest, plain_leaf), request.expected, request.same_keys_under)
        try:
            self.assembly = Assembly(manifest, self._landing, request.expected)
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises RuntimeError
            raise RecoveryFailed(f"no memory for a state of {manifest.total_bytes} bytes: {error}") from error
        self._pieces = list(self.assembly.places())
        self._layout = manifest
        self._board = Board(manifest.chunk_count, len(self.sources))
        for number, source in enumerate(self.sources):
            if source.is_lost:
                self._board.lose(number)
        self.report.total_bytes, self.report.prepared_at = manifest.total_bytes, time.monotonic()

    @property
    def _is_orphaned(self) -> bool:
        """The primary was lost when nobody else had offered the state yet."""
        assert self._board is not None
        return self._board.primary is None or self.sources[self._board.primary].is_lost

    def _is_like_ours(self, manifest: Manifest) -> bool:
        return have_same_layout(manifest, self._layout)

    def _appoint(self, number: int) -> None:
        source = self.sources[number]
        assert self._board is not None
        assert self.assembly is not None
        assert source.manifest is not None
        self._board.appoint(number)
        self.assembly.adopt(source.manifest)
        if (len(self.sources) > 1 or self._board.has_landed) and not self._board.is_complete:
            self._ask_notary(source.url, source.snapshot_id, source.manifest.chunk_count)
        else:
            self._notary.dismiss()
        self.changed.notify_all()

    def has_begun(self, number: int) -> bool:
        """It has offered the state; if it does so no more, it has withdrawn it."""
        return bool(self.sources[number].snapshot_id)

    def next_run(self, number: int) -> Run | None:
        """Blocks until there is something to fetch; None when it is over, or this source is too slow to be of use."""
        with self.changed:
            source = self.sources[number]
            assert self._board is not None
            assert source.manifest is not None
            while not self.is_over and not self._board.is_complete:
                now = time.monotonic()
                run = self._board.claim(number, now)
                if run is not None:
                    return Run(run, source.manifest, source.snapshot_id, self._board.needs_digests(number, run))
                if not self._board.is_wanted(number):
                    return None
                victim = self._board.victim_of(number, now) if self.request.dial is None else None
                if victim is not None:
                    self._rob(victim)
                self.changed.wait(LOOK_S)
            return None

    def _rob(self, victim: int) -> None:
        connection = self.sources[victim].connection
        self.sources[victim].is_robbed = True
        logger.info("recovery: %s is slow; others fetch what it was asked for", self.sources[victim].url)
        if connection is not None:
            connection.shut()  # its thread gives back what it had claimed, when it no longer writes there

    def pieces_of(self, chunk: int) -> list[Piece]:
        return self._pieces[chunk]

    def landed(self, number: int, chunk: int, sent: bytes | None, digest: bytes) -> None:
        """`sent`: what the source says of it; None when it says nothing, and the primary's digest decides."""
        with self.changed:
            source, now = self.sources[number], time.monotonic()
            assert self._board is not None
            if sent is not None and sent != digest:
                self.report.digest_errors += 1
                self._board.damaged(number, chunk, now)
                source.damaged_in_a_row += 1
                what = f"chunk {chunk} of {self._board.chunk_count} from {source.url} arrived damaged"
                logger.warning("recovery: %s; fetching it again", what)
                if source.damaged_in_a_row >= DAMAGED_MAX:
                    raise RecoveryFailed(f"{what}, and so did those before it")
            else:
                if sent is not None:
                    source.damaged_in_a_row = 0
                was_damaged = self._board.landed(number, chunk, digest, now, is_vouched_for=sent is not None)
                if was_damaged:
                    self.report.digest_errors += 1
                    logger.warning("recovery: chunk %d from %s had arrived damaged; it is whole now", chunk, source.url)
                size = sum(len(piece) for piece in self._pieces[chunk])
                self.report.bytes_from[source.url] = self.report.bytes_from.get(source.url, 0) + size
            self._tell()

    def wait_until_needed(self, number: int) -> bool:
        """False when it is over, or all is there; a source that was robbed waits until nobody else is left."""
        with self.changed:
            while not self.is_over and not self.is_complete:
                if self._board is None or self._board.is_wanted(number):
                    return True
                self.changed.wait(LOOK_S)
            return False

    def ended(self, number: int) -> bool:
        """Its connection failed; returns whether that was because it was robbed."""
        with self.changed:
            was_robbed = self.sources[number].is_robbed
            self.report.retries += not (was_robbed or self.is_over)
            if self._board is not None:
                self._board.give_back(number)
                self.changed.notify_all()
            return was_robbed

    def lose(self, number: int, error: EverstepError) -> None:
        with self.changed:
            source = self.sources[number]
            source.is_lost, self._lost_at = True, time.monotonic()
            self.report.lost[source.url] = str(error)
            self.errors.append(error)
            if not self.is_over and len(self.sources) > 1:
                logger.warning("recovery: %s serves no more: %s", source.url, str(error))  # no frames for handlers
            if self._board is not None:
                self._board.lose(number)
                if self._board.primary == number:
                    self._succeed()
            self.changed.notify_all()

    def _succeed(self) -> None:
        """Another source becomes the primary: what has landed stays, if it says the same."""
        heirs = [n for n, s in enumerate(self.sources) if not s.is_lost and s.manifest is not None]
        if heirs and not self.is_over:
            self._appoint(heirs[0])

    # ---- the primary's digests

    def _ask_notary(self, url: str, snapshot_id: str, chunk_count: int) -> None:
        if not self._has_notary:
            self._start(self._notary.run, "everstep-fetch-digests")
            self._has_notary = True
        retry_after_s = self.request.retry_after_s if self.request.dial is None else ()
        asked = Asked(
            url=url,
            dial=lambda: self._dial(url, is_notary=True),
            snapshot_id=snapshot_id,
            chunk_count=chunk_count,
            retry_after_s=retry_after_s,
        )
        self._notary.ask(asked)

    def _learn(self, first: int, digests: list[bytes]) -> None:
        assert self._board is not None
        self._board.learn(first, digests)
        self._tell()

    def _distrust(self, url: str, error: Exception) -> None:
        assert self._board is not None
        logger.warning("recovery: no digests from %s: %s; it has to send all itself", url, str(error))
        self._board.distrust()
        self._tell()

    def _tell(self) -> None:
        """Under the lock."""
        board, report = self._board, self.report
        assert board is not None
        done = min(board.done * self._layout.chunk_bytes, self._layout.total_bytes)
        report.differing = board.differing
        is_news, report.done_bytes = done > report.done_bytes, done
        if is_news and self._on_progress is not None:
            self._on_progress(done, report.total_bytes)
        if board.is_complete:  # who has nothing to do looks by himself; waking anybody for each chunk costs the rate
            self.changed.notify_all()
