"""The store of a round: torch's semantics, its bounds, and who is answered when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.core import round_store
from everstep.core.node_messages import StoreCall, StoreOp, StoreReply, StoreStatus
from everstep.core.round_store import RoundStore
from everstep.core.types import RendezvousRound

ROUND = RendezvousRound(1, "life")


class Session:
    """Calls in order, from links of choice."""

    def __init__(self) -> None:
        self.store = RoundStore()
        self.number = 0

    def ask(
        self, op: StoreOp, *keys: str, values: tuple[bytes, ...] = (), amount: int = 0, link: int = 1
    ) -> list[tuple[int, StoreReply]]:
        self.number += 1
        return self.store.call(link, StoreCall(self.number, ROUND, op, keys, values, amount))

    def now(self, op: StoreOp, *keys: str, values: tuple[bytes, ...] = (), amount: int = 0) -> StoreReply:
        """The one answer, which comes at once."""
        ((_, reply),) = self.ask(op, *keys, values=values, amount=amount)
        return reply


def test_a_key_is_set_got_counted_and_deleted() -> None:
    session = Session()
    session.now(StoreOp.SET, "a", "b", values=(b"1", b"2"))
    assert session.now(StoreOp.GET, "b", "a").values == (b"2", b"1")
    assert session.now(StoreOp.CHECK, "a", "b").amount == 1
    assert session.now(StoreOp.CHECK, "a", "c").amount == 0
    assert session.now(StoreOp.NUM_KEYS).amount == 2
    assert session.now(StoreOp.LIST_KEYS).values == (b"a", b"b")
    assert session.now(StoreOp.DELETE_KEY, "a").amount == 1
    assert session.now(StoreOp.DELETE_KEY, "a").amount == 0


def test_add_counts_and_its_key_reads_as_text() -> None:
    session = Session()
    assert session.now(StoreOp.ADD, "n", amount=2).amount == 2
    assert session.now(StoreOp.ADD, "n", amount=-3).amount == -1
    assert session.now(StoreOp.GET, "n").values == (b"-1",)
    session.now(StoreOp.SET, "n", values=(b"text",))
    assert session.now(StoreOp.ADD, "n", amount=1).status is StoreStatus.BAD_CALL


def test_compare_set_is_that_of_torch() -> None:
    session = Session()
    assert session.now(StoreOp.COMPARE_SET, "k", values=(b"old", b"new")).values == (b"old",)
    assert session.now(StoreOp.CHECK, "k").amount == 0
    assert session.now(StoreOp.COMPARE_SET, "k", values=(b"", b"first")).values == (b"first",)
    assert session.now(StoreOp.COMPARE_SET, "k", values=(b"other", b"x")).values == (b"first",)
    assert session.now(StoreOp.COMPARE_SET, "k", values=(b"first", b"x")).values == (b"x",)


def test_append_begins_a_key_and_lengthens_it() -> None:
    session = Session()
    session.now(StoreOp.APPEND, "k", values=(b"a",))
    session.now(StoreOp.APPEND, "k", values=(b"b",))
    assert session.now(StoreOp.GET, "k").values == (b"ab",)


def test_a_get_waits_for_all_its_keys() -> None:
    session = Session()
    assert session.ask(StoreOp.GET, "a", "b", link=7) == []
    assert len(session.ask(StoreOp.SET, "b", values=(b"2",))) == 1
    (_, (link, reply)) = session.ask(StoreOp.SET, "a", values=(b"1",))
    assert (link, reply.number, reply.values) == (7, 1, (b"1", b"2"))


def test_a_key_that_was_deleted_meanwhile_is_waited_for_again() -> None:
    session = Session()
    session.now(StoreOp.SET, "a", values=(b"1",))
    assert session.ask(StoreOp.GET, "a", "b", link=7) == []
    session.now(StoreOp.DELETE_KEY, "a")
    assert len(session.ask(StoreOp.SET, "b", values=(b"2",))) == 1
    (_, (_, reply)) = session.ask(StoreOp.SET, "a", values=(b"3",))
    assert reply.values == (b"3", b"2")


def test_a_queue_gives_each_element_to_one_in_the_order_of_asking() -> None:
    session = Session()
    assert session.now(StoreOp.QUEUE_POP, "q").status is StoreStatus.BAD_CALL
    assert session.ask(StoreOp.QUEUE_POP, "q", amount=1, link=3) == []
    assert session.ask(StoreOp.QUEUE_POP, "q", amount=1, link=4) == []
    (_, (link, reply)) = session.ask(StoreOp.QUEUE_PUSH, "q", values=(b"x",))
    assert (link, reply.values) == (3, (b"x",))
    (_, (link, reply)) = session.ask(StoreOp.QUEUE_PUSH, "q", values=(b"y",))
    assert (link, reply.values) == (4, (b"y",))
    session.now(StoreOp.QUEUE_PUSH, "q", values=(b"z",))
    assert session.now(StoreOp.QUEUE_LEN, "q").amount == 1
    assert session.now(StoreOp.QUEUE_POP, "q", amount=1).values == (b"z",)
    assert session.now(StoreOp.QUEUE_LEN, "q").amount == 0


def test_who_cancels_or_goes_away_is_answered_no_more() -> None:
    session = Session()
    session.ask(StoreOp.GET, "a", link=3)
    session.ask(StoreOp.GET, "a", link=4)
    session.ask(StoreOp.CANCEL, amount=1, link=3)
    session.store.link_closed(4)
    assert len(session.ask(StoreOp.SET, "a", values=(b"1",))) == 1


def test_the_end_of_the_round_is_told_to_all_who_wait() -> None:
    session = Session()
    session.ask(StoreOp.GET, "a", link=3)
    session.ask(StoreOp.WAIT, "b", link=4)
    assert [(link, reply.status) for link, reply in session.store.end()] == [
        (3, StoreStatus.ROUND_OVER),
        (4, StoreStatus.ROUND_OVER),
    ]


@pytest.mark.parametrize(
    ("op", "keys", "values"),
    [
        (StoreOp.SET, ("a",), ()),
        (StoreOp.ADD, (), ()),
        (StoreOp.COMPARE_SET, ("a",), (b"1",)),
        (StoreOp.GET, ("k" * (round_store.KEY_CHARS_MAX + 1),), ()),
        (StoreOp.SET, ("a",), (b"x" * (round_store.VALUE_BYTES_MAX + 1),)),
    ],
)
def test_a_call_out_of_bounds_is_refused_and_changes_nothing(
    op: StoreOp, keys: tuple[str, ...], values: tuple[bytes, ...]
) -> None:
    session = Session()
    assert session.now(op, *keys, values=values).status is StoreStatus.BAD_CALL
    assert session.now(StoreOp.NUM_KEYS).amount == 0


def test_the_store_is_bounded() -> None:
    session = Session()
    value = b"x" * round_store.VALUE_BYTES_MAX
    replies = [session.now(StoreOp.SET, f"k{i}", values=(value,)) for i in range(65)]
    assert [reply.status for reply in replies[:63]] == [StoreStatus.OK] * 63
    assert replies[-1].status is StoreStatus.FULL
    session.now(StoreOp.DELETE_KEY, "k0")
    assert session.now(StoreOp.SET, "again", values=(value,)).status is StoreStatus.OK
    for _ in range(round_store.WAITERS_OF_LINK_MAX):
        assert session.ask(StoreOp.GET, "never") == []
    assert session.now(StoreOp.GET, "never").status is StoreStatus.FULL


KEYS = st.sampled_from(["a", "b", "c"])
CALLS = st.one_of(
    st.tuples(st.just(StoreOp.SET), KEYS, st.binary(max_size=3)),
    st.tuples(st.just(StoreOp.APPEND), KEYS, st.binary(max_size=3)),
    st.tuples(st.just(StoreOp.DELETE_KEY), KEYS, st.none()),
    st.tuples(st.just(StoreOp.GET), KEYS, st.none()),
)


@given(st.lists(CALLS, max_size=30))
def test_it_is_a_dictionary_whose_readers_wait(calls: list[tuple[StoreOp, str, bytes | None]]) -> None:
    session, model, waiting = Session(), dict[str, bytes](), list[str]()
    for op, key, value in calls:
        answers = session.ask(op, key, values=() if value is None else (value,))
        woken = 0
        if op is StoreOp.SET:
            model[key] = value or b""
        elif op is StoreOp.APPEND:
            model[key] = model.get(key, b"") + (value or b"")
        elif op is StoreOp.DELETE_KEY:
            model.pop(key, None)
        if op in (StoreOp.SET, StoreOp.APPEND):
            woken = waiting.count(key)
            waiting = [k for k in waiting if k != key]
        if op is StoreOp.GET and key not in model:
            waiting.append(key)
            assert answers == []
        else:
            assert len(answers) == 1 + woken
    for key, expected in model.items():
        assert session.now(StoreOp.GET, key).values == (expected,)
