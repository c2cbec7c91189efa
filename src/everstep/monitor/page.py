"""The page that a worker writes and its agent reads: what is where.

Every fact is one aligned 64-bit word, stored and loaded in one piece, so no reader ever sees half of it, and no lock or
sequence is needed. A section's word says both whether it is open and since when: `nanoseconds << 1 | is_open`. A row
belongs to one name on one thread, and its name is written before the row is counted. Only the letter, which is longer
than a word and seldom written, has a checksum.

    words 0..63: header | ROWS_MAX rows of 16 words | the letter | from STACKS_OFFSET on: stacks

Times are nanoseconds of the monotonic clock, which all processes of a host share.
"""

import json
import mmap
import os
import zlib
from collections.abc import Callable
from typing import Any

from everstep.monitor.first import OPEN_FLAGS, STACKS_OFFSET

MAGIC = 0x3230455041475645  # "EVGAPE02"
# Words of the header.
W_MAGIC, W_PID, W_ROWS, W_FLAGS = 0, 1, 2, 3
W_BEAT, W_BEAT_COUNT, W_BEAT_LONGEST = 4, 5, 6
W_OUT_COUNT, W_OUT_LONGEST = 8, 9
W_LETTER_BYTES, W_LETTER_CRC = 11, 12
W_FACTOR = 13  # the agent's safety factor, in millionths; all else is the worker's
FACTOR_UNIT = 1_000_000
FLAG_OVER = 1  # watch me no more

ROWS = 64
ROW_WORDS = 16
ROWS_MAX = 256
# Words of a row.
R_SECTION, R_THREAD, R_FLAGS, R_COUNT, R_LONGEST, R_NAME_BYTES, R_NAME = 0, 1, 2, 3, 4, 5, 6
FLAG_WAITS, FLAG_MIXED, FLAG_WARM = 1, 2, 4  # warm: this process has had the first ones
NAME_BYTES_MAX = 8 * (ROW_WORDS - R_NAME)

LETTER = ROWS + ROWS_MAX * ROW_WORDS
LETTER_BYTES_MAX = 16384
WORDS = LETTER + LETTER_BYTES_MAX // 8
PAGE_BYTES = 8 * WORDS
assert PAGE_BYTES <= STACKS_OFFSET

Words = memoryview


def blank() -> Words:
    """One that nobody reads: so that a worker without an agent does what every worker does."""
    return memoryview(bytearray(PAGE_BYTES)).cast("Q")


def new_page(safety_factor: float = 0.0) -> tuple[int, Words]:
    """The agent's side: a file without a name that lives as long as somebody has it open, and a mapping of it."""
    fd = os.memfd_create("everstep-monitor", os.MFD_CLOEXEC)
    os.ftruncate(fd, STACKS_OFFSET)
    words = _map(fd)
    words[W_MAGIC] = MAGIC
    words[W_FACTOR] = int(safety_factor * FACTOR_UNIT)
    return fd, words


def open_page(path: str) -> tuple[int, Words]:
    """The worker's side. Raises OSError."""
    fd = os.open(path, OPEN_FLAGS)
    try:
        if os.fstat(fd).st_size < STACKS_OFFSET:
            raise OSError(f"{path} is no page of a monitor")
        words = _map(fd)
        if words[W_MAGIC] != MAGIC:
            raise OSError(f"{path} is the page of another version's monitor")
    except BaseException:
        os.close(fd)
        raise
    return fd, words


def _map(fd: int) -> Words:
    return memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("Q")


def close_map(words: Words) -> None:
    """What `new_page` mapped."""
    mapping = words.obj
    words.release()
    if isinstance(mapping, mmap.mmap):
        mapping.close()


def write_name(words: Words, row: int, name: str) -> None:
    at = ROWS + row * ROW_WORDS
    data = name.encode()[:NAME_BYTES_MAX]
    padded = data.ljust(NAME_BYTES_MAX, b"\0")
    words[at + R_NAME : at + ROW_WORDS] = memoryview(padded).cast("Q")
    words[at + R_NAME_BYTES] = len(data)


def read_name(words: Words, row: int) -> str:
    at = ROWS + row * ROW_WORDS
    length = min(words[at + R_NAME_BYTES], NAME_BYTES_MAX)
    return words[at + R_NAME : at + ROW_WORDS].tobytes()[:length].decode(errors="replace")


def write_letter(words: Words, letter: dict[str, Any]) -> None:
    """Replace the letter to the agent. A reader that comes meanwhile finds that the checksum is wrong, and waits."""
    data = json.dumps(letter, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > LETTER_BYTES_MAX:
        raise ValueError(f"a letter of {len(data)} bytes; {LETTER_BYTES_MAX} at most")
    words[W_LETTER_BYTES] = 0
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    words[LETTER : LETTER + len(padded) // 8] = memoryview(padded).cast("Q")
    words[W_LETTER_CRC] = zlib.crc32(data)
    words[W_LETTER_BYTES] = len(data)


def read_letter(words: Words, is_new: Callable[[int], bool]) -> dict[str, Any] | None:
    """The letter, whole; None when there is none, it is being written, or `is_new(its checksum)` says no."""
    length, crc = words[W_LETTER_BYTES], words[W_LETTER_CRC]
    if not 0 < length <= LETTER_BYTES_MAX or not is_new(crc):
        return None
    data = words[LETTER : LETTER + -(-length // 8)].tobytes()[:length]
    if zlib.crc32(data) != crc:
        return None
    letter = json.loads(data)
    return letter if isinstance(letter, dict) else None
