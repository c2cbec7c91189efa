"""Tensors that are spread over the ranks of a group (DTensor): each rank's local part travels, with how it is spread.

Rank r of one replica group takes over from rank r of another, which holds the same part of the same tensor. So only
that is checked, and the joiner builds its tensors on a mesh of its own. torch.distributed.tensor is never imported:
where it is not there, no state holds one.
"""

import sys
from collections.abc import Mapping

import torch
import xxhash

from everstep.errors import StateMismatch
from everstep.recovery.manifest import ShardedNode


def is_sharded(value: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, not a copy of it; waits for a collective that is still computing it."""
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local.detach()


def node_of(tensor: torch.Tensor) -> ShardedNode:
    return ShardedNode(_spread(tensor), tuple(tensor.shape), tuple(tensor.stride()))


class Meshes:
    """How this member's own tensors are spread, to build a peer's on the same meshes."""

    def __init__(self, own: object) -> None:
        self._found: dict[str, torch.Tensor] = {}
        self._collect(own)

    def build(self, node: ShardedNode, local: object) -> object:
        """Raises StateMismatch where none of this member's tensors is spread like that."""
        like = self._found.get(node.spread)
        if like is None or not isinstance(local, torch.Tensor):
            raise StateMismatch(f"the peer's state has a {node}; no tensor of this member's is spread like that")
        made: object = type(like).from_local(  # type: ignore[attr-defined]
            local,
            like.device_mesh,  # type: ignore[attr-defined]
            like.placements,  # type: ignore[attr-defined]
            run_check=False,  # a collective, and the peer's ranks agree
            shape=torch.Size(node.shape),
            stride=node.strides,
        )
        return made

    def _collect(self, value: object) -> None:
        if is_sharded(value):
            assert isinstance(value, torch.Tensor)
            self._found.setdefault(_spread(value), value)
        elif isinstance(value, Mapping):
            for item in value.values():
                self._collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                self._collect(item)


def _spread(tensor: torch.Tensor) -> str:
    """Mesh, this rank's place in it, and placements: equal for tensors of which equal parts lie here."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    ranks = xxhash.xxh3_64_hexdigest(str(mesh.mesh.tolist()).encode())[:8]
    names = "" if mesh.mesh_dim_names is None else f" {'/'.join(mesh.mesh_dim_names)}"
    shape = "x".join(str(size) for size in mesh.mesh.shape)
    at = mesh.get_coordinate()
    placements = ", ".join(_placement(placement) for placement in tensor.placements)  # type: ignore[attr-defined]
    return f"[{placements}] on a {mesh.device_type} mesh {shape}{names} (ranks {ranks}) at {at}"


def _placement(placement: object) -> str:
    known = (getattr(placement, name, None) for name in ("dim", "reduce_op", "split_factor"))
    return f"{type(placement).__name__}({', '.join(str(value) for value in known if value is not None)})"
