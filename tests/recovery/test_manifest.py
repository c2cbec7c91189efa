"""`decode` believes nothing: what it returns can be built, and all else is a RemoteProtocolError."""

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.errors import ConfigError, RemoteProtocolError, StateMismatch
from everstep.recovery import Landing, Limits, Snapshot
from everstep.recovery.assembly import Assembly, plain_leaf
from everstep.recovery.fit import check_fit
from everstep.recovery.manifest import (
    CHUNK_BYTES_MIN,
    DEPTH_MAX,
    FORMAT,
    VERSION,
    ArrayNode,
    BigInt,
    Blob,
    DictNode,
    ListNode,
    Manifest,
    Node,
    ShardedNode,
    TensorNode,
    TupleNode,
    build,
    decode,
    encode,
)

LIMITS = Limits(manifest_bytes=1 << 16, payload_bytes=1 << 16, nodes=200)
HUGE = 1 << 62


def manifest(*nodes: Node, regions: tuple[int, ...] = (), chunk_bytes: int = CHUNK_BYTES_MIN) -> Manifest:
    return Manifest(FORMAT, VERSION, chunk_bytes, regions, nodes)


def of_one(node: Node, *regions: int) -> Manifest:
    return manifest(DictNode(("a",)), node, regions=regions)


def try_to_use(data: bytes) -> None:
    """As a receiver does: decode, compare, make the tensors. Only documented errors may come out."""
    try:
        decoded = decode(data, LIMITS)
        check_fit(build(decoded, plain_leaf), {"a": torch.ones(2), "b": {"c": [torch.ones(1)]}}, frozenset({"b"}))
    except (RemoteProtocolError, StateMismatch):
        pass
    try:
        decoded = decode(data, LIMITS)
    except RemoteProtocolError:
        return
    Assembly(decoded, Landing()).tree()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_sound(data: bytes) -> None:
    try_to_use(data)


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_manifest_is_refused_or_sound(data: st.DataObject) -> None:
    state = {"a": torch.ones(3, 4).T, "b": {"c": [torch.ones(1), (1 << 80)], 5: "text"}, "d": torch.ones(2)[:0]}
    damaged = bytearray(encode(Snapshot.take(state).manifest))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try_to_use(bytes(damaged))


def numbers() -> st.SearchStrategy[int]:
    return st.integers(-1, 5) | st.sampled_from([HUGE, HUGE - 1, 1 << 31, 1 << 33, (1 << 63) - 1])


def nodes() -> st.SearchStrategy[Any]:
    tuples = st.lists(numbers(), max_size=3).map(tuple)
    dtypes = st.sampled_from(["float32", "uint8", "complex128", "int4", "qint8", "<f4", "|b1", "object", ""])
    kinds = st.sampled_from(["dict", "ordered", "counter", "pickle"])
    keys = st.lists(st.sampled_from(["a", "b", "c", 5, -1]), max_size=3).map(tuple)
    return (
        st.builds(TensorNode, numbers(), dtypes, tuples, tuples, numbers())
        | st.builds(ArrayNode, numbers(), dtypes, tuples, st.booleans())
        | st.builds(DictNode, keys, kinds, st.booleans())
        | st.builds(ListNode, numbers())
        | st.builds(TupleNode, numbers())
        | st.builds(BigInt, st.binary(max_size=9))
        | st.builds(Blob, st.binary(max_size=3))
        | st.sampled_from([None, True, 1, 1.5, "a"])
    )


@given(nodes(), nodes(), st.lists(numbers(), max_size=2), numbers())
@settings(max_examples=200)
def test_lies_about_shapes_counts_and_places_are_refused(first: Any, second: Any, sizes: list[int], chunk: int) -> None:
    for tree in ((first, second), (DictNode(("a",)), first), (DictNode(("a", "b")), first, second)):
        whole = Manifest(FORMAT, VERSION, chunk if chunk > 5 else CHUNK_BYTES_MIN, tuple(sizes), tree)
        try_to_use(encode(whole))


