"""Who fetches which chunks of one state, when several sources serve it. Decides only: no clock, no sockets, no lock.

Every source offers the same state, but not always the same bytes: each has random number generators of its own, say.
So one of them, the primary, says what the state is: its manifest is built, and each chunk that came from another one
counts only if its digest is the primary's; else the primary's is fetched.

    free ──claim──> claimed ──landed──> unconfirmed ──the primary's digest is the same──> done
     ^                 │ damaged, given back, stolen       │ differs: from the primary only
     └─────────────────┴───────────────────────────────────┘

What is hashed by who receives it and by the primary need not be hashed by who sends it. Only when the two differ does
it matter whether the sender's bytes do, or the wire's: then the chunk is fetched from him again, with his digest.
"""

from dataclasses import dataclass, field

RUN_CHUNKS_MAX = 16  # that one request asks for while others could help
STEAL_RATIO = 2.0  # how much sooner the thief would have it
STEAL_S = 0.1  # and by how much at least: cutting a connection costs something, too


@dataclass
class _Source:
    is_lost: bool = False
    is_slow: bool = False  # it was robbed: it serves again when nobody else is left
    is_doubted: bool = False  # something of it arrived damaged: it shall send its digests
    again: list[int] = field(default_factory=list)  # chunks to fetch with its digest
    claimed: list[int] = field(default_factory=list)  # still to come, in order
    since: float = 0.0  # of the claim, or of its latest chunk
    busy_s: float = 0.0
    chunks: int = 0

    def needed_s(self, now: float) -> float:
        """What is left of its claim takes at least so long."""
        left = len(self.claimed)
        pace_s = self.busy_s / self.chunks if self.chunks else 0.0
        return max(left * pace_s, left * (now - self.since))


