"""A recorded story told again: each command with what the machines did then."""

from collections.abc import Callable


def told_again(recorded: str, run: Callable[[str], str]) -> str:
    """`run` carries out one command, a line that begins with `> `, and says what happened; comments stay."""
    lines = []
    for line in recorded.splitlines():
        if line.startswith("> "):
            lines.append("\n".join(filter(None, [line, run(line[2:])])))
        elif line.startswith("#") or not line:
            lines.append(line)
    return "\n".join(lines) + "\n"
