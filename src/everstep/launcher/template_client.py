"""The agent's side of the template: starts workers by forks of it, replaces it when it dies, can do without it.

One thread of its own (the template's parent, so it lasts as long) starts the template, has it import what is asked
for, and after each import has a canary, forked exactly as workers are, run a parallel operation: if that hangs, every
worker would. Then, and when the template cannot be made to work at all, workers are plain processes, which is logged
once. Workers are not touched by anything that happens to the template.
"""

import contextlib
import dataclasses
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping

from everstep.launcher.death_watch import Surroundings, WatchedProcess, is_dying
from everstep.launcher.handshake import Handshake, WorkerSilent, WorkerVanished
from everstep.launcher.parenthood import abandon_orphans, adopt_orphans
from everstep.launcher.plain import PlainStarter
from everstep.launcher.starting import ExitStatus, Launch, WorkerDeath, WorkerNotStarted, WorkerProcess
from everstep.launcher.template_fit import differing_variables
from everstep.launcher.template_messages import Work, work_to_file
from everstep.launcher.template_process import TemplateGone, TemplateProcess, TemplateUnusable

__all__ = ["TemplateSettings", "TemplateStarter"]

_log = logging.getLogger("everstep.launcher")

READY_S = 600.0  # of waiting for a template that loads; its own thread gives up long before
DEATHS_MAX = 5  # of templates within DEATHS_WITHIN_S, before workers are started plainly
DEATHS_WITHIN_S = 60.0
STARTS_MAX = 6  # tries of one start, each of which met a template's or a fork's death
SPARE_DELAY_S = 1.0  # of quiet after a start, before the next spare is forked: starting workers need the CPU more
CLOSE_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """`environment` is what workers have in common; `search_path` the first entry of sys.path for the preloads.

    `preload`: modules that the template imports, in this order; torch is what makes it worth its while.
    `spares`: so many forked workers wait for work; each holds 2 to 4 MB, and saves the time of a fork.
    """

    environment: Mapping[str, str]
    search_path: str
    preload: tuple[str, ...] = ("torch",)
    python: str = sys.executable
    spares: int = 1
    canary_s: float = 5.0  # for a parallel operation in a forked process, before no template is used


