"""A state arrives as it was, bit for bit; what cannot travel is named, with its path, before anything is copied."""

import collections
import enum
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from everstep.errors import ConfigError
from everstep.recovery import Landing, Snapshot
from everstep.recovery.dtypes import DTYPES
from everstep.recovery.layout import lay_out
from everstep.recovery.manifest import DEPTH_MAX
from everstep.train.rng_state import RngState
from tests.recovery.trees import assembled, assert_same, carried, raw_tensor, trees


@given(trees())
@settings(max_examples=120)
def test_any_tree_arrives_equal_in_every_type_and_bit(state: dict[str, Any]) -> None:
    assert_same(carried(state), state)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_travels_contiguous_strided_and_transposed(name: str) -> None:
    base = raw_tensor(DTYPES[name], (6, 8))
    state = {"whole": base, "empty": base[:0], "one": base[0, 0]}
    assert_same(carried(state), state)
    for view in (base.T, base[:, ::3], base[1::2], base.as_strided((2, 2), (3, 5), 1)):
        assert_same(carried({"view": view}), {"view": view})


def test_a_module_an_optimizer_and_a_scheduler_arrive_as_their_state_dicts() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(module.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    there = carried(state)
    assert_same(there, state)
    assert there["model"]._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    assert isinstance(there["scheduler"]["milestones"], collections.Counter)
    optimizer.load_state_dict(there["optimizer"])
    scheduler.load_state_dict(there["scheduler"])


def test_random_number_generators_arrive() -> None:
    registered = RngState()
    here = registered.state_dict()
    there = carried({"rng": here})
    assert_same(there["rng"], here)
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    registered.load_state_dict(there["rng"])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn


def test_tied_tensors_travel_once_and_arrive_tied() -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": base.view(3, 4), "tail": base[4:], "column": base.view(3, 4)[:, 1]}
    snapshot = Snapshot.take(state)
    assert snapshot.total_bytes == base.nbytes
    there = assembled(snapshot)
    assert_same(there, state)
    there["a"].zero_()
    assert all(not value.any() for value in there.values())


def test_views_of_one_buffer_that_do_not_overlap_bring_only_their_own_bytes() -> None:
    buffer = torch.arange(1000.0)
    snapshot = Snapshot.take({"a": buffer[10:20], "b": buffer[500:510], "column": buffer.view(100, 10)[60::7, 3]})
    assert snapshot.total_bytes == 4 * (10 + 10 + 6)
    assert_same(assembled(snapshot), {"a": buffer[10:20], "b": buffer[500:510], "column": buffer[603::70]})


def test_an_expanded_tensor_brings_its_one_element() -> None:
    snapshot = Snapshot.take({"a": torch.ones(1).expand(1000)})
    assert snapshot.total_bytes == 4
    assert_same(assembled(snapshot), {"a": torch.ones(1000)})


def test_tensors_of_other_dtypes_may_be_tied() -> None:
    base = torch.arange(10.0, dtype=torch.float64)
    state = {"bytes": base.view(torch.uint8)[8:], "complex": torch.view_as_complex(base[2:].view(4, 2))}
    assert_same(carried(state), state)


def test_tensors_made_apart_from_one_numpy_buffer_travel_whichever_comes_first() -> None:
    buffer = np.arange(16.0)
    short, long = torch.from_numpy(buffer[:4]), torch.from_numpy(buffer)
    assert_same(carried({"a": short, "b": long}), {"a": short, "b": long})


def test_conjugated_and_negated_views_arrive_resolved() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    there = carried({"conj": value.conj(), "neg": value.conj().imag})
    assert torch.equal(there["conj"], value.conj().resolve_conj())
    assert torch.equal(there["neg"], value.conj().imag)


def test_what_arrives_simpler_than_it_left() -> None:
    grouped = collections.defaultdict(list, {"a": [1]})
    there = carried({"grouped": grouped, "size": torch.Size([1, 2]), "parameter": torch.nn.Parameter(torch.ones(2))})
    assert type(there["grouped"]) is dict
    assert there["grouped"] == {"a": [1]}
    assert there["size"] == (1, 2)
    assert not there["parameter"].requires_grad


def test_later_changes_of_the_state_do_not_reach_the_snapshot() -> None:
    tensor, array = torch.ones(5), np.ones(5)
    snapshot = Snapshot.take({"tensor": tensor, "column": tensor[::2], "array": array})
    tensor.zero_()
    array[:] = 0
    there = assembled(snapshot)
    assert there["tensor"].all()
    assert there["array"].all()


def test_an_empty_state_and_a_state_without_payload_travel() -> None:
    assert carried({}) == {}
    assert carried({"step": 3, "nothing": {}}) == {"step": 3, "nothing": {}}


class Colour(enum.IntEnum):
    RED = 1


class Named(tuple[int, ...]):
    pass


class Wrapped(torch.Tensor):
    pass


def freed() -> torch.Tensor:
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (Colour.RED, "Colour"),
        (Named((1,)), "Named"),
        (torch.float32, "dtype"),
        (torch.device("cpu"), "device"),
        (lambda: None, "function"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.eye(3).to_sparse_csr(), "sparse"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2).as_subclass(Wrapped), "Wrapped"),
        (torch.ones([1] * 65), "65 dimensions"),
        (freed(), "storage taken away"),
        (np.array([object()]), "dtype object"),
        (np.array(["text"]), "dtype <U4"),
        (np.datetime64("2020-01-01"), "datetime64"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (np.ones([1] * 33), "33 dimensions"),
        ("\ud800", "surrogates"),
        ({None: 1}, "the key None"),
        ({True: 1}, "the key True"),
        ({1.5: 1}, "the key 1.5"),
        ({1 << 64: 1}, "the key 18446744073709551616"),
        ({"\udfff": 1}, "surrogates"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else "",
)
def test_what_cannot_travel_is_named_with_its_path(value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Snapshot.take({"model": {"fine": torch.ones(1), "list": [0, value]}})
    assert "model.list.1" in str(caught.value)
    assert said in str(caught.value)


def test_a_quantized_tensor_is_named_with_its_path() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(ConfigError, match=r"a\.b is a .*quantized"):
        Snapshot.take({"a": {"b": quantized}})


def test_the_parts_of_a_state_are_called_by_name() -> None:
    with pytest.raises(ConfigError, match="not 3 of type int"):
        Snapshot.take({3: 1})  # type: ignore[dict-item]


def test_a_state_that_contains_itself_is_refused_and_the_deepest_allowed_one_travels() -> None:
    ring: list[object] = []
    ring.append(ring)
    with pytest.raises(ConfigError, match="nested deeper"):
        Snapshot.take({"ring": ring})
    deep: object = 1
    for _ in range(DEPTH_MAX - 1):
        deep = [deep]
    assert_same(carried({"deep": deep}), {"deep": deep})
    with pytest.raises(ConfigError, match="nested deeper"):
        Snapshot.take({"deep": [deep]})


@pytest.mark.parametrize("chunk_bytes", [0, 1023, (64 << 20) + 1])
def test_chunks_have_a_sensible_size(chunk_bytes: int) -> None:
    with pytest.raises(ConfigError, match="chunk_bytes"):
        Snapshot.take({}, chunk_bytes)


def test_any_range_of_the_payload_can_be_copied_by_itself() -> None:
    state = {"a": torch.arange(100), "b": torch.ones(7, 9)[:, ::2], "c": np.arange(11), "d": torch.ones(3)}
    layout = lay_out(state)
    total = layout.manifest.total_bytes
    whole = torch.empty(total, dtype=torch.uint8)
    layout.copy_into(whole, 0, total)
    pieces = torch.empty(total, dtype=torch.uint8)
    for begin in range(0, total, 37):
        end = min(begin + 37, total)
        layout.copy_into(pieces[begin:end], begin, end)
    assert torch.equal(whole, pieces)


def test_prepared_memory_is_used_once_and_given_back_memory_again() -> None:
    landing = Landing()
    landing.prepare({"a": torch.ones(5)})
    first = landing.take(20)
    assert not first.any()  # touched
    assert landing.take(20).data_ptr() != first.data_ptr()
    landing.give_back(first)
    assert landing.take(20).data_ptr() == first.data_ptr()
