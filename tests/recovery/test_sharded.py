"""Tensors that are spread over a group's ranks: the local part travels, and lands in the joiner's local part."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from everstep.errors import StateMismatch
from everstep.recovery import Fetch, InPlace, Snapshot
from everstep.recovery.arrival import Arrival
from tests.recovery.wires import fetched, request_to, serving


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """As rank 1 of four sees it: torch's fake group has no peers, and none are needed here."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (4, 1), mesh_dim_names=("shard", "replicate"))
    dist.destroy_process_group()


def spread(local: torch.Tensor, mesh: DeviceMesh, rows: int = 8, first: Any = Shard(0)) -> DTensor:  # noqa: B008
    """A tensor of `rows` rows of which `local` lies here."""
    shape = torch.Size((rows, *local.shape[1:]))
    return DTensor.from_local(local, mesh, [first, Replicate()], run_check=False, shape=shape, stride=local.stride())


def test_the_local_part_travels_and_lands_in_the_joiners(mesh: DeviceMesh) -> None:
    theirs = {"model": {"w": spread(torch.arange(8.0).view(2, 4), mesh)}, "moments": [spread(torch.ones(2, 4), mesh)]}
    local = torch.zeros(2, 4)
    own: Any = {"model": {"w": torch.nn.Parameter(spread(local, mesh))}, "moments": []}
    with serving(snapshot := Snapshot.lend(theirs)) as (_, url):
        assert snapshot.total_bytes == 2 * local.nbytes
        state: Any = Fetch(request_to(url, expected=own), landing=InPlace(own)).run()
    there = state["model"]["w"]
    assert (there.shape, there.placements) == ((8, 4), (Shard(0), Replicate()))
    assert there.to_local().data_ptr() == local.data_ptr()
    assert torch.equal(local, torch.arange(8.0).view(2, 4))
    assert torch.equal(state["moments"][0].to_local(), torch.ones(2, 4))  # unknown here, as a new optimizer's
    own["model"]["w"].data.copy_(there)  # as load_state_dict does


def test_a_tensor_that_is_spread_in_another_way_does_not_fit(mesh: DeviceMesh) -> None:
    theirs = spread(torch.ones(2, 4), mesh)
    others = [spread(torch.ones(2, 4), mesh, rows=6), spread(torch.ones(2, 4), mesh, first=Replicate())]
    others.append(spread(torch.ones(2, 4), init_device_mesh("cpu", (4, 1))))
    with serving(Snapshot.take({"model": {"w": theirs}})) as (_, url):
        for own in (*others, torch.ones(2, 4), torch.ones(8, 4)):
            with pytest.raises(
                StateMismatch, match=r"model.w is a .* here and a tensor of shape .* spread \[Shard\(0\)"
            ):
                fetched(url, expected={"model": {"w": own}})


def test_a_spread_tensor_that_has_no_like_at_the_joiner_is_refused(mesh: DeviceMesh) -> None:
    with serving(Snapshot.take({"model": {}, "optimizer": {"m": spread(torch.ones(2, 4), mesh)}})) as (_, url):
        with pytest.raises(StateMismatch, match="no tensor of this member's is spread like that"):
            fetched(url, expected={"model": {}, "optimizer": {}})


def test_it_arrives_over_a_transport_of_ones_own(mesh: DeviceMesh) -> None:
    snapshot = Snapshot.lend({"model": {"w": spread(torch.arange(8.0).view(2, 4), mesh)}})
    local = torch.zeros(2, 4)
    own = {"model": {"w": spread(local, mesh)}}
    arrival = Arrival(own, InPlace(own))
    arrival.begin(snapshot.manifest_bytes)
    arrival.chunk(0)[0][:] = snapshot.chunk(0)[0]
    assert arrival.landed(0, snapshot.digest(0))
    state: Any = arrival.state()
    assert isinstance(state["model"]["w"], DTensor)
    assert torch.equal(local, torch.arange(8.0).view(2, 4))