BAD = {
    "the root is no dict": manifest(ListNode(0)),
    "a root key is no name": manifest(DictNode((1,)), 1),
    "no node": manifest(),
    "incomplete": manifest(DictNode(("a", "b")), 1),
    "too many nodes": manifest(DictNode(("a",)), 1, 2),
    "a key twice": manifest(DictNode(("a", "a")), 1, 2),
    "negative count": of_one(ListNode(-1)),
    "count beyond all": of_one(ListNode(HUGE)),
    "kind": manifest(DictNode(("a",), "set"), 1),
    "metadata of a plain dict": manifest(DictNode((), "dict", True), 1),
    "too deep": manifest(DictNode(("a",)), *[ListNode(1)] * DEPTH_MAX, 1),
    "unused region": of_one(1, 4),
    "no such region": of_one(TensorNode(1, "float32", (1,), (1,), 0), 4),
    "negative region": of_one(TensorNode(-1, "float32", (1,), (1,), 0), 4),
    "longer than its region": of_one(TensorNode(0, "float32", (2,), (1,), 0), 4),
    "strided beyond its region": of_one(TensorNode(0, "float32", (2,), (2,), 0), 8),
    "shifted beyond its region": of_one(TensorNode(0, "float32", (1,), (1,), 1), 4),
    "empty but beyond its region": of_one(TensorNode(0, "float32", (0,), (1,), 1), 0),
    "negative shape": of_one(TensorNode(0, "float32", (-1,), (1,), 0), 4),
    "negative stride": of_one(TensorNode(0, "float32", (2,), (-1,), 1), 8),
    "negative offset": of_one(TensorNode(0, "float32", (1,), (1,), -1), 4),
    "strides of another length": of_one(TensorNode(0, "float32", (1,), (1, 1), 0), 4),
    "elements overflow": of_one(TensorNode(0, "float32", (HUGE, HUGE), (0, 0), 0), 4),
    "strides of an empty one overflow": of_one(TensorNode(0, "float32", (3, 0), (HUGE, 1), 0), 0),
    "65 dimensions": of_one(TensorNode(0, "uint8", (1,) * 65, (1,) * 65, 0), 1),
    "dtype": of_one(TensorNode(0, "object", (1,), (1,), 0), 8),
    "quantized": of_one(TensorNode(0, "qint8", (1,), (1,), 0), 1),
    "numpy object": of_one(ArrayNode(0, "|O8", (1,), False), 8),
    "array of another size": of_one(ArrayNode(0, "<f4", (2,), False), 4),
    "empty array too big": of_one(ArrayNode(0, "<f8", (0, HUGE), False), 0),
    "scalar with a shape": of_one(ArrayNode(0, "<f4", (1,), True), 4),
    "negative size": of_one(1, -4),
    "oversize": of_one(TensorNode(0, "uint8", (1 << 20,), (1,), 0), 1 << 20),
    "tiny chunks": manifest(DictNode(()), chunk_bytes=1),
    "huge chunks": manifest(DictNode(()), chunk_bytes=1 << 40),
    "too many": manifest(DictNode(("a",)), ListNode(300), *[None] * 300),
    "format": Manifest("pickle", VERSION, CHUNK_BYTES_MIN, (), (DictNode(()),)),
    "version": Manifest(FORMAT, VERSION + 1, CHUNK_BYTES_MIN, (), (DictNode(()),)),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unsound_manifest_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(encode(BAD[name]), LIMITS)


def test_something_else_altogether_is_refused() -> None:
    sound = encode(manifest(DictNode(())))
    for foreign in (b"", b"\x80\x04K\x01.", b"<html>", sound[:-1], sound + b"\0", msgspec.msgpack.encode({"nodes": 1})):
        with pytest.raises(RemoteProtocolError):
            decode(foreign, LIMITS)
    with pytest.raises(RemoteProtocolError, match="at most 3 are accepted"):
        decode(sound, Limits(manifest_bytes=3))


# ---- whether it fits


def fit(theirs: dict[str, Any], own: dict[str, Any]) -> None:
    check_fit(build(Snapshot.take(theirs).manifest, plain_leaf), own, frozenset({"model"}))


def test_a_member_that_has_not_stepped_accepts_a_full_optimizer() -> None:
    def state_of(steps: int) -> dict[str, Any]:
        module = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(steps):
            module(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return {"model": module.state_dict(), "optimizer": optimizer.state_dict()}

    fit(state_of(2), state_of(0))
    fit(state_of(2), state_of(1))
    fit(state_of(0), state_of(1))


def test_a_mismatch_names_the_path_and_both_shapes_or_dtypes() -> None:
    own = {"model": {"w": torch.ones(2, 3), "b": torch.ones(2)}, "optimizer": {"state": {0: {"m": torch.ones(2, 3)}}}}
    peer = {"model": {"w": torch.ones(3, 2), "b": torch.ones(2).half()}, "optimizer": {"state": {0: {"m": [1]}}}}
    with pytest.raises(StateMismatch) as caught:
        fit(peer, own)
    said = str(caught.value)
    assert "model.w is a float32 tensor of shape (2, 3) here and a float32 tensor of shape (3, 2) there" in said
    assert "model.b is a float32 tensor of shape (2,) here and a float16 tensor of shape (2,) there" in said
    assert "optimizer.state.0.m is a float32 tensor of shape (2, 3) here and a list there" in said
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("theirs", "own", "said"),
    [
        ({"model": {}}, {"model": {"w": torch.ones(1)}}, "model.w is missing there"),
        ({"model": {"w": torch.ones(1)}}, {"model": {}}, "model.w is unknown here"),
        ({"model": {}}, {"model": {}, "ema": {}}, "ema is missing there"),
        ({"model": {}, "ema": {}}, {"model": {}}, "ema is unknown here"),
        ({"model": {"w": 1}}, {"model": {"w": torch.ones(1)}}, "here and a int there"),
        ({"model": {"w": torch.ones(1)}}, {"model": {"w": 1}}, "model.w is a int here and a float32 tensor"),
        ({"model": {"w": [1]}}, {"model": {"w": [1, 2]}}, "model.w has 2 elements here and 1 there"),
        ({"model": {}, "a": 1}, {"model": {}, "a": {}}, "a is a dict here and a int there"),
        ({"model": {str(i): 1 for i in range(20)}}, {"model": {}}, "…"),
    ],
)
def test_the_model_and_the_names_at_the_top_must_be_the_same(
    theirs: dict[str, Any], own: dict[str, Any], said: str
) -> None:
    with pytest.raises(StateMismatch) as caught:
        fit(theirs, own)
    assert said in str(caught.value)


def test_outside_of_the_model_and_in_extra_state_either_may_have_more() -> None:
    fit({"a": {"x": [1, 2], "y": None}, "model": {}}, {"a": {"x": [1], "z": 1}, "model": {}})
    fit({"model.ema": {"x": 1}, "model": {}}, {"model.ema": {}, "model": {}})
    fit({"model": {"0._extra_state": torch.ones(9)}}, {"model": {"0._extra_state": None}})


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ((ShardedNode("[S]", (2,), (1,)), 3), "without a tensor"),
        ((ShardedNode("[S]", (2,), (1,)),), "incomplete"),
        ((ShardedNode("[S]", (2, 3), (1,)), 3), "2 dimensions"),
        ((ShardedNode("[S]", (-2,), (1,)), 3), "shape"),
        ((ShardedNode("[S]", (1 << 40, 1 << 40), (1, 1)), 3), "shape"),
        ((ShardedNode("S" * 5000, (2,), (1,)), 3), "5000 characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spread_tensor_without_a_part_or_with_an_impossible_shape_is_refused(nodes: Any, said: str) -> None:
    with pytest.raises(RemoteProtocolError, match=said):
        decode(encode(manifest(DictNode(("a",)), *nodes)), LIMITS)
