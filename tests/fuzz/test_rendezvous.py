"""A rendezvous that is told anything at all, in any order: it never fails, and its clock stays sane."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.messages import Close, SendToNodes
from everstep.core.node_messages import (
    CloseRendezvous,
    CloseScope,
    FromNode,
    IntervalsSeen,
    JoinRound,
    LeaveRendezvous,
    NodeHeartbeat,
    NodeHello,
    NodeSpec,
    RoundComplete,
    RoundInfo,
    SeenInterval,
    StoreCall,
    StoreHosted,
    StoreOp,
)
from everstep.core.ranks import RankPolicy
from everstep.core.rendezvous import NodeLinkClosed, NodeMessage, RendezvousConfig, RendezvousMachine
from everstep.core.types import RendezvousRound

LINKS = st.integers(1, 5)
NAMES = st.sampled_from(["a", "b", "c", ""])
ROUNDS = st.builds(RendezvousRound, st.sampled_from([-1, 0, 1, 2, 3, 1 << 70]), st.sampled_from(["me", "old", ""]))
INFOS = st.builds(RoundInfo, ROUNDS, st.integers(-1, 3), st.integers(-1, 3), st.sampled_from(["s:1", ""]))
SPECS = st.builds(
    NodeSpec,
    node_id=NAMES,
    nonce=NAMES,
    min_nodes=st.sampled_from([1, 1, 2, 0]),
    max_nodes=st.sampled_from([2, 2, 3, -1]),
    join_timeout_s=st.sampled_from([5.0, 0.0, float("nan"), float("inf"), -1.0]),
    last_call_s=st.sampled_from([1.0, 0.0]),
    ranks=st.sampled_from([RankPolicy.PREVIOUS] * 3 + list(RankPolicy)),
    infrastructure_rank=st.sampled_from([None, 0, 1, -7]),
    domain=NAMES,
    domain_size=st.integers(-1, 2),
)
SECONDS = st.sampled_from([0.0, 1.0, 2.0, 1e30, -1.0, float("inf"), float("nan")])
MESSAGES: st.SearchStrategy[FromNode] = st.one_of(
    st.builds(
        NodeHello,
        group=st.just(""),
        node=SPECS,
        lighthouse=NAMES,
        last=st.none() | INFOS,
        is_member=st.booleans(),
        is_joining=st.booleans(),
        is_closed=st.sampled_from([False, False, False, True]),
    ),
    st.builds(JoinRound, st.none() | ROUNDS),
    st.builds(StoreHosted, ROUNDS, st.sampled_from(["h:1", "", "\n", "x" * 1000])),
    st.builds(LeaveRendezvous),
    st.builds(CloseRendezvous, st.sampled_from(CloseScope), st.just("r" * 500)),
    st.builds(NodeHeartbeat),
    st.builds(IntervalsSeen, st.lists(st.builds(SeenInterval, NAMES, SECONDS), max_size=3).map(tuple)),
    st.builds(
        StoreCall,
        st.integers(0, 3),
        ROUNDS,
        st.sampled_from(StoreOp),
        st.lists(NAMES, max_size=2).map(tuple),
        st.lists(st.binary(max_size=2), max_size=2).map(tuple),
        st.integers(-1, 2),
    ),
)
STEPS = st.one_of(
    st.builds(NodeMessage, LINKS, MESSAGES),
    st.builds(NodeMessage, LINKS, MESSAGES),
    st.builds(NodeLinkClosed, LINKS),
    st.sampled_from(["tick", "answer", "wait"]),
)


@given(st.booleans(), st.lists(STEPS, max_size=60))
def test_whatever_it_is_told_it_goes_on(is_return: bool, steps: list[NodeMessage | NodeLinkClosed | str]) -> None:
    machine = RendezvousMachine(RendezvousConfig(job_id="j", group="", life="me", is_return=is_return))
    now = 0.0
    effects = machine.start(now)
    hosts: list[tuple[int, RendezvousRound]] = []
    ranks: dict[RendezvousRound, dict[int, int]] = {}
    for step in steps:
        now += 0.01
        if isinstance(step, str) and step != "answer":
            deadline = machine.next_deadline()
            if deadline is not None:
                now = max(now, deadline) if step == "wait" else now
                effects = machine.tick(now)
        elif isinstance(step, str):
            effects = []
            for link, round_ in hosts:
                effects += machine.receive(NodeMessage(link, StoreHosted(round_, "h:1")), now)
            hosts.clear()
        else:
            effects = machine.receive(step, now)
        for effect in effects:
            assert not isinstance(effect, Close) or effect.link > 0
            if not isinstance(effect, SendToNodes):
                continue
            msgspec.msgpack.encode(effect.message)
            if type(effect.message).__name__ == "HostStore":
                hosts += [(link, effect.message.round) for link in effect.links]  # type: ignore[union-attr]
            if isinstance(effect.message, RoundComplete):
                info = effect.message.info
                assert 0 <= info.rank < info.size
                ranks.setdefault(info.round, {})[info.rank] = info.size
        deadline = machine.next_deadline()
        assert deadline is None or deadline > now or step not in ("tick", "wait")
        msgspec.json.encode(machine.status())
    for by_rank in ranks.values():
        assert len(set(by_rank.values())) == 1
