"""Real text that every Python has: the standard library's own sources."""

import sysconfig
from pathlib import Path

TEXT_BYTES = 2 << 20


def standard_library_text(size: int = TEXT_BYTES) -> bytes:
    """The first `size` bytes of the top-level modules' sources, in alphabetical order: the same in every process."""
    parts: list[bytes] = []
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        content = path.read_bytes()
        parts.append(content)
        total += len(content)
        if total >= size:
            break
    return b"".join(parts)[:size]
