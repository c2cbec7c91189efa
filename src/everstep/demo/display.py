"""What a person sees of the demo: a live table in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

LINE_INTERVAL_S = 2.0
STYLES = {"killed": "bold red", "starting": "yellow", "starting again": "yellow", "done": "green"}


class Row(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def state(self) -> str: ...


class Display:
    """Context manager. Writes to `console`; `is_quiet` shows nothing."""

    def __init__(self, console: Console, is_quiet: bool = False) -> None:
        self._console = console
        self._is_quiet = is_quiet
        self._live: Live | None = None
        self._started_at = time.monotonic()
        self._line_at = 0.0

    def __enter__(self) -> "Display":
        if self._console.is_terminal and not self._is_quiet:
            self._live = Live(console=self._console, refresh_per_second=8, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """One line about an event."""
        if not self._is_quiet:
            elapsed_s = time.monotonic() - self._started_at
            self._console.print(f"[dim]{elapsed_s:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True)

    def show(self, groups: Sequence[Row], act: str) -> None:
        if self._is_quiet:
            return
        if self._live is not None:
            self._live.update(_table(groups, act))
            return
        now = time.monotonic()
        if now >= self._line_at:
            self._line_at = now + LINE_INTERVAL_S
            self.say("   ".join(_line(group) for group in groups))


def _line(group: Row) -> str:
    return f"group {group.number}: " + (f"step {group.step} loss {group.loss:.3f} " if group.step else "") + group.state


def _table(groups: Sequence[Row], act: str) -> Table:
    table = Table(title=act, title_justify="left", expand=False)
    for name, justify in (("group", "right"), ("step", "right"), ("loss", "right")):
        table.add_column(name, justify=justify, min_width=7)  # type: ignore[arg-type]
    table.add_column("state", min_width=24)
    for group in groups:
        style = STYLES.get(group.state, "")
        table.add_row(str(group.number), str(group.step), f"{group.loss:.3f}", group.state, style=style)
    return table
