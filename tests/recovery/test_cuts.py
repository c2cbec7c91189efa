"""Into which messages a chunk is cut, and for which lanes; what a manifest may say of devices."""

import msgspec
import pytest
import torch

from everstep.errors import RemoteProtocolError
from everstep.recovery import peers
from everstep.recovery.conversation import DIRECT_BYTES, Cut, Cuts, Offered, WantChunk
from everstep.recovery.manifest import (
    FORMAT,
    VERSION,
    ArrayNode,
    DictNode,
    Limits,
    Manifest,
    TensorNode,
    decode,
    encode,
)
from tests.recovery.played_device import CHUNK_BYTES


def manifest_of(sizes: list[int], on_device: list[int]) -> Manifest:
    nodes = [TensorNode(n, "uint8", (size,), (1,), 0) for n, size in enumerate(sizes)]
    keys = tuple(map(str, range(len(sizes))))
    return Manifest(FORMAT, VERSION, CHUNK_BYTES, tuple(sizes), (DictNode(keys), *nodes), tuple(on_device))


SPANS = (0, 4, 700, DIRECT_BYTES - 1, DIRECT_BYTES, DIRECT_BYTES + 5000)


@pytest.mark.parametrize("by_device", [False, True])
def test_every_byte_of_a_chunk_is_in_one_message_of_its_lane_and_both_ends_agree(by_device: bool) -> None:
    noise = torch.Generator().manual_seed(1)
    for _ in range(30):
        sizes = [SPANS[n] for n in torch.randint(0, len(SPANS), (12,), generator=noise).tolist()]
        there = torch.randint(0, 2, (12,), generator=noise).tolist()
        manifest = manifest_of(sizes, [n for n, size in enumerate(sizes) if size and there[n]])
        regions = torch.split(torch.empty(sum(sizes), dtype=torch.uint8), sizes)
        for chunk in range(manifest.chunk_count):
            begin, end = manifest.chunk_range(chunk)
            within = [(max(0, begin - int(r.storage_offset())), end - int(r.storage_offset()), r) for r in regions]
            apart = [region[low:high] for low, high, region in within if low < len(region) and high > 0]
            whole = torch.empty(0, dtype=torch.uint8).set_(regions[0].untyped_storage(), begin, (end - begin,), (1,))
            ours, theirs = (
                [spans_of(cut) for cut in Cuts(manifest).cut(chunk, pieces, by_device=by_device)]
                for pieces in (apart, [whole])
            )
            assert ours == theirs
            assert sorted(joined([span for _, spans in ours for span in spans])) == [(begin, end)]
            for lane, spans in ours:
                numbers = {n for low, high in spans for n, region in enumerate(regions) if overlap(region, low, high)}
                assert {n in manifest.on_device and by_device for n in numbers} == {lane == peers.DEVICE}


def overlap(region: torch.Tensor, low: int, high: int) -> bool:
    return len(region) > 0 and int(region.storage_offset()) < high and low < int(region.storage_offset()) + len(region)


def spans_of(cut: Cut[torch.Tensor]) -> tuple[int, list[tuple[int, int]]]:
    """A message's lane, and where in the payload its bytes are."""
    return cut.lane, joined([(int(p.storage_offset()), int(p.storage_offset()) + len(p)) for p in cut.pieces])


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if found and found[-1][1] == low:
            low = found.pop()[0]
        found.append((low, high))
    return found


def test_a_manifest_that_puts_an_array_or_nothing_on_a_device_is_refused() -> None:
    array = Manifest(FORMAT, VERSION, CHUNK_BYTES, (8,), (DictNode(("a",)), ArrayNode(0, "<f8", (), True)), (0,))
    for lie in (array, manifest_of([5, 5], [2]), manifest_of([5], [-1])):
        with pytest.raises(RemoteProtocolError, match="on a device"):
            decode(encode(lie), Limits())
    assert decode(encode(manifest_of([5, 5], [1])), Limits()).on_device == (1,)
    assert b"on_device" not in encode(manifest_of([5, 5], []))


def test_small_pieces_in_a_row_are_one_message_and_with_a_device_all_of_a_chunk_that_go_its_way() -> None:
    sizes = [100, 200, DIRECT_BYTES, 50, DIRECT_BYTES + 1, 7]
    cuts = Cuts(manifest_of(sizes, [0, 3, 4]))
    whole = [torch.empty(sum(sizes), dtype=torch.uint8)]
    by_host = [(cut.lane, sum(map(len, cut.pieces))) for cut in cuts.cut(0, whole)]
    assert by_host == [(peers.BULK, size) for size in (300, DIRECT_BYTES, 50, DIRECT_BYTES + 1, 7)]
    by_device = [(cut.lane, sum(map(len, cut.pieces))) for cut in cuts.cut(0, whole, by_device=True)]
    large = [(peers.BULK, DIRECT_BYTES), (peers.DEVICE, DIRECT_BYTES + 1)]
    assert by_device == [(peers.DEVICE, 150), (peers.BULK, 207), *large]


class OldWantChunk(msgspec.Struct, array_like=True, tag="chunk"):
    index: int


class OldOffered(msgspec.Struct, array_like=True, tag="offered"):
    snapshot_id: str
    size: int
    digest: bytes
    mac: bytes


def test_a_version_that_knows_no_devices_understands_and_is_understood() -> None:
    new, old = WantChunk(3), OldWantChunk(3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=OldWantChunk) == old
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=WantChunk) == new
    offered, before = Offered("a", 1, b"b", b"c", "GPU 0"), OldOffered("a", 1, b"b", b"c")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(offered), type=OldOffered) == before
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=Offered).device == ""
