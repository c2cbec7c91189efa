"""Regenerates the tables of documents from the code: `make docs`, or `python docs/generate.py [--check]`.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything else in the file is written by hand.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from everstep import exit_codes
from everstep.core import (
    ledger,
    messages,
    moves,
    node_messages,
    recovery_report,
    rendezvous_nodes,
    replica,
    roster,
    round_store,
    types,
    worker_book,
)
from everstep.core import node as nodes
from everstep.core.resolution import resolve
from everstep.core.transitions import TRANSITIONS, Turn
from everstep.core.types import Action, LineageEntry, MemberId, Phase, QuorumId, Report, genesis
from everstep.launcher.hang_options import FT_KEYS, FT_LAUNCHER_OPTIONS
from everstep.launcher.option import Fate, Option
from everstep.launcher.options import OUR_OPTIONS
from everstep.launcher.torchrun_options import TORCHRUN_OPTIONS
from everstep.link import auth, client, codec, server

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the file is stale")
    args = parser.parse_args(argv)
    is_stale = False
    for name, blocks in DOCUMENTS.items():
        path = DOCS / name
        text = path.read_text(encoding="utf-8")
        fresh = rendered(name, text, blocks)
        if args.check and text != fresh:
            sys.stderr.write(f"{name} is stale: run `make docs`\n")
            is_stale = True
        elif not args.check:
            path.write_text(fresh, encoding="utf-8")
    return int(is_stale)


def rendered(name: str, text: str, blocks: dict[str, Callable[[], Iterator[str]]]) -> str:
    """`text` with every generated block made anew. A block that nobody knows, or that is missing, is an error."""
    seen = [block for _, block, _ in BLOCK.findall(text)]
    if sorted(seen) != sorted(blocks):
        raise SystemExit(f"{name} has the blocks {sorted(seen)}, expected {sorted(blocks)}")

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n" + "\n".join(blocks[match[2]]()) + f"\n\n{match[3]}"

    return BLOCK.sub(fill, text)


# ---- messages and values


def _handshake() -> Iterator[str]:
    yield from _structs([auth.Challenge, auth.Answer, auth.Accepted])


def _to_lighthouse() -> Iterator[str]:
    yield from _structs(messages.ToLighthouse.__args__)


def _to_member() -> Iterator[str]:
    yield from _structs(messages.ToMember.__args__)


def _from_node() -> Iterator[str]:
    yield from _structs(node_messages.FromNode.__args__)


def _to_node() -> Iterator[str]:
    yield from _structs(node_messages.ToNode.__args__)


def _node_values() -> Iterator[str]:
    yield from _structs(
        [node_messages.NodeSpec, node_messages.RoundInfo, node_messages.ExcludedNode, types.RendezvousRound]
    )
    for kind in (
        node_messages.NodeRefusal,
        node_messages.CloseScope,
        node_messages.StoreOp,
        node_messages.StoreStatus,
        node_messages.RankNews,
    ):
        yield ""
        yield f"### {kind.__name__}"
        yield ""
        yield from _table(("value", ""), [(f"`{value}`", comment) for _, value, comment in _choices(kind)])


def _values() -> Iterator[str]:
    kinds = ["Report", "Quorum", "Member", "MemberId", "QuorumId", "FailureRound", "Lineage", "LineageEntry"]
    told = [ledger.Spent, recovery_report.RecoveryReport]
    yield from _structs([messages.MembersChange, *(getattr(types, kind) for kind in kinds), *told])


def _structs(kinds: Iterable[Any]) -> Iterator[str]:
    for index, kind in enumerate(kinds):
        if index:
            yield ""
        config = kind.__struct_config__
        form = "array" if config.array_like else f'map, `type: "{config.tag}"`'
        yield f"### {kind.__name__} ({form})"
        yield ""
        if _docstring(kind):
            yield _docstring(kind)
            yield ""
        rows = [(f"`{name}`", f"`{kind_}`", default, comment) for name, kind_, default, comment in _fields(kind)]
        if rows:
            yield from _table(("field", "type", "default", ""), rows)
        else:
            yield "No fields."


def _fields(kind: Any) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and the comment beside it, as they stand in the source."""
    lines = inspect.getsource(kind).splitlines()
    for node in _body(kind):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = f"`{ast.unparse(node.value)}`" if node.value is not None else "required"
            yield node.target.id, ast.unparse(node.annotation).strip("'"), default, _comment(lines, node)


# ---- the member


def _phases() -> Iterator[str]:
    rows = [(f"`{name}`", str(value), comment) for name, value, comment in _choices(Phase)]
    yield from _table(("phase", "on the wire", ""), rows)


