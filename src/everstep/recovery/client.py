"""The joiner's side of a transfer: fetch one state from its sources, verify all of it, then hand it over."""

import time

from everstep.errors import (
    ConfigError,
    EverstepError,
    RecoveryFailed,
    RemoteProtocolError,
    StateMismatch,
    StepInterrupted,
)
from everstep.fork_guard import guard
from everstep.recovery.gathering import Gathering, logger
from everstep.recovery.landing import Landing
from everstep.recovery.report import FetchReport
from everstep.recovery.request import FetchRequest, Progress
from everstep.recovery.worker import Worker

_LOOK_S = 0.5  # so that Python runs signal handlers while it waits


class Fetch:
    """One attempt. `run` blocks its caller's thread; `abort` may be called from any other, at any time.

    `on_progress(bytes_done, bytes_total)` is called by the fetch's own threads, one at a time, and must not block.
    """

    def __init__(
        self, request: FetchRequest, on_progress: Progress | None = None, landing: Landing | None = None
    ) -> None:
        self._request = request
        self._gathering = Gathering(request, landing or Landing(), on_progress)
        self._is_aborted = False

    @property
    def report(self) -> FetchReport:
        """How it goes, and went. Any thread."""
        return self._gathering.report

    def run(self) -> dict[str, object]:
        """The state, all of it verified, in CPU tensors that nothing else holds, or the landing's.

        Raises StepInterrupted after `abort`; StateMismatch when it does not fit `expected`; ConfigError when the tokens
        differ; RemoteProtocolError for what no sound source sends; RecoveryFailed for anything that may go better
        next time. Then nothing was applied, but the landing's memory may have been written to.
        """
        gathering = self._gathering
        unguard = guard(self.list_fds)
        started_at = time.monotonic()
        try:
            self._check_aborted()
            gathering.start(lambda number: Worker(gathering, number).run())
            with gathering.changed:
                while not (gathering.is_complete or gathering.has_failed or self._is_aborted):
                    if time.monotonic() >= self._request.deadline:
                        break
                    gathering.changed.wait(_LOOK_S)
                is_complete = gathering.is_complete
                gathering.shut()  # before anybody else can make another source the primary
        finally:
            gathering.end()
            unguard()
        try:
            self._check_aborted()
            if not is_complete or gathering.assembly is None:
                if gathering.assembly is not None:
                    gathering.assembly.discard()
                raise gathering.fault or _worst_of(gathering.errors)
            self._say_done(time.monotonic() - started_at)
            return gathering.assembly.tree()
        finally:
            gathering.forget()

    def abort(self) -> None:
        """Makes `run` raise StepInterrupted at once, or as soon as it is called."""
        self._is_aborted = True
        self._gathering.shut()

    def list_fds(self) -> list[int]:
        """For the fork guard. Takes no lock: a forked child may find it held by a thread that it does not have."""
        return self._gathering.list_fds()

    def _check_aborted(self) -> None:
        if self._is_aborted:
            raise StepInterrupted(f"fetching live state from {self._request.source_url} was aborted")

    def _say_done(self, took_s: float) -> None:
        report = self.report
        sources = ", ".join(f"{url}: {size}" for url, size in report.bytes_from.items()) or self._request.source_url
        logger.info(
            "recovery: %d bytes in %.3f s, all digests verified (%s; %d retries, %d digest errors)",
            report.total_bytes,
            took_s,
            sources,
            report.retries,
            report.digest_errors,
        )


def _worst_of(errors: list[EverstepError]) -> Exception:
    """What to tell the caller, of why each source was lost."""
    for kind in (StateMismatch, ConfigError, RemoteProtocolError):
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[0] if errors else RecoveryFailed("no source")
