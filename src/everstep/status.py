"""What `everstep status` and the demo show of a job: its members, and where each group's time went."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

COUNTS = (("retries", "retries"), ("digest_errors", "digest errors"))
ACCOUNTS = ("training", "detecting", "reconfiguring", "recovering", "waiting", "absent")


def members_table(job: Mapping[str, Any]) -> Table:
    """`job` as in /api/v1/status, under `jobs`."""
    quorum = job["quorum"] or "none"
    title = f"quorum {quorum}, {job['failures']} failures"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("group", "incarnation", "state", "step", "doing", "for"):
        table.add_column(name, justify="right" if name in ("incarnation", "step", "for") else "left")
    for row in job["members"]:
        recovery = row["recovery"]
        section = progress(recovery) if recovery and recovery["outcome"] == "fetching" else row["section"]
        doing = f"{row['activity']} ({section})" if section else row["activity"]
        name, number, step = str(row["replica_id"]), str(row["incarnation"]), str(row["step"])
        table.add_row(name, number, row["state"], step, doing, f"{row['activity_s']:.1f} s")
    return table


def progress(recovery: Mapping[str, Any]) -> str:
    """A member's `recovery`, or one that has ended, as one phrase: `512 of 1074 MB, 431 MB/s, from 0#1, 1#1`."""
    done, total, rate = (recovery[name] / 1e6 for name in ("done_bytes", "total_bytes", "bytes_per_s"))
    if not total:
        return f"asking {', '.join(recovery['donors']) or 'nobody'} for the state"
    digits = 0 if total >= 100 else 2
    words = [f"{done:.{digits}f} of {total:.{digits}f} MB", f"{rate:.0f} MB/s"]
    words.append(f"from {', '.join(recovery['donors']) or 'nobody'}")
    words += [f"{said} {recovery[name]}" for name, said in COUNTS if recovery[name]]
    return ", ".join(words)


def ledger_table(ledger: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a group, in seconds. `ledger` as in a job's status; each row's accounts add up to its last column."""
    # Narrow gaps: it fits into 80 columns with its headings whole.
    table = Table(title="seconds of each group", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = False
    table.add_column("group")
    for name in (*ACCOUNTS, "wall"):
        table.add_column(name, justify="right")
    for group, spent in sorted(ledger.items()):
        table.add_row(group, *(_seconds(spent[f"{name}_s"]) for name in (*ACCOUNTS, "wall")))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 1000 else f"{seconds:.0f}"
