"""From a state tree to manifest nodes: what may travel, and the path of what may not."""

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from everstep.errors import ConfigError
from everstep.recovery.dtypes import DTYPES, dtype_name
from everstep.recovery.manifest import (
    ARRAY_DIMENSIONS_MAX,
    DEPTH_MAX,
    DIMENSIONS_MAX,
    BigInt,
    Blob,
    DictNode,
    ListNode,
    Node,
    TupleNode,
    array_itemsize,
)
from everstep.recovery.sharded import is_sharded, local_of, node_of

_INT64_MIN, _UINT64_MAX = -(1 << 63), (1 << 64) - 1
_DICT_KINDS = {dict: "dict", OrderedDict: "ordered", Counter: "counter", defaultdict: "dict"}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor on its way into a region."""

    path: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class PendingArray:
    """A numpy array or scalar on its way into a region; `data` is little endian, in C order."""

    path: str
    data: bytes
    dtype: str
    shape: tuple[int, ...]
    is_scalar: bool


@dataclass(frozen=True)
class Flattened:
    """Nodes in preorder; where the i-th of `pending` belongs, `nodes` has None at `places[i]`."""

    nodes: list[Node] = field(default_factory=list)
    pending: list[PendingTensor | PendingArray] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def flatten(state: Mapping[str, object]) -> Flattened:
    """Raises ConfigError with the path of the first value that cannot travel. Copies nothing but numpy arrays.

    A defaultdict arrives as a dict, a torch.Size as a tuple, a Parameter as a tensor.
    """
    for name in state:
        if type(name) is not str:
            raise ConfigError(f"the state's parts are called by name, not {name!r} of type {type(name).__name__}")
    flat = Flattened()
    _flatten(dict(state), "", 0, flat)
    return flat


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _flatten(value: object, path: str, depth: int, flat: Flattened) -> None:
    if depth > DEPTH_MAX - 1 and isinstance(value, dict | list | tuple):
        raise ConfigError(f"{path[:200]}… is nested deeper than {DEPTH_MAX}, or contains itself")
    kind = type(value)
    if value is None or kind is bool or kind is float:
        flat.nodes.append(value)  # type: ignore[arg-type]
    elif kind is bytes:
        flat.nodes.append(Blob(value))  # type: ignore[arg-type]
    elif kind is int:
        flat.nodes.append(_int_node(value))  # type: ignore[arg-type]
    elif kind is str:
        flat.nodes.append(_checked_text(value, path))  # type: ignore[arg-type]
    elif kind in _DICT_KINDS:
        _flatten_dict(value, _DICT_KINDS[kind], path, depth, flat)  # type: ignore[arg-type, index]
    elif kind is list or kind is tuple or kind is torch.Size:
        flat.nodes.append((ListNode if kind is list else TupleNode)(len(value)))  # type: ignore[arg-type]
        for index, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            _flatten(item, join(path, index), depth + 1, flat)
    elif is_sharded(value):
        assert isinstance(value, torch.Tensor)
        flat.nodes.append(node_of(value))
        _flatten(local_of(value), path, depth + 1, flat)
    elif isinstance(value, torch.Tensor):
        _check_tensor(value, path)
        _defer(PendingTensor(path, value.detach()), flat)
    else:
        _defer(_pending_array(value, path), flat)


def _flatten_dict(value: dict[object, object], kind: str, path: str, depth: int, flat: Flattened) -> None:
    keys: list[str | int] = []
    for key in value:
        if type(key) is str:
            keys.append(_checked_text(key, path))
        elif type(key) is int and _INT64_MIN <= key <= _UINT64_MAX:
            keys.append(key)
        else:
            raise ConfigError(f"{path or 'the state'} has the key {key!r} of type {type(key).__name__}; use str or int")
    metadata = getattr(value, "_metadata", None) if kind == "ordered" else None
    flat.nodes.append(DictNode(tuple(keys), kind, metadata is not None))
    for key, item in value.items():
        _flatten(item, join(path, key), depth + 1, flat)
    if metadata is not None:
        _flatten(metadata, join(path, "_metadata"), depth + 1, flat)


def _defer(pending: PendingTensor | PendingArray, flat: Flattened) -> None:
    flat.places.append(len(flat.nodes))
    flat.nodes.append(None)
    flat.pending.append(pending)


def _int_node(value: int) -> Node:
    if _INT64_MIN <= value <= _UINT64_MAX:
        return value
    return BigInt(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _checked_text(text: str, path: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{path or 'the state'} contains text with lone surrogates, {text[:40]!r}; use bytes")
    return text


def _check_tensor(tensor: torch.Tensor, path: str) -> None:
    what = type(tensor).__name__
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ConfigError(f"{path} is a {what}; {_REMEDY}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "torch.nested" if tensor.is_nested else tensor.layout
        raise ConfigError(f"{path} is a tensor of layout {layout}; make it dense before it is registered")
    if tensor.dim() > DIMENSIONS_MAX:
        raise ConfigError(f"{path} has {tensor.dim()} dimensions; at most {DIMENSIONS_MAX} travel")
    if tensor.is_quantized or dtype_name(tensor.dtype) not in DTYPES:
        raise ConfigError(f"{path} is a {dtype_name(tensor.dtype)} tensor, quantized; register its int_repr and scales")
    if tensor.device.type == "meta":
        raise ConfigError(f"{path} is on the meta device and has no bytes; materialize it before it is registered")


_REMEDY = (
    "only dict, list, tuple, None, bool, int, float, str, bytes, tensors and numpy numbers travel; "
    "register an object whose state_dict() is made of these"
)


def _pending_array(value: object, path: str) -> PendingArray:
    numpy = sys.modules.get("numpy")  # a numpy value exists only where numpy was imported
    if numpy is None or (type(value) is not numpy.ndarray and not isinstance(value, numpy.generic)):
        raise ConfigError(f"{path} is a {type(value).__name__}; {_REMEDY}")
    array = numpy.asarray(value)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array_itemsize(little.dtype.str) is None:
        raise ConfigError(f"{path} is a numpy value of dtype {array.dtype}; only numbers, bool and complex travel")
    if array.ndim > ARRAY_DIMENSIONS_MAX:
        raise ConfigError(f"{path} has {array.ndim} dimensions; at most {ARRAY_DIMENSIONS_MAX} travel")
    return PendingArray(path, little.tobytes(), little.dtype.str, array.shape, type(value) is not numpy.ndarray)
