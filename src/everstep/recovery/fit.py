"""Whether a peer's state fits this member's own: same names, shapes and dtypes where both have something to compare."""

from collections.abc import Iterator, Mapping

import torch

from everstep.errors import StateMismatch
from everstep.recovery.dtypes import dtype_name
from everstep.recovery.manifest import TensorNode
from everstep.recovery.tree import join

NAMED_MAX = 8


def check_fit(theirs: object, own: object, same_keys_under: frozenset[str]) -> None:
    """`theirs` is a tree with TensorNodes as leaves. Raises StateMismatch naming what differs.

    Wherever this member has a tensor, the peer's must have its shape and dtype. The names at the top, and everything
    below the tops in `same_keys_under` (the model), must be the same; elsewhere either may have more: the optimizer of
    a member that has not stepped yet is empty.
    """
    found: list[str] = []
    for difference in _differences(theirs, own, "", same_keys_under):
        found.append(difference)
        if len(found) == NAMED_MAX:
            found.append("…")
            break
    if found:
        raise StateMismatch("the peer's state does not fit this member's: " + "; ".join(found))


def _differences(theirs: object, own: object, path: str, same_keys_under: frozenset[str]) -> Iterator[str]:
    if isinstance(own, torch.Tensor):
        mine = f"{dtype_name(own.dtype)} tensor of shape {tuple(own.shape)}"
        if not isinstance(theirs, TensorNode):
            yield f"{path} is a {mine} here and a {type(theirs).__name__} there"
        elif str(theirs) != mine:
            yield f"{path} is a {mine} here and a {theirs} there"
    elif isinstance(own, Mapping):
        if not isinstance(theirs, Mapping):
            yield f"{path} is a dict here and a {type(theirs).__name__} there"
            return
        if path == "" or path.split(".", 1)[0] in same_keys_under:
            yield from (f"{join(path, key)} is missing there" for key in own if key not in theirs)
            yield from (f"{join(path, key)} is unknown here" for key in theirs if key not in own)
        for key, value in own.items():
            if key in theirs:
                yield from _differences(theirs[key], value, join(path, key), same_keys_under)
    elif isinstance(own, list | tuple) and isinstance(theirs, list | tuple):
        for index, (their, mine_) in enumerate(zip(theirs, own, strict=False)):
            yield from _differences(their, mine_, join(path, index), same_keys_under)
