"""State trees for tests: strategies that make them, the trip through a snapshot without a network, and comparison."""

import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from everstep.recovery.assembly import Assembly
from everstep.recovery.dtypes import DTYPES
from everstep.recovery.landing import Landing
from everstep.recovery.layout import as_bytes
from everstep.recovery.manifest import CHUNK_BYTES_MIN, Limits, decode
from everstep.recovery.snapshot import Snapshot

NUMPY_TYPES = ["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16", ">i4", ">f8"]


def raw_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bit pattern at all, nan and denormal included; of bool only True and False."""
    size = dtype.itemsize * torch.Size(shape).numel()
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype is torch.bool:
        data &= 1
    return data.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """0-dim, zero-size, transposed, strided, shifted, and expanded ones, of every dtype."""
    dtype = draw(st.sampled_from(sorted(DTYPES.items())))[1]
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    tensor = raw_tensor(dtype, shape, draw(st.integers(0, 1000)))
    how = draw(st.sampled_from(["plain", "transposed", "strided", "shifted", "expanded", "parameter"]))
    if how == "transposed" and len(shape) > 1:
        return tensor.transpose(0, -1)
    if how == "strided" and shape:
        return tensor[..., ::2]
    if how == "shifted" and shape:
        return tensor[1:]
    if how == "expanded":
        return tensor.unsqueeze(0).expand(3, *shape)
    if how == "parameter" and dtype.is_floating_point:
        return torch.nn.Parameter(tensor)
    return tensor


def numpy_values() -> st.SearchStrategy[Any]:
    def make(name: str, shape: list[int], seed: int) -> np.ndarray[Any, Any]:
        kind = np.dtype(name)
        size = int(np.prod(shape)) * kind.itemsize
        data = np.random.default_rng(seed).integers(0, 2 if kind.kind == "b" else 256, size, np.uint8)
        return data.view(kind).reshape(shape)

    arrays = st.builds(make, st.sampled_from(NUMPY_TYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99))
    return arrays | arrays.map(lambda array: array.T) | arrays.filter(lambda array: array.size > 0).map(_first)


def _first(array: Any) -> Any:
    return array.reshape(-1)[0]


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def keys() -> st.SearchStrategy[str | int]:
    return texts() | st.integers(-(1 << 63), (1 << 64) - 1)


def leaves() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | texts() | st.binary(max_size=8)
    limits = st.sampled_from([-(1 << 63), -(1 << 63) - 1, (1 << 64) - 1, 1 << 64, -(1 << 200), 1 << 7, -(1 << 7)])
    return plain | limits | tensors() | numpy_values()


def trees() -> st.SearchStrategy[dict[str, Any]]:
    def contain(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts = st.dictionaries(keys(), inner, max_size=4)
        sequences = st.lists(inner, max_size=4)
        counters = st.dictionaries(keys(), st.integers(), max_size=3).map(Counter)
        return dicts | dicts.map(OrderedDict) | sequences | sequences.map(tuple) | counters

    return st.dictionaries(texts(), st.recursive(leaves(), contain, max_leaves=12), max_size=4)


def carried(state: Mapping[str, Any], chunk_bytes: int = CHUNK_BYTES_MIN) -> dict[str, Any]:
    """The state as a receiver builds it, from the very bytes that travel."""
    return assembled(Snapshot.take(state, chunk_bytes))


def assembled(snapshot: Snapshot) -> dict[str, Any]:
    assembly = Assembly(decode(snapshot.manifest_bytes, Limits()), Landing())
    for index, pieces in enumerate(assembly.chunks()):
        chunk = memoryview(b"".join(snapshot.chunk(index)))
        assert sum(len(piece) for piece in pieces) == len(chunk)
        for piece in pieces:
            piece[:], chunk = chunk[: len(piece)], chunk[len(piece) :]
    return assembly.tree()


def assert_same(there: Any, here: Any, path: str = "") -> None:
    """Equal in type and in every bit. `here` may hold what arrives as something simpler (see `flatten`)."""
    if isinstance(here, torch.Tensor):
        assert type(there) is torch.Tensor, path
        assert (there.dtype, there.shape) == (here.dtype, here.shape), path
        assert torch.equal(as_bytes(there.detach()), as_bytes(here.detach())), path
    elif isinstance(here, np.ndarray | np.generic):
        assert type(there) is type(here), path
        assert (there.dtype.newbyteorder("="), there.shape) == (here.dtype.newbyteorder("="), here.shape), path
        assert there.tobytes() == here.astype(here.dtype.newbyteorder("<")).tobytes(), path
    elif isinstance(here, dict):
        assert type(there) is type(here), path
        assert list(there) == list(here), path
        assert [type(key) for key in there] == [type(key) for key in here], path
        for key, value in here.items():
            assert_same(there[key], value, f"{path}.{key}")
    elif isinstance(here, list | tuple):
        assert type(there) is type(here), path
        assert len(there) == len(here), path
        for index, (their, mine) in enumerate(zip(there, here, strict=True)):
            assert_same(their, mine, f"{path}.{index}")
    elif isinstance(here, float):
        assert type(there) is float, path
        assert struct.pack("<d", there) == struct.pack("<d", here), path
    else:
        assert type(there) is type(here), path
        assert there == here, path
