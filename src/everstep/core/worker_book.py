"""Which agent runs which worker of a job, which workers have ended, and which are to end. Bounded; no time in it."""

from collections.abc import Iterable, Sequence

WORKERS_MAX = 1024  # of one agent
NAME_CHARS_MAX = 200
KEPT_MAX = 10_000  # workers that have ended, and that are to end
DETAIL_CHARS_MAX = 200


def worker_name(token: str, pid: int) -> str:
    """How a worker is called on the links. A child that inherited its parent's token has another pid, and is nobody."""
    return f"{token}:{pid}"


class WorkerBook:
    """Written by the AgentDesk; read when a member says Hello, too."""

    def __init__(self) -> None:
        self._agent_of: dict[str, int] = {}
        self._workers_of: dict[int, tuple[str, ...]] = {}
        self._ended: dict[str, str] = {}
        self._condemned: dict[str, None] = {}

    # ---- agents

    def runs(self, link: int, workers: tuple[str, ...]) -> None:
        """All that the agent on this link runs."""
        self.agent_gone(link)
        self._workers_of[link] = workers
        self._agent_of.update(dict.fromkeys(workers, link))

    def agent_gone(self, link: int) -> None:
        for worker in self._workers_of.pop(link, ()):
            if self._agent_of.get(worker) == link:  # else it is back on another one
                del self._agent_of[worker]

    def agent_of(self, worker: str) -> int | None:
        """Its link."""
        return self._agent_of.get(worker)

    # ---- ends

    def ended(self, worker: str, detail: str) -> bool:
        """Whether that is news."""
        self._condemned.pop(worker, None)
        self._agent_of.pop(worker, None)
        if worker in self._ended or not worker:
            return False
        self._ended[worker] = detail or "cause unknown"
        _keep_newest(self._ended)
        return True

    def cause_of(self, worker: str) -> str:
        return self._ended.get(worker, "")

    def why_ended(self, workers: Sequence[str]) -> str:
        """Of a member with these processes: the end of the first that has ended; "" while all live."""
        for rank, worker in enumerate(workers):
            if worker in self._ended:
                return self._ended[worker] if len(workers) == 1 else f"rank {rank}: {self._ended[worker]}"
        return ""

    # ---- those to end

    def condemn(self, workers: Iterable[str]) -> list[str]:
        """Those of them that live, as far as is known. An agent that is away is told when it is back."""
        living = [worker for worker in workers if worker not in self._ended]
        for worker in living:
            self._condemned[worker] = None
            _keep_newest(self._condemned)
        return living

    def came(self, workers: Iterable[str]) -> None:
        """They said Hello: whoever was left out has been told, and starts over by itself."""
        for worker in workers:
            self._condemned.pop(worker, None)

    def to_fence(self, workers: Iterable[str]) -> list[str]:
        return [worker for worker in workers if worker in self._condemned]


def _keep_newest(kept: dict[str, str] | dict[str, None]) -> None:
    if len(kept) > KEPT_MAX:
        del kept[next(iter(kept))]
