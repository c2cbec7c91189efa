"""What a broken or hostile peer makes of valid bytes: flips, cuts, splices, lies about lengths, nests without end."""

from collections.abc import Callable, Sequence

import msgspec
from hypothesis import strategies as st

# MessagePack's headers with a length of their own, saying 4 GiB and 2**40 where they can; and fixed ones.
HUGE = (
    b"\xdb\xff\xff\xff\xff",  # str 32
    b"\xc6\xff\xff\xff\xff",  # bin 32
    b"\xdd\xff\xff\xff\xff",  # array 32
    b"\xdf\xff\xff\xff\xff",  # map 32
    b"\xc9\xff\xff\xff\xff\x01",  # ext 32
    b"\xd9\xff",
    b"\xcf\x00\x00\x01\x00\x00\x00\x00\x00",  # uint 64: 2**40
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",  # int 64: the smallest
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # float 64: nan
    b"\xff" * 8,
    (1 << 40).to_bytes(8, "big"),
    (1 << 40).to_bytes(8, "little"),
)
NESTS = (b"\x91", b"\x81\xa1a", b"\x81\xc0", b"[", b'{"":', b"\xdc\x00\x01")
TEXTS = (b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\x00", b"\xc1", "²".encode())

Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn, others: Sequence[bytes] = (b"",)) -> Damage:
    """One way to spoil bytes; `others` are spliced in."""
    kind = draw(
        st.sampled_from(("flip", "cut", "drop", "double", "insert", "replace", "huge", "nest", "splice", "append"))
    )
    where = draw(st.floats(0, 1, exclude_max=True))
    length = draw(st.integers(1, 16))
    if kind == "nest":
        put = draw(st.sampled_from(NESTS)) * draw(st.sampled_from((3, 70, 1500, 30_000)))
    elif kind == "huge":
        put = draw(st.sampled_from(HUGE))
    elif kind == "splice":
        other = draw(st.sampled_from(others))
        put = other[int(where * len(other)) :]
    else:
        put = draw(st.binary(min_size=1, max_size=24) | st.sampled_from(TEXTS))
    bit = draw(st.integers(0, 7))

    def spoil(data: bytes) -> bytes:
        at = int(where * len(data))
        match kind:
            case "flip":
                return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] if data else data
            case "cut":
                return data[:at]
            case "drop":
                return data[:at] + data[at + length :]
            case "double":
                return data[: at + length] + data[at:]
            case "insert":
                return data[:at] + put + data[at:]
            case "append":
                return data + put
            case "splice":
                return data[:at] + put
            case _:
                return data[:at] + put + data[at + len(put) :]

    return spoil


@st.composite
def spoiled(draw: st.DrawFn, valid: st.SearchStrategy[bytes], others: Sequence[bytes] = (b"",)) -> bytes:
    """Valid bytes after one to four damages, now and then none; or just any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = draw(valid)
    for damage in draw(st.lists(damages(others), max_size=4)):
        data = damage(data)
    return data


def packed(values: st.SearchStrategy[object]) -> st.SearchStrategy[bytes]:
    """Their MessagePack. What MessagePack cannot say (an integer beyond 64 bits) becomes a frame without meaning."""
    return values.map(_packed)


def _packed(value: object) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return b"\xc0"