def _transitions() -> Iterator[str]:
    rows = []
    for turn in Turn:
        cells = [f"→ {to.name}" if (to := TRANSITIONS.get((phase, turn))) is not None else "" for phase in Phase]
        rows.append((f"`{turn.name}`", *cells, turn.value))
    yield from _table(("turn", *(f"in {phase.name}" for phase in Phase), "when"), rows)


def _moves() -> Iterator[str]:
    rows = [(f"`{kind.__name__}`", _docstring(kind)) for kind in moves.Move.__args__]
    yield from _table(("move", "the training thread"), rows)


def _events() -> Iterator[str]:
    rows = [(f"`{kind.__name__}`", _docstring(kind)) for kind in moves.ReplicaEvent.__args__]
    yield from _table(("event", "when"), rows)


# ---- decisions


def _actions() -> Iterator[str]:
    rows = [(f"`{name}`", str(value), comment) for name, value, comment in _choices(Action)]
    yield from _table(("action", "on the wire", ""), rows)


def _resolutions() -> Iterator[str]:
    """What `resolve` says of every pair of survivors."""
    standings = _standings()
    rows = []
    for row, (name, report) in enumerate(standings):
        cells = [_decision(report, other) if row <= column else "" for column, (_, other) in enumerate(standings)]
        if any(cells):
            rows.append((f"**{name}**", *cells))
    yield from _table(("", *(name for name, _ in standings)), rows)


def _standings() -> list[tuple[str, Report]]:
    """What a survivor may report while the highest step is 1 and the highest attempt at it is 1."""
    quorum = QuorumId(1, 1)
    before = genesis("h")
    last = LineageEntry(1, 0, quorum, 3)
    here = before.extended(last)

    def report(phase: Phase, vote: bool | None = None, tag: LineageEntry | None = None, **changes: Any) -> Report:
        is_late, attempt = changes.get("is_late", False), changes.get("attempt", 1)
        lineage = before if is_late else here
        return Report(MemberId("0", 1), quorum, True, lineage, 0 if is_late else attempt, phase, vote, tag)

    tag = LineageEntry(2, 1, quorum, 3)
    return [
        ("RUNNING", report(Phase.RUNNING)),
        ("REDUCED", report(Phase.REDUCED, None, tag)),
        ("REDUCED, another tag", report(Phase.REDUCED, None, LineageEntry(2, 1, quorum, 3, b"more"))),
        ("VOTING, ok", report(Phase.VOTING, True, tag)),
        ("VOTING, no", report(Phase.VOTING, False, tag)),
        ("an attempt behind", report(Phase.VOTING, True, LineageEntry(2, 0, quorum, 3), attempt=0)),
        ("a step behind, ok", report(Phase.VOTING, True, last, is_late=True)),
    ]


def _decision(*reports: Report) -> str:
    if all(report.step == 0 for report in reports) or all(report.attempt == 0 for report in reports):
        return ""  # nobody is behind anybody
    return resolve(reports).action.name


def _causes() -> Iterator[str]:
    rows = [(f"`{value}`", comment) for _, value, comment in _choices(messages.Cause)]
    yield from _table(("cause", ""), rows)


def _refusals() -> Iterator[str]:
    rows = [(f"`{value}`", comment) for _, value, comment in _choices(types.RefusalCode)]
    yield from _table(("code", ""), rows)


def _limits() -> Iterator[str]:
    bounds = [
        (codec, "FRAME_BYTES_MAX", "one message"),
        (auth, "HANDSHAKE_BYTES_MAX", "one message of the handshake"),
        (auth, "HANDSHAKE_S", "from the accepted connection to Accepted"),
        (server, "SEND_BYTES_MAX", "unread by one receiver, who then loses its link"),
        (server, "LINKS_MAX", "connections of one lighthouse"),
        (server, "HANDSHAKES_MAX", "unauthenticated connections served at once"),
        (client, "QUEUE_MESSAGES_MAX", "waiting to be sent by a member"),
        (client, "RETRY_MAX_S", "between a member's attempts to connect again"),
        (replica, "FAILED_AGAIN_S", "until a failure that nobody reacted to is reported again"),
        (roster, "LISTS_KNOWN_MAX", "member lists that the lighthouse counts on a member to keep"),
        (rendezvous_nodes, "NODES_MAX", "nodes of one rendezvous"),
        (worker_book, "WORKERS_MAX", "workers of one agent"),
        (nodes, "ENDED_KEPT_MAX", "workers whose end a node says again on a new link"),
        (worker_book, "KEPT_MAX", "workers of a job that have ended, or are to end, that the lighthouse knows"),
        (round_store, "KEYS_MAX", "keys of a round's store"),
        (round_store, "VALUE_BYTES_MAX", "bytes of one value there"),
        (round_store, "STORE_BYTES_MAX", "bytes of all of them"),
        (types, "REPLICA_ID_CHARS_MAX", "characters of a replica_id"),
        (types, "JOB_ID_CHARS_MAX", "characters of a job_id"),
    ]
    rows = [(f"`{name}`", f"{getattr(module, name):,}", what) for module, name, what in bounds]
    yield from _table(("limit", "value", "of what"), rows)