class TemplateStarter:
    """Starts workers by forking. Context manager, or `open` and `close`."""

    def __init__(self, settings: TemplateSettings, around: Surroundings) -> None:
        self._settings = settings
        self._around = around
        self._plain = PlainStarter(around, settings.python)
        self._changed = threading.Condition()
        self._template: TemplateProcess | None = None
        self._spares: deque[Handshake] = deque()
        self._quiet_since = 0.0
        self._is_closed = False
        self._falls_back = False
        self._told_variables: set[str] = set()
        self._thread = threading.Thread(target=self._keep_template, name="everstep-template", daemon=True)
        self._wake, self._woken = -1, -1
        self._adopts = False

    def __enter__(self) -> "TemplateStarter":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Begin to load the template, and return at once. Without subreapers, workers will be plain."""
        self._woken, self._wake = os.pipe()
        try:
            adopt_orphans()
            self._adopts = True
        except OSError as error:
            self._fall_back(f"this system does not hand orphans to an agent: {error}")
        self._thread.start()

    @property
    def template_pid(self) -> int:
        """0: none at the moment."""
        template = self._template
        return 0 if template is None else template.pid

    @property
    def spare_pids(self) -> tuple[int, ...]:
        """Of the workers that have reported, and wait for work."""
        with self._changed:
            return tuple(spare.pid for spare in self._spares)

    @property
    def is_plain(self) -> bool:
        """Whether workers are started plainly, for good."""
        return self._falls_back

    def wait_ready(self, timeout_s: float = READY_S) -> bool:
        """Whether a template is ready to fork, or workers are plain for good, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(self._is_decided, timeout_s)

    def start(self, launch: Launch) -> WorkerProcess:
        if self._must_be_plain(launch):
            return self._plain.start(launch)
        with work_file(launch) as fds:
            while (spare := self._take_spare()) is not None:
                with contextlib.suppress(WorkerVanished), spare:
                    self._note_start()
                    return spare.release(fds)
            for _ in range(STARTS_MAX):
                if not self.wait_ready():
                    break
                template = self._template
                if self._falls_back:
                    return self._plain.start(launch)
                if template is not None:
                    with contextlib.suppress(WorkerVanished):
                        return self._fork(template, fds)
                self._note_start()
                if self._is_closed:
                    break
        raise WorkerNotStarted("the template could not be kept alive for long enough to fork a worker")

    def close(self) -> None:
        """End the template and the spares. Workers go on."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            os.write(self._wake, b"x")
            self._thread.join(CLOSE_S)
            os.close(self._wake)
            os.close(self._woken)
            if self._adopts:
                abandon_orphans()
        while (spare := self._take_spare()) is not None:
            with spare:
                pass
        self._plain.close()

    def _is_decided(self) -> bool:
        return self._template is not None or self._falls_back or self._is_closed

    def _must_be_plain(self, launch: Launch) -> bool:
        if self._falls_back:
            return True
        names = differing_variables(self._settings.environment, launch.environment)
        with self._changed:
            new = names - self._told_variables
            self._told_variables |= names
        if new:
            _log.warning(
                "a worker's %s differ from the launcher's, and are read when an interpreter starts: such workers are "
                "not forked from the template, which takes longer",
                ", ".join(sorted(new)),
            )
        return bool(names)

    def _fork(self, template: TemplateProcess, fds: tuple[int, ...]) -> WatchedProcess:
        with Handshake(self._around) as handshake:
            self._introduce(template, handshake)
            self._note_start()
            return handshake.release(fds)

    def _introduce(self, template: TemplateProcess, handshake: Handshake) -> None:
        try:
            template.fork(handshake)
            handshake.await_report(forked_by=template.pid)
        except TemplateGone as error:
            self._retire(template)
            raise WorkerVanished(str(error)) from error
        except WorkerVanished as error:
            if isinstance(error, WorkerSilent):
                template.doubt()
            if not template.is_alive():
                self._retire(template)
            raise

    def _retire(self, template: TemplateProcess) -> None:
        """So that the next start waits for the one that takes its place."""
        with self._changed:
            if self._template is template:
                self._template = None

    def _note_start(self) -> None:
        with self._changed:
            self._quiet_since = time.monotonic()
        self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake, b"x")

    def _take_spare(self) -> Handshake | None:
        with self._changed:
            return self._spares.popleft() if self._spares else None

    # From here on: the template's own thread.

    def _keep_template(self) -> None:
        deaths: deque[float] = deque(maxlen=DEATHS_MAX)
        while not self._is_closed and not self._falls_back:
            template = TemplateProcess(self._around)
            try:
                self._load(template)
                self._watch(template)
            except (TemplateUnusable, WorkerNotStarted) as error:
                self._fall_back(str(error))
            except TemplateGone as error:
                deaths.append(time.monotonic())
                if len(deaths) == DEATHS_MAX and deaths[-1] - deaths[0] < DEATHS_WITHIN_S:
                    self._fall_back(f"it died {DEATHS_MAX} times within {DEATHS_WITHIN_S:g} s ({error})")
                elif not self._is_closed:
                    _log.warning("the template that forks workers %s; another takes its place, workers go on", error)
            finally:
                with self._changed:
                    self._template = None
                template.end()

    def _load(self, template: TemplateProcess) -> None:
        template.start(self._settings.python, self._settings.environment, self._settings.search_path)
        template.await_loaded("its own modules", lambda: self._is_closed)
        if not self._settings.preload:
            self._send_canary(template, "its start")
        for module in self._settings.preload:
            template.preload(module)
            template.await_loaded(module, lambda: self._is_closed)
            self._send_canary(template, f"preloading {module}")

    def _send_canary(self, template: TemplateProcess, after: str) -> None:
        exits: list[ExitStatus] = []
        has_ended = threading.Event()

        def on_exit(status: ExitStatus) -> None:
            exits.append(status)
            has_ended.set()

        with work_file(None) as fds, Handshake(self._around) as handshake:
            try:
                self._introduce(template, handshake)
                canary = handshake.release(fds)
            except WorkerVanished:
                if template.is_alive():
                    raise
                raise TemplateGone("ended while a canary was forked") from None
        canary.watch(_ignore_death, on_exit)
        if not has_ended.wait(self._settings.canary_s):
            canary.signal_group(9)
            has_ended.wait(CLOSE_S)
            raise TemplateUnusable(
                f"after {after}, a parallel operation in a forked process hangs: the import has run one itself, whose "
                "threads a fork does not have"
            )
        if not exits[0].is_clean:
            raise TemplateUnusable(f"after {after}, a parallel operation in a forked process: {exits[0].describe()}")

    def _watch(self, template: TemplateProcess) -> None:
        """Until the template's end, or the starter's."""
        with self._changed:
            self._template = template
            self._quiet_since = time.monotonic()
            self._changed.notify_all()
        poll = select.poll()
        poll.register(template.control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while not self._is_closed:
            ready = poll.poll(self._until_spare_ms())
            if any(fd == self._woken for fd, _ in ready):
                os.read(self._woken, 4096)
            if any(fd == template.control.fileno() for fd, _ in ready):
                raise TemplateGone("has ended")
            if not ready:
                self._add_spare(template)

    def _until_spare_ms(self) -> float | None:
        self._drop_dead_spares()
        with self._changed:
            if len(self._spares) >= self._settings.spares:
                return None
            return max(1.0, (self._quiet_since + SPARE_DELAY_S - time.monotonic()) * 1000)

    def _drop_dead_spares(self) -> None:
        with self._changed:
            dead = [spare for spare in self._spares if is_dying(spare.pid)]
            for spare in dead:
                self._spares.remove(spare)
        for spare in dead:
            with spare:
                pass

    def _add_spare(self, template: TemplateProcess) -> None:
        with contextlib.ExitStack() as undo:
            spare = undo.enter_context(Handshake(self._around))
            try:
                self._introduce(template, spare)
            except WorkerNotStarted as error:
                _log.warning("no spare worker could be forked: %s", error)
                with self._changed:
                    self._quiet_since = time.monotonic()
                return
            undo.pop_all()
        with self._changed:
            self._spares.append(spare)

    def _fall_back(self, why: str) -> None:
        with self._changed:
            is_first = not self._falls_back
            self._falls_back = True
            self._changed.notify_all()
        if is_first and not self._is_closed:
            _log.warning(
                "no template: %s; each worker is a new interpreter, which takes seconds longer (preload other modules, "
                "or give --no-template to have it so)",
                why,
            )


@contextlib.contextmanager
def work_file(launch: Launch | None) -> Iterator[tuple[int, ...]]:
    """The descriptors that the word to go on brings; None: for a canary."""
    devnull = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if launch is None:
            work = Work(is_canary=True)
            streams = (devnull, 1, 2)
        else:
            work = Work(
                run_as=launch.run_as.value,
                target=os.fsencode(launch.target),
                args=[os.fsencode(arg) for arg in launch.args],
                environment={os.fsencode(k): os.fsencode(v) for k, v in launch.environment.items()},
                cwd=os.fsencode(launch.cwd),
            )
            streams = (
                devnull if launch.stdin is None else launch.stdin,
                1 if launch.stdout is None else launch.stdout,
                2 if launch.stderr is None else launch.stderr,
            )
        fd = work_to_file(work)
        try:
            yield (fd, *streams)
        finally:
            os.close(fd)
    finally:
        os.close(devnull)


def _ignore_death(_: WorkerDeath) -> None:
    """A canary's exit status tells all."""