class Board:
    """One fetch's chunks and sources, both by number."""

    def __init__(self, chunk_count: int, source_count: int) -> None:
        self.chunk_count = chunk_count
        self.primary: int | None = None
        self.done = 0
        self.differing = 0  # chunks that another source had otherwise
        self._free: list[int] = list(range(chunk_count))[::-1]  # the next one last
        self._for_primary: list[int] = []
        self._primary_only: set[int] = set()  # another source had them otherwise
        self._digests: list[bytes | None] = [None] * chunk_count  # of what has landed
        self._truth: list[bytes | None] = [None] * chunk_count
        self._is_done = [False] * chunk_count
        self._sent_by: dict[int, int] = {}  # without a digest of who sent it
        self._differed: dict[int, bytes] = {}  # from the primary's; to be had again from who had sent it
        self._is_distrusted = False  # the primary's digests come no more, but with what it sends itself
        self._sources = [_Source() for _ in range(source_count)]

    @property
    def is_complete(self) -> bool:
        return self.done == self.chunk_count

    @property
    def has_landed(self) -> bool:
        """Something has, from whomever."""
        return any(digest is not None for digest in self._digests)

    # ---- sources

    def appoint(self, primary: int) -> None:
        """From here on `primary` says what the state is; what has landed has to be confirmed by it again."""
        self.primary = primary
        self.done = 0
        self._is_distrusted = False
        self._truth = [None] * self.chunk_count
        self._is_done = [False] * self.chunk_count
        self._for_primary = []
        self._primary_only = set()
        self._differed = {}
        for it in self._sources:
            it.again = []
        claimed = {chunk for source in self._sources for chunk in source.claimed}
        missing = [c for c in range(self.chunk_count) if self._digests[c] is None and c not in claimed]
        self._free = missing[::-1]

    def lose(self, source: int) -> None:
        """It serves no more."""
        self.give_back(source)
        self._sources[source].is_lost = True

    def give_back(self, source: int) -> None:
        """Its connection ended: others may have what it had claimed."""
        it = self._sources[source]
        self._put_back(*it.claimed, *it.again)
        it.claimed, it.again = [], []

    # ---- work

    def claim(self, source: int, now: float) -> range | None:
        """The chunks that it shall fetch next, in order; None: nothing to do for it at present."""
        it = self._sources[source]
        if source == self.primary and self._for_primary:
            chunk = self._for_primary.pop()
            return self._claimed(it, range(chunk, chunk + 1), now)
        if it.again:
            chunk = it.again.pop()
            return self._claimed(it, range(chunk, chunk + 1), now)
        if self._is_distrusted and source != self.primary:
            return None
        others = 0 if self._is_distrusted else self._quick_beside(it)
        if not self._free or (it.is_slow and others):
            return None
        most = len(self._free) if not others else min(RUN_CHUNKS_MAX, max(1, len(self._free) // (2 * (others + 1))))
        first = end = self._free.pop()
        end += 1
        while self._free and self._free[-1] == end and end - first < most:
            end = self._free.pop() + 1
        return self._claimed(it, range(first, end), now)

    def needs_digests(self, source: int, chunks: range) -> bool:
        """Of what it claimed: from the primary they are the truth, from others they tell damage from difference."""
        is_unsure = source == self.primary or self._sources[source].is_doubted
        return is_unsure or any(chunk in self._differed for chunk in chunks)

    def landed(self, source: int, chunk: int, digest: bytes, now: float, *, is_vouched_for: bool = True) -> bool:
        """It is there, with this digest; `is_vouched_for`: the source has said the same one.

        Returns whether it had come from the same source before, and was damaged on its way then.
        """
        self._took(source, chunk, now)
        before = self._differed.pop(chunk, digest)
        self._digests[chunk] = digest
        self._sent_by.pop(chunk, None)
        if not is_vouched_for:
            self._sent_by[chunk] = source
        elif source == self.primary:
            self._truth[chunk] = digest
        self._judge(chunk)
        if self._is_distrusted:
            self._doubt(chunk)
        self._sources[source].is_doubted |= before != digest
        return before != digest

    def damaged(self, source: int, chunk: int, now: float) -> None:
        """It arrived other than it was sent: once more."""
        self._took(source, chunk, now)
        self._sources[source].chunks -= 1
        self._sources[source].is_doubted = True
        self._put_back(chunk)

    def learn(self, first: int, digests: list[bytes]) -> None:
        """The primary's digests of the chunks from `first` on."""
        for chunk, digest in enumerate(digests, first):
            if self._truth[chunk] is None:
                self._truth[chunk] = digest
                self._judge(chunk)

    def victim_of(self, source: int, now: float) -> int | None:
        """Whose connection to cut, because `source`, which has nothing to do, would have the rest of it much sooner."""
        thief = self._sources[source]
        if thief.is_slow or thief.is_lost or thief.claimed or self._is_distrusted:
            return None
        pace_s = thief.busy_s / thief.chunks if thief.chunks else 1.0
        worst, worst_s = None, 0.0
        for number, it in enumerate(self._sources):
            needed_s = it.needed_s(now)
            if set(it.claimed) - self._primary_only and needed_s > max(
                worst_s, STEAL_RATIO * len(it.claimed) * pace_s + STEAL_S
            ):
                worst, worst_s = number, needed_s
        if worst is not None:
            self._sources[worst].is_slow = True
        return worst

    def is_slow(self, source: int) -> bool:
        return self._sources[source].is_slow

    def is_wanted(self, source: int) -> bool:
        """Worth a connection: not robbed, or nobody quicker is left, or nobody else can give what is missing."""
        it = self._sources[source]
        is_alone = source == self.primary and bool(self._for_primary or (self._is_distrusted and self._free))
        return not it.is_slow or is_alone or not self._quick_beside(it)

    def _quick_beside(self, it: _Source) -> int:
        return sum(not s.is_lost and not s.is_slow for s in self._sources if s is not it)

    def distrust(self) -> None:
        """The primary cannot say its digests: only what it sends itself counts."""
        self._is_distrusted = True
        for chunk in range(self.chunk_count):
            self._doubt(chunk)

    def _doubt(self, chunk: int) -> None:
        if self._digests[chunk] is not None and not self._is_done[chunk]:
            self._digests[chunk] = None
            self._primary_only.add(chunk)
            self._put_back(chunk)

    def _put_back(self, *chunks: int) -> None:
        for chunk in reversed(chunks):
            self._differed.pop(chunk, None)
            (self._for_primary if chunk in self._primary_only else self._free).append(chunk)

    def _claimed(self, it: _Source, chunks: range, now: float) -> range:
        it.claimed, it.since = list(chunks), now
        return chunks

    def _took(self, source: int, chunk: int, now: float) -> None:
        it = self._sources[source]
        it.claimed.remove(chunk)
        it.busy_s += now - it.since
        it.since = now
        it.chunks += 1

    def _judge(self, chunk: int) -> None:
        have, truth = self._digests[chunk], self._truth[chunk]
        if have is None or truth is None or self._is_done[chunk]:
            return
        sender = self._sent_by.pop(chunk, None)
        if have == truth:
            self._is_done[chunk] = True
            self.done += 1
            return
        self._digests[chunk] = None
        if sender is None:
            self.differing += 1
            self._primary_only.add(chunk)
            self._put_back(chunk)
        elif self._sources[sender].is_lost or self._sources[sender].is_slow:
            self._put_back(chunk)
        else:
            self._differed[chunk] = have
            self._sources[sender].again.append(chunk)