# ---- the launcher


def _torchrun_options() -> Iterator[str]:
    rows = [(_flags(o), _default(o), f"{o.fate.value}{': ' if o.note else ''}{o.note}") for o in TORCHRUN_OPTIONS]
    yield from _table(("option", "default", "under `everstep run`"), rows)


def _our_options() -> Iterator[str]:
    rows = [(_flags(o), f"`{o.variable}`" if o.variable else "", o.help) for o in OUR_OPTIONS]
    yield from _table(("option", "variable", ""), rows)


def _hang_settings() -> Iterator[str]:
    """Those that mean something here, then those that mean nothing, then those that are refused."""
    order = [Fate.HONOURED, Fate.TRANSLATED, Fate.WITHOUT_EFFECT, Fate.REFUSED]
    rows = []
    for key in sorted(FT_KEYS, key=lambda key: order.index(key.fate)):
        accepted = " or ".join(f"`{word}`" for word in key.accepts if word)
        note = f"{key.note[0].upper()}{key.note[1:]}"
        note = f"{note.rstrip('.')}; accepted: {accepted}" if accepted else note
        name = f"`{key.name}`" + (" (ours)" if key.is_new else "")
        rows.append((name, key.form.value, f"`{key.default}`" if key.default else "", key.fate.value, note))
    yield from _table(("key", "value", "default", "fate", ""), rows)


def _ft_launcher_options() -> Iterator[str]:
    rows = [
        (_flags(o), o.fate.value, f"{o.help} {o.note}".strip() if o.note != o.help else o.help)
        for o in FT_LAUNCHER_OPTIONS
    ]
    yield from _table(("option", "fate", ""), rows)


def _flags(option: Option) -> str:
    return ", ".join(f"`{flag}`" for flag in option.flags if "_" not in flag)


def _default(option: Option) -> str:
    if option.default is None or option.default is False or option.default in ("", ()):
        return ""
    return f"`{option.default}`"


def _exit_codes() -> Iterator[str]:
    kind = exit_codes.ExitCode
    rows = [(str(value), f"`{name}`", comment) for name, value, comment in _choices(kind)]
    rows.append(("128+n", "", "signal n ended it: 137 is SIGKILL, 143 SIGTERM, 139 a segmentation fault"))
    yield from _table(("code", "`ExitCode`", "means"), rows)


# ---- reading source, writing Markdown


def _choices(kind: Any) -> Iterator[tuple[str, object, str]]:
    lines = inspect.getsource(kind).splitlines()
    for node in _body(kind):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            yield name, kind[name].value, _comment(lines, node)


def _body(kind: Any) -> list[ast.stmt]:
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    return tree.body


def _comment(lines: list[str], node: ast.stmt) -> str:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    _, _, comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")
    return comment


def _docstring(kind: Any) -> str:
    """In one line; a generated one (a dataclass's signature) is none."""
    text = kind.__doc__ or ""
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.split())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


PROTOCOL: dict[str, Callable[[], Iterator[str]]] = {
    "handshake": _handshake,
    "to_lighthouse": _to_lighthouse,
    "to_member": _to_member,
    "values": _values,
    "from_node": _from_node,
    "to_node": _to_node,
    "node_values": _node_values,
    "phases": _phases,
    "transitions": _transitions,
    "moves": _moves,
    "events": _events,
    "actions": _actions,
    "resolutions": _resolutions,
    "causes": _causes,
    "refusals": _refusals,
    "limits": _limits,
}
DOCUMENTS = {
    "protocol.md": PROTOCOL,
    "launcher.md": {"torchrun_options": _torchrun_options, "our_options": _our_options},
    "hangs.md": {"hang_settings": _hang_settings, "ft_launcher_options": _ft_launcher_options},
    "exit-codes.md": {"exit_codes": _exit_codes},
}

if __name__ == "__main__":
    sys.exit(main())
