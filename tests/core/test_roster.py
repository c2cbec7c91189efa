"""Which member lists a peer has, and what therefore is sent to it."""

from everstep.core.messages import Hello, MembersChange
from everstep.core.roster import LISTS_KNOWN_MAX, Peer, Roster
from everstep.core.types import Member, MemberId, Phase, Quorum, QuorumId, Report


def peer(name: str, link: int | None) -> Peer:
    member = MemberId(name, 1)
    report = Report(member, None, True, None, 0, Phase.RUNNING, None, None)
    return Peer(member, Hello(report, nonce=name, store=f"{name}:1"), link)


def quorum(seq: int, *names: str) -> Quorum:
    return Quorum(QuorumId(1, seq), tuple(Member(MemberId(name, 1), f"{name}:1") for name in names))


def test_who_has_the_base_gets_the_difference_and_the_others_the_whole_list() -> None:
    roster = Roster()
    for link, name in enumerate("abc", start=1):
        roster.add(peer(name, link))
    base, new = quorum(1, "a", "b"), quorum(2, "a", "b", "c")
    roster.split_by_known(base, None, base.member_ids)
    groups = roster.split_by_known(new, base, new.member_ids)
    added = new.members[2]
    assert groups == [
        (MembersChange(base.id, (), (added,)), (1, 2)),
        (MembersChange(None, (), new.members), (3,)),
    ]


def test_a_new_link_knows_no_list() -> None:
    roster = Roster()
    roster.add(peer("a", 1))
    base, new = quorum(1, "a"), quorum(2, "a", "b")
    roster.split_by_known(base, None, base.member_ids)
    roster.disconnect(1)
    assert roster.split_by_known(new, base, base.member_ids) == []
    roster.add(peer("a", 2))
    assert roster.split_by_known(new, base, base.member_ids) == [(MembersChange(None, (), new.members), (2,))]


def test_a_peer_is_counted_on_to_keep_only_the_newest_lists() -> None:
    someone = peer("a", 1)
    for seq in range(1, LISTS_KNOWN_MAX + 2):
        someone.learn(QuorumId(1, seq))
    assert QuorumId(1, 1) not in someone.known
    assert len(someone.known) == LISTS_KNOWN_MAX


def test_a_name_is_connected_as_its_newest_process() -> None:
    roster = Roster()
    old, new = peer("a", 1), peer("a", 2)
    roster.add(old)
    roster.disconnect(1)
    assert roster.connected_as("a") is None
    roster.add(new)
    assert roster.connected_as("a") is new
    assert roster.links_of([MemberId("a", 1), MemberId("b", 1)]) == (2,)
