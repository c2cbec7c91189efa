"""Manifests that no sound donor sends, over the wire: refused before a byte lands in what the joiner trains."""

import msgspec
import pytest
import torch

from everstep.errors import RemoteProtocolError, StateMismatch
from everstep.recovery import Fetch, InPlace, Snapshot
from everstep.recovery.manifest import DictNode, Manifest, TensorNode, encode
from tests.recovery.test_hostile import answer
from tests.recovery.trees import assert_same
from tests.recovery.wires import request_to, saying, serving, state_of

CHUNK_BYTES = 1 << 12
SOUND = Snapshot.take(state_of(), CHUNK_BYTES).manifest


def _with(size: int, node: TensorNode) -> Manifest:
    tree = (DictNode(("model", "step", "lr")), DictNode(("w",)), node, 7, 0.125)
    return Manifest(SOUND.format, SOUND.version, SOUND.chunk_bytes, (size,), tree)


LIES: dict[str, tuple[bytes | Manifest, type[Exception]]] = {
    "truncated": (encode(SOUND)[:-7], RemoteProtocolError),
    "empty": (b"", RemoteProtocolError),
    "oversized": (_with(1 << 50, TensorNode(0, "float32", (1 << 48,), (1,), 0)), RemoteProtocolError),
    "with a shape beyond its bytes": (_with(4, TensorNode(0, "float32", (1 << 20,), (1,), 0)), RemoteProtocolError),
    "of a smaller tensor": (_with(4, TensorNode(0, "float32", (1,), (1,), 0)), StateMismatch),
    "of another dtype": (_with(1 << 18, TensorNode(0, "int32", (1024, 64), (64, 1), 0)), StateMismatch),
    "of another job": (encode(Snapshot.take({"other": torch.ones(3)}).manifest), StateMismatch),
    "foreign": (msgspec.msgpack.encode({"format": "other", "nodes": []}), RemoteProtocolError),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_manifest_is_refused_and_nothing_lands(name: str) -> None:
    said, error = LIES[name]
    body = answer(said if isinstance(said, bytes) else encode(said), "Everstep-Snapshot: " + "0" * 16)
    own = {"model": {"w": torch.full((1024, 64), 0.5)}, "step": 1, "lr": 0.25}
    with saying(body) as url, pytest.raises(error):
        Fetch(request_to(url, expected=own), landing=InPlace(own)).run()
    assert (own["model"]["w"] == 0.5).all()  # type: ignore[index]


@pytest.mark.parametrize("name", [name for name, (_, error) in LIES.items() if error is RemoteProtocolError])
def test_beside_a_sound_donor_a_liar_costs_nothing(name: str) -> None:
    said, _ = LIES[name]
    body = answer(said if isinstance(said, bytes) else encode(said), "Everstep-Snapshot: " + "0" * 16)
    state = state_of()
    with serving(Snapshot.lend(state, CHUNK_BYTES)) as (_, sound), saying(body) as liar:
        fetch = Fetch(request_to(liar, other_urls=(sound,), expected=state_of()))
        assert_same(fetch.run(), state)
    assert list(fetch.report.bytes_from) == [sound]
