"""Whether a peer's state fits this member's own: same names, shapes and dtypes where both have something to compare."""

from collections.abc import Iterator, Mapping

import torch

from everstep.errors import StateMismatch
from everstep.recovery.dtypes import dtype_name
from everstep.recovery.manifest import Sharded, TensorNode
from everstep.recovery.sharded import is_sharded, local_of, node_of
from everstep.recovery.tree import join

NAMED_MAX = 8
_EXTRA_STATE = "_extra_state"  # how torch ends the names of modules' extra state


def check_fit(theirs: Mapping[str, object], own: Mapping[str, object], same_keys_under: frozenset[str]) -> None:
    """`theirs` is a tree with TensorNodes as leaves. Raises StateMismatch naming what differs.

    Wherever this member has a tensor, the peer's must have its shape and dtype. The names at the top, and everything
    below the tops in `same_keys_under` (the model), must be the same; elsewhere either may have more: the optimizer of
    a member that has not stepped yet is empty. What a module keeps as extra state is its own affair.
    """
    found: list[str] = []
    for difference in _top_differences(theirs, own, same_keys_under):
        found.append(difference)
        if len(found) == NAMED_MAX:
            found.append("…")
            break
    if found:
        raise StateMismatch("the peer's state does not fit this member's: " + "; ".join(found))


def _top_differences(
    theirs: Mapping[str, object], own: Mapping[str, object], same_keys_under: frozenset[str]
) -> Iterator[str]:
    yield from _key_differences(theirs, own, "")
    for name, value in own.items():
        if name in theirs:
            yield from _differences(theirs[name], value, name, name in same_keys_under)


def _differences(theirs: object, own: object, path: str, is_exact: bool) -> Iterator[str]:
    if isinstance(own, torch.Tensor):
        mine, there = _described(own), _named(theirs)
        if there != mine:
            yield f"{path} is a {mine} here and a {there} there"
    elif isinstance(own, Mapping) and isinstance(theirs, Mapping):
        if is_exact:
            yield from _key_differences(theirs, own, path)
        for key, value in own.items():
            if key in theirs and not str(key).endswith(_EXTRA_STATE):
                yield from _differences(theirs[key], value, join(path, key), is_exact)
    elif isinstance(own, list | tuple) and isinstance(theirs, list | tuple):
        if is_exact and len(own) != len(theirs):
            yield f"{path} has {len(own)} elements here and {len(theirs)} there"
        for index, (their, mine_) in enumerate(zip(theirs, own, strict=False)):
            yield from _differences(their, mine_, join(path, index), is_exact)
    elif isinstance(own, Mapping) or (is_exact and isinstance(theirs, TensorNode | Sharded | Mapping)):
        yield f"{path} is a {type(own).__name__} here and a {_named(theirs)} there"


def _described(own: torch.Tensor) -> str:
    if is_sharded(own):
        return str(Sharded(node_of(own), _described(local_of(own))))
    return f"{dtype_name(own.dtype)} tensor of shape {tuple(own.shape)}"


def _named(theirs: object) -> str:
    return str(theirs) if isinstance(theirs, TensorNode | Sharded) else type(theirs).__name__


def _key_differences(theirs: Mapping[str, object], own: Mapping[str, object], path: str) -> Iterator[str]:
    yield from (f"{join(path, key)} is missing there" for key in own if key not in theirs)
    yield from (f"{join(path, key)} is unknown here" for key in theirs if key not in own)
