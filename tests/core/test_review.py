"""Schedules that an adversarial reading of notices, drains and judgements found."""

from everstep.core.messages import Heartbeat
from tests.core.stage import Stage


def played(script: str, stage: Stage | None = None) -> tuple[Stage, str]:
    stage = stage or Stage()
    return stage, "\n".join(stage.run(line.strip()) for line in script.strip().splitlines())


def steps(stage: Stage, names: str, count: int) -> None:
    for _ in range(count):
        stage.run(f"step {names}")


PASSIVE = """
groups 3
lighthouse start
start_passive a b c
build a b c
recover b c
step a b c
"""


def test_a_notice_put_off_is_dropped_when_its_lighthouse_died() -> None:
    stage, _ = played(PASSIVE)
    played("disconnect c\nwait 0.05\nlighthouse crash\nlighthouse start\nconnect a b c", stage)
    played("step a b c\nstep a b c", stage)
    assert [actor.replica.step for actor in stage.actors.values()] == [3, 3, 3]


def test_a_notice_put_off_is_dropped_when_the_round_went_on_without_the_member() -> None:
    stage, _ = played(PASSIVE)
    played("kill c\nwait 0.05\nhold b\nfail a 2\nwait 3\nrelease b", stage)
    b = stage.actors["b"].replica
    assert b.evictions == 1, "it was silent, and was left out"
    played("build a\nstep a\nbuild a b\nrecover b\nstep a b", stage)
    assert not b.is_frozen
    played("step a b", stage)
    assert b.step == stage.actors["a"].replica.step == 4


STUCK = """
groups 3
lighthouse start
start a b c
build a b c
recover b c
"""


def stuck_c() -> Stage:
    stage, _ = played(STUCK)
    steps(stage, "a b c", 12)
    played("doing a waiting\ndoing b waiting\ndoing c computing", stage)
    return stage


def test_a_stuck_member_whose_link_comes_back_in_the_round_does_not_hold_it_up() -> None:
    stage = stuck_c()
    played("wait 7.9\nhold b\nwait 0.5", stage)
    played("disconnect c\nconnect c\nrelease b\nwait 3", stage)
    assert stage.actors["a"].replica.is_frozen is False
    played("build a b\nstep a b", stage)


def test_a_stuck_member_that_moves_on_while_no_other_holder_is_left_is_taken_back() -> None:
    stage = stuck_c()
    played("wait 7.9\nhold a b\nwait 0.5\nkill a\nkill b\nwait 3", stage)
    c = stage.actors["c"].replica
    assert c.is_frozen
    played("doing c waiting\nwait 1", stage)
    played("build c\nstep c", stage)
    assert c.step == 13


def test_a_history_is_given_up_though_its_last_holder_was_stuck_before_it_was_killed() -> None:
    stage = stuck_c()
    played("wait 7.9\nhold a b\nwait 0.5\nkill a\nkill b\nwait 3\nkill c\nwait 1\nrelease a b", stage)
    _, told = played("start a' b' c'", stage)
    assert "history lost" in told
    assert "founded" in told


def test_a_group_that_leaves_at_the_end_of_its_script_is_no_failure() -> None:
    stage, _ = played(STUCK)
    _, told = played("leave c\nwait 0.5", stage)
    assert "publishes member-left c#" in told
    assert "publishes member-failed" not in told


def test_asking_to_leave_again_does_not_put_the_leaving_off() -> None:
    from everstep.core.moves import AskToLeave

    stage, _ = played("groups 1\nlighthouse start\nstart a\nbuild a")
    a = stage.actors["a"].replica
    a.receive(AskToLeave(20.0), 100.0)
    a.receive(AskToLeave(20.0), 110.0)
    a.tick(120.0)
    assert a.has_left


def test_a_group_drained_by_the_operator_does_not_come_back_when_its_link_breaks_at_that_moment() -> None:
    stage, _ = played(STUCK)
    _, told = played("drain_group c\nreduce a b c\nvote a ok b ok c ok\ndisconnect c\nvoted a b c\nconnect c", stage)
    assert stage.actors["c"].replica.has_left
    assert "logs member waits to join" not in told


def test_a_pause_of_the_whole_machine_makes_nobody_stuck() -> None:
    stage = stuck_c()
    c = stage.actors["c"].replica
    played("wait 1", stage)
    stage.now += 30.0  # nothing ran: neither the lighthouse nor a member
    beat = next(e.message for e in c.tick(stage.now))  # type: ignore[union-attr]
    assert isinstance(beat, Heartbeat)
    assert beat.activity_s < 2.0
