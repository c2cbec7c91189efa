"""A stage for recorded transcripts of hangs: the ranks of one node, the judge, and a prompter. See stage.py.

> limits KEY=SECONDS|none …          given limits: initial heartbeat outside stopped kernel, and sections by name
> learning [floor=S] [mixed=S]       limits are learned, too
> spawn N … | gone N …               a new process of rank N; its end
> beat N … | open N SECTION[/THREAD] … | close N SECTION[/THREAD] …
> sections wait|mixed|cold NAME …     what they are
> state N R|S|D|T | cpu N            as /proc says; it used CPU time
> steps N COUNT SECONDS SECTION      it opens and closes the section COUNT times, SECONDS long
> over N                             it wants to be watched no more
> elsewhere KEY=SECONDS …             so long were ranks of all nodes in these, as the lighthouse says
> timeouts N KEY=SECONDS …           its client worked these out
> excuse N …                         their stacks say that they waited for the one that was found
> asleep SECONDS                     nobody runs: the monitor comes back late
> wait SECONDS                       looks are taken when they come due
"""

import dataclasses

from everstep.core.hang import Cleared, Finding, HangJudge, HangPolicy, Hung, Section, Suspected, View
from everstep.core.learned import as_observed
from everstep.core.limits import HEARTBEAT, OUTSIDE, LimitPolicy, Observed

KEYS = {"heartbeat": HEARTBEAT, "outside": OUTSIDE}


@dataclasses.dataclass
class Page:
    """What a rank's process has written."""

    heartbeat_at: float | None = None
    open: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    closed: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    observed: dict[str, Observed] = dataclasses.field(default_factory=dict)
    state: str = "S"
    cpu_s: float = 0.0
    is_over: bool = False


class HangStage:
    """`run` performs one command and returns what was written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0
        self.found: list[tuple[float, Finding]] = []
        self._policy = HangPolicy(stopped_s=None, uninterruptible_s=None, limits=LimitPolicy(learns=False))
        self._judge: HangJudge | None = None
        self._pages: dict[int, Page] = {}
        self._waits: set[str] = set()
        self._mixed: set[str] = set()
        self._cold: set[str] = set()
        self._lines: list[str] = []

    @property
    def judge(self) -> HangJudge:
        if self._judge is None:
            self._judge = HangJudge(self._policy)
        return self._judge

    def run(self, command: str) -> str:
        verb, *words = command.split()
        getattr(self, f"_{verb}")(*words)
        lines, self._lines = self._lines, []
        return "\n".join(lines)

    # ---- commands

    def _limits(self, *words: str) -> None:
        given = _limits(words)
        policy = self._policy
        self._policy = dataclasses.replace(
            policy,
            initial_s=given.pop("initial", None),
            stopped_s=given.pop("stopped", None),
            uninterruptible_s=given.pop("kernel", None),
            limits=dataclasses.replace(policy.limits, given=given),
        )

    def _learning(self, *words: str) -> None:
        floors = _limits(words)
        limits = dataclasses.replace(
            self._policy.limits,
            learns=True,
            floor_s=floors.get("floor") or 0.0,
            mixed_floor_s=floors.get("mixed") or 0.0,
        )
        self._policy = dataclasses.replace(self._policy, limits=limits)

    def _spawn(self, *ranks: str) -> None:
        for rank in map(int, ranks):
            self._pages[rank] = Page()
            self.judge.watch(rank, self.now, self.now)

    def _gone(self, *ranks: str) -> None:
        for rank in map(int, ranks):
            del self._pages[rank]
            self.judge.forget(rank, self.now)

    def _beat(self, *ranks: str) -> None:
        for rank in map(int, ranks):
            self._pages[rank].heartbeat_at = self.now

    def _open(self, rank: str, *sections: str) -> None:
        for section in sections:
            self._pages[int(rank)].open[_place(section)] = self.now

    def _close(self, rank: str, *sections: str) -> None:
        page = self._pages[int(rank)]
        for section in sections:
            del page.open[_place(section)]
            page.closed[_place(section)] = self.now

    def _sections(self, what: str, *sections: str) -> None:
        {"wait": self._waits, "mixed": self._mixed, "cold": self._cold}[what].update(sections)

    def _state(self, rank: str, state: str) -> None:
        self._pages[int(rank)].state = state

    def _cpu(self, rank: str) -> None:
        self._pages[int(rank)].cpu_s += 1.0

    def _steps(self, rank: str, count: str, seconds: str, section: str) -> None:
        page = self._pages[int(rank)]
        before = page.observed.get(section, Observed(0, 0.0))
        longest = max(before.longest_s, float(seconds))
        page.observed[section] = Observed(before.count + int(count), longest)
        page.closed[_place(section)] = self.now

    def _over(self, rank: str) -> None:
        self._pages[int(rank)].is_over = True

    def _timeouts(self, rank: str, *words: str) -> None:
        self.judge.set_timeouts(int(rank), _limits(words), self.now)

    def _elsewhere(self, *words: str) -> None:
        longest = {key: seconds for key, seconds in _limits(words).items() if seconds is not None}
        self.judge.hear(as_observed(longest.items()), self.now)

    def _excuse(self, *ranks: str) -> None:
        self.judge.excuse(map(int, ranks), self.now)

    def _asleep(self, seconds: str) -> None:
        self.judge.next_deadline()  # it has gone to sleep until then
        self.now += float(seconds)
        self._look()

    def _wait(self, seconds: str) -> None:
        self.advance(float(seconds))

    # ---- the shell's part

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while (deadline := self.judge.next_deadline()) is not None and deadline <= until:
            assert deadline > self.now or self.looks == 0, "after a look the next one is later"
            self.now = max(self.now, deadline)
            self._look()
        self.now = until

    def view(self, rank: int) -> View:
        page = self._pages[rank]
        sections = tuple(
            Section(name, since, thread, name in self._waits, name in self._mixed, name in self._cold)
            for (name, thread), since in page.open.items()
        )
        threads = {thread for _, thread in (*page.open, *page.closed)}
        first = min(threads, default=0)
        ends = [at for (_, thread), at in page.closed.items() if thread == first]
        is_inside = any(thread == first for _, thread in page.open)
        return View(
            heartbeat_at=page.heartbeat_at,
            sections=sections,
            outside_since=None if is_inside or not ends else max(ends),
            passed_at=max((at for (name, _), at in page.closed.items() if name in self._waits), default=None),
            observed=dict(page.observed),
            state=page.state,
            cpu_s=page.cpu_s,
            is_over=page.is_over,
        )

    def _look(self) -> None:
        self.looks += 1
        due = self.judge.due(self.now)
        for finding in self.judge.receive({rank: self.view(rank) for rank in due}, self.now):
            self.found.append((self.now, finding))
            self._lines.append(f"{self.now:g} {_told(finding)}")


def _told(finding: Finding) -> str:
    match finding:
        case Hung(rank, detail, _, waiting, _):
            return f"{rank} hangs: {detail}" + "".join(f"; {other} waits in {where}" for other, where in waiting)
        case Suspected(rank, detail):
            return f"{rank} is suspect: {detail}"
        case Cleared(rank, detail):
            return f"{rank} is cleared: {detail}"
        case _:
            return f"{finding.rank}: {finding.detail}"


def _limits(words: tuple[str, ...]) -> dict[str, float | None]:
    pairs = [word.split("=") for word in words]
    return {KEYS.get(key, key): None if value == "none" else float(value) for key, value in pairs}


def _place(section: str) -> tuple[str, int]:
    name, _, thread = section.partition("/")
    return name, int(thread or 0)
