"""What a snapshot consists of: the shape of its tree and where each tensor's bytes lie. Plain data, no bytes of state.

The tree is a flat list of nodes in preorder (a container is followed by its children), so that a hostile one cannot
nest deeper than the reader allows. The payload is the regions, one after another without gaps: a region is a run of
bytes that one tensor, or several tied ones, view. Byte order is little endian.

`decode` believes nothing: whatever it returns describes tensors that lie wholly inside their regions.
"""

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from everstep.errors import RemoteProtocolError
from everstep.recovery.dtypes import DTYPES

FORMAT = "everstep-state"
VERSION = 1
DEPTH_MAX = 64
DIMENSIONS_MAX = 64
SPREAD_CHARS_MAX = 4096
CHUNK_BYTES_MIN = 1 << 10
CHUNK_BYTES_MAX = 64 << 20
ARRAY_DIMENSIONS_MAX = 32  # of numpy before its version 2
_ITEM_BYTES_MAX = 16
_INT64_MAX = (1 << 63) - 1


class DictNode(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """`len(keys)` children follow. `kind` is "dict", "ordered" (OrderedDict), or "counter" (collections.Counter).

    `has_metadata`: one more child follows, the `_metadata` that torch hangs on a module's state_dict.
    """

    keys: tuple[str | int, ...]
    kind: str = "dict"
    has_metadata: bool = False


class ListNode(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """`count` children follow."""

    count: int


class TupleNode(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """`count` children follow."""

    count: int


class ShardedNode(msgspec.Struct, frozen=True, array_like=True, tag="S"):
    """A tensor spread over a group's ranks; its part on this rank follows. `shape` and `strides` are the whole's."""

    spread: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"tensor of shape {self.shape} spread {self.spread}"


class BigInt(msgspec.Struct, frozen=True, array_like=True, tag="i"):
    """An integer beyond 64 bits: two's complement, little endian."""

    data: bytes


class Blob(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """A bytes object; a node of its own, since a union may not hold both text and bytes."""

    data: bytes


class TensorNode(msgspec.Struct, frozen=True, array_like=True, tag="T"):
    """A strided view of a region. `strides` and `offset` count elements."""

    region: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.dtype} tensor of shape {self.shape}"


class ArrayNode(msgspec.Struct, frozen=True, array_like=True, tag="n"):
    """A numpy array (C order, fills its region), or the scalar of that type. `dtype` is numpy's, as "<f8"."""

    region: int
    dtype: str
    shape: tuple[int, ...]
    is_scalar: bool


Leaf = None | bool | int | float | str | Blob | BigInt | TensorNode | ArrayNode
Container = DictNode | ListNode | TupleNode | ShardedNode
Node = Leaf | Container


@dataclass(frozen=True)
class Sharded:
    """A spread tensor in a tree that has nodes as leaves; `local` is its part's."""

    node: ShardedNode
    local: object

    def __str__(self) -> str:
        return f"{self.node}, {self.local} of it here"


MakeSharded = Callable[[ShardedNode, object], object]


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The regions' sizes in the order of the payload, and the tree.

    `on_device`: regions that lie on the donor's accelerator; who does not know it reads the same manifest without.
    """

    format: str
    version: int
    chunk_bytes: int
    region_bytes: tuple[int, ...]
    nodes: tuple[Node, ...]
    on_device: tuple[int, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(self.region_bytes)

    @property
    def chunk_count(self) -> int:
        return -(-self.total_bytes // self.chunk_bytes)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Begin and end of a chunk within the payload."""
        begin = index * self.chunk_bytes
        return begin, min(begin + self.chunk_bytes, self.total_bytes)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a receiver is ready to believe of a peer."""

    manifest_bytes: int = 64 << 20
    payload_bytes: int = 1 << 42
    nodes: int = 8_000_000


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    return _encoder.encode(manifest)


def decode(data: bytes | bytearray, limits: Limits) -> Manifest:
    """Raises RemoteProtocolError, and nothing else, for anything that is not a sound manifest within `limits`."""
    if len(data) > limits.manifest_bytes:
        raise RemoteProtocolError(f"manifest of {len(data)} bytes; at most {limits.manifest_bytes} are accepted")
    try:
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise RemoteProtocolError(f"undecodable manifest: {error}") from error
    _check_header(manifest, limits)
    _check_nodes(manifest)
    return manifest


def children_of(node: Container) -> int:
    if isinstance(node, ShardedNode):
        return 1
    return len(node.keys) + node.has_metadata if isinstance(node, DictNode) else node.count


def build(
    manifest: Manifest, make_leaf: Callable[[Leaf], object], make_sharded: MakeSharded = Sharded
) -> dict[str, object]:
    """The tree that the nodes describe, with `make_leaf(node)` at its leaves and `make_sharded(node, local part)`."""
    tree = _build(iter(manifest.nodes), make_leaf, make_sharded)
    assert isinstance(tree, dict)
    return tree


def leaf_paths(manifest: Manifest) -> Iterator[tuple[str, Leaf]]:
    """Every leaf with its path, which no other leaf of a tree has."""
    nodes = iter(manifest.nodes)
    return _leaf_paths(next(nodes), nodes, "")


def _leaf_paths(node: Node, nodes: Iterator[Node], path: str) -> Iterator[tuple[str, Leaf]]:
    if not isinstance(node, Container):
        yield path, node
        return
    names: list[str] = [repr(key) for key in node.keys] if isinstance(node, DictNode) else []
    for index in range(children_of(node)):
        name = names[index] if index < len(names) else f"#{index}"
        yield from _leaf_paths(next(nodes), nodes, f"{path}/{name}")


def have_same_layout(one: Manifest, other: Manifest) -> bool:
    """The same tree and the same places in the payload; numbers and texts may differ."""
    if one.region_bytes != other.region_bytes or one.chunk_bytes != other.chunk_bytes:
        return False
    placed = (*Container.__args__, TensorNode, ArrayNode)
    return len(one.nodes) == len(other.nodes) and all(
        mine == theirs if isinstance(mine, placed) else not isinstance(theirs, placed)
        for mine, theirs in zip(one.nodes, other.nodes, strict=True)
    )


def _build(nodes: Iterator[Node], make_leaf: Callable[[Leaf], object], make_sharded: MakeSharded) -> object:
    node = next(nodes)
    if isinstance(node, ListNode):
        return [_build(nodes, make_leaf, make_sharded) for _ in range(node.count)]
    if isinstance(node, TupleNode):
        return tuple([_build(nodes, make_leaf, make_sharded) for _ in range(node.count)])
    if isinstance(node, DictNode):
        values = {key: _build(nodes, make_leaf, make_sharded) for key in node.keys}
        if node.kind == "counter":
            counter: Counter[str | int] = Counter()
            counter.update(values)
            return counter
        if node.kind == "dict":
            return values
        ordered = OrderedDict(values)
        if node.has_metadata:
            ordered._metadata = _build(nodes, make_leaf, make_sharded)  # type: ignore[attr-defined]
        return ordered
    if isinstance(node, ShardedNode):
        return make_sharded(node, _build(nodes, make_leaf, make_sharded))
    return make_leaf(node)


def _check_header(manifest: Manifest, limits: Limits) -> None:
    if manifest.format != FORMAT or manifest.version != VERSION:
        raise RemoteProtocolError(
            f"manifest of format {manifest.format[:40]!r} version {manifest.version}; this is {FORMAT!r} {VERSION}"
        )
    if not CHUNK_BYTES_MIN <= manifest.chunk_bytes <= CHUNK_BYTES_MAX:
        raise RemoteProtocolError(f"chunks of {manifest.chunk_bytes} bytes")
    if len(manifest.nodes) > limits.nodes:
        raise RemoteProtocolError(f"manifest of {len(manifest.nodes)} nodes; at most {limits.nodes} are accepted")
    if any(size < 0 for size in manifest.region_bytes):
        raise RemoteProtocolError("a region of negative size")
    if manifest.total_bytes > limits.payload_bytes:
        raise RemoteProtocolError(f"state of {manifest.total_bytes} bytes; at most {limits.payload_bytes} are accepted")


def _check_nodes(manifest: Manifest) -> None:
    """Counts add up to exactly one tree, it is not too deep, its leaves are sound, and every region is used."""
    root = manifest.nodes[0] if manifest.nodes else None
    if not isinstance(root, DictNode) or any(type(key) is not str for key in root.keys):
        raise RemoteProtocolError("the root of the state is not a dict of names")
    used: set[int] = set()
    open_children = [1]  # of each container that is being read; the root is the only child of nothing
    before: Node = None
    for node in manifest.nodes:
        if isinstance(before, ShardedNode) and not isinstance(node, TensorNode):
            raise RemoteProtocolError(f"a {before} without a tensor as its part")
        before = node
        while open_children and open_children[-1] == 0:
            open_children.pop()
        if not open_children:
            raise RemoteProtocolError("nodes beyond the end of the tree")
        open_children[-1] -= 1
        if isinstance(node, Container):
            _check_container(node, len(manifest.nodes))
            open_children.append(children_of(node))
            if len(open_children) > DEPTH_MAX + 1 + isinstance(node, ShardedNode):
                raise RemoteProtocolError(f"tree deeper than {DEPTH_MAX}")
        elif isinstance(node, TensorNode | ArrayNode):
            used.add(_check_place(node, manifest.region_bytes))
    if any(open_children):
        raise RemoteProtocolError("the tree is incomplete")
    if len(used) != len(manifest.region_bytes):
        raise RemoteProtocolError("a region that nothing lies in")
    arrays = {node.region for node in manifest.nodes if isinstance(node, ArrayNode)}
    if not set(manifest.on_device) <= used - arrays:
        raise RemoteProtocolError("a region on a device that holds no tensor")


def _check_container(node: Container, count_max: int) -> None:
    if isinstance(node, DictNode):
        if len(set(node.keys)) != len(node.keys):
            raise RemoteProtocolError("a key stands twice in one dict")
        if node.kind not in ("dict", "ordered", "counter") or (node.has_metadata and node.kind != "ordered"):
            raise RemoteProtocolError(f"a dict of kind {node.kind[:40]!r}")
    elif isinstance(node, ShardedNode):
        _check_sharded(node)
    elif not 0 <= node.count <= count_max:
        raise RemoteProtocolError(f"a container of {node.count} elements")


def _check_sharded(node: ShardedNode) -> None:
    sizes = (*node.shape, *node.strides)
    if len(node.shape) > DIMENSIONS_MAX or len(node.strides) != len(node.shape) or len(node.spread) > SPREAD_CHARS_MAX:
        raise RemoteProtocolError(f"a tensor of {len(node.shape)} dimensions, spread in {len(node.spread)} characters")
    if any(not 0 <= n <= _INT64_MAX for n in sizes) or math.prod(n or 1 for n in node.shape) > _INT64_MAX:
        raise RemoteProtocolError(f"shape {node.shape} and strides {node.strides} of a tensor that is spread")


def _check_place(node: TensorNode | ArrayNode, region_bytes: tuple[int, ...]) -> int:
    if not 0 <= node.region < len(region_bytes):
        raise RemoteProtocolError(f"region {node.region} of {len(region_bytes)}")
    if len(node.shape) > DIMENSIONS_MAX or any(not 0 <= n <= _INT64_MAX for n in node.shape):
        raise RemoteProtocolError(f"shape {node.shape[:DIMENSIONS_MAX]}")
    if math.prod(n or 1 for n in node.shape) * _ITEM_BYTES_MAX > _INT64_MAX:
        raise RemoteProtocolError(f"shape {node.shape} overflows")
    size = region_bytes[node.region]
    if isinstance(node, ArrayNode):
        _check_array(node, size)
    else:
        _check_view(node, size)
    return node.region


def _check_view(node: TensorNode, size: int) -> None:
    dtype = DTYPES.get(node.dtype)
    if dtype is None:
        raise RemoteProtocolError(f"dtype {node.dtype[:40]!r}")
    if len(node.strides) != len(node.shape) or any(not 0 <= s <= _INT64_MAX for s in (*node.strides, node.offset)):
        raise RemoteProtocolError(f"strides {node.strides[:DIMENSIONS_MAX]} and offset {node.offset} of {node}")
    last = node.offset + sum((max(n, 1) - 1) * stride for n, stride in zip(node.shape, node.strides, strict=True))
    if (last + 1) * dtype.itemsize > _INT64_MAX:  # of an empty tensor too: torch computes with it
        raise RemoteProtocolError(f"the strides of a {node} overflow")
    end = node.offset if math.prod(node.shape) == 0 else last + 1
    if end * dtype.itemsize > size:
        raise RemoteProtocolError(f"a {node} reaches beyond its region of {size} bytes")


def _check_array(node: ArrayNode, size: int) -> None:
    itemsize = array_itemsize(node.dtype)
    if itemsize is None:
        raise RemoteProtocolError(f"numpy dtype {node.dtype[:40]!r}")
    if len(node.shape) > (0 if node.is_scalar else ARRAY_DIMENSIONS_MAX) or math.prod(node.shape) * itemsize != size:
        raise RemoteProtocolError(f"a numpy {node.dtype} array of shape {node.shape} in a region of {size} bytes")


def array_itemsize(dtype: str) -> int | None:
    """Bytes of an element of a numpy dtype that may travel, None for any other: numbers, bool, complex."""
    return _ARRAY_DTYPES.get(dtype)


_ARRAY_DTYPES = {
    "|b1": 1,
    "|i1": 1,
    "|u1": 1,
    **{f"<{kind}{size}": size for kind, size in itertools.product("iu", (2, 4, 8))},
    **{f"<f{size}": size for size in (2, 4, 8)},
    **{f"<c{size}": size for size in (8, 16)},
}
