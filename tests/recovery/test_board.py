"""Which chunk comes from whom: every chunk once, whatever breaks, is slow, or says something else."""

import random

import pytest

from everstep.recovery.board import RUN_CHUNKS_MAX, Board

TRUE, OTHER, DAMAGED = b"true", b"othr", b"dmgd"


def test_one_source_is_asked_for_everything_at_once() -> None:
    board = Board(100, 1)
    board.appoint(0)
    assert board.claim(0, 0.0) == range(100)
    for chunk in range(100):
        board.landed(0, chunk, TRUE, 1.0)
    assert board.is_complete


def test_a_chunk_of_another_source_counts_once_the_primary_says_the_same() -> None:
    board = Board(2, 2)
    board.appoint(0)
    assert board.claim(1, 0.0) == range(1)
    board.landed(1, 0, TRUE, 1.0)
    done = [board.done]
    board.learn(0, [TRUE, TRUE])
    assert [*done, board.done] == [0, 1]
    assert board.claim(1, 1.0) == range(1, 2)
    board.landed(1, 1, OTHER, 2.0)
    assert (board.done, board.differing) == (1, 1)
    assert board.claim(1, 2.0) is None, "only the primary has it"
    assert board.claim(0, 2.0) == range(1, 2)
    board.landed(0, 1, TRUE, 3.0)
    assert board.is_complete


def test_what_differs_is_fetched_again_with_its_senders_digest_which_tells_damage_from_difference() -> None:
    board = Board(2, 3)
    board.appoint(0)
    assert board.needs_digests(0, range(2))
    for source, chunk in ((1, 0), (2, 1)):
        run = board.claim(source, 0.0)
        assert run == range(chunk, chunk + 1)
        assert not board.needs_digests(source, run)
        assert not board.landed(source, chunk, OTHER, 1.0, is_vouched_for=False)
    board.learn(0, [TRUE, TRUE])
    assert (board.done, board.differing) == (0, 0)
    assert board.claim(0, 1.0) is None, "who sent it shall say what it was"
    assert board.claim(1, 1.0) == range(1)
    assert board.needs_digests(1, range(1))
    assert board.landed(1, 0, TRUE, 2.0), "it had been damaged on its way"
    assert board.needs_digests(1, range(1, 2)), "from now on"
    assert board.claim(2, 1.0) == range(1, 2)
    assert not board.landed(2, 1, OTHER, 2.0)
    assert (board.done, board.differing) == (1, 1)
    assert not board.needs_digests(2, range(1))
    assert board.claim(0, 2.0) == range(1, 2)


def test_what_differed_from_one_that_is_lost_before_it_could_say_why_goes_to_the_others() -> None:
    for was_lost_before in (True, False):
        board = Board(1, 2)
        board.appoint(0)
        assert board.claim(1, 0.0) == range(1)
        board.landed(1, 0, OTHER, 1.0, is_vouched_for=False)
        if was_lost_before:
            board.lose(1)
        board.learn(0, [TRUE])
        if not was_lost_before:
            board.lose(1)
        assert board.claim(0, 1.0) == range(1)
        board.landed(0, 0, TRUE, 2.0)
        assert board.is_complete


def test_what_a_lost_primary_sent_stays_if_its_heir_says_the_same() -> None:
    board = Board(3, 2)
    board.appoint(0)
    assert board.claim(0, 0.0) == range(1)
    board.landed(0, 0, TRUE, 1.0)
    assert board.claim(0, 1.0) == range(1, 2)
    board.lose(0)
    board.appoint(1)
    done = [board.done]
    board.learn(0, [TRUE])
    assert [*done, board.done] == [0, 1]
    assert board.claim(1, 1.0) == range(1, 3)


def test_what_a_slow_one_still_owes_goes_to_one_that_has_nothing_to_do() -> None:
    board = Board(4, 2)
    board.appoint(0)
    assert board.claim(1, 0.0) == range(1)
    now = 0.0
    while (run := board.claim(0, now)) is not None:
        now += 0.01
        board.landed(0, run.start, TRUE, now)
    assert board.victim_of(0, now) is None, "it is not slow yet"
    assert board.victim_of(0, now + 1.0) == 1
    board.give_back(1)
    assert board.claim(1, now + 1.0) is None, "as long as there is a quicker one"
    assert board.claim(0, now + 1.0) == range(1)
    board.lose(0)
    board.appoint(1)
    assert board.claim(1, now + 1.0) == range(1)


def test_nobody_is_robbed_of_what_only_he_has() -> None:
    board = Board(2, 2)
    board.appoint(0)
    board.claim(1, 0.0)
    board.landed(1, 0, OTHER, 0.1)
    board.learn(0, [TRUE])
    assert board.claim(0, 0.1) == range(1)
    board.claim(1, 0.1)
    board.landed(1, 1, TRUE, 0.2)
    assert board.victim_of(1, 100.0) is None


def test_without_the_primarys_digests_only_what_it_sends_itself_counts() -> None:
    board = Board(2, 2)
    board.appoint(0)
    board.claim(1, 0.0)
    board.landed(1, 0, TRUE, 0.1)
    board.distrust()
    assert board.claim(0, 0.2) == range(1)


def test_what_arrives_when_the_primarys_digests_have_failed_is_fetched_from_it_again() -> None:
    board = Board(3, 2)
    board.appoint(0)
    assert board.claim(1, 0.0) == range(1)
    board.distrust()
    board.landed(1, 0, TRUE, 0.1)
    assert board.claim(1, 0.2) is None, "nobody could tell whether it is the state"
    assert board.victim_of(1, 9.0) is None
    for chunk in (0, 1, 2):
        run = board.claim(0, 1.0)
        assert run is not None
        assert chunk in run
        for landed in run:
            board.landed(0, landed, TRUE, 1.0)
        if board.is_complete:
            break
    assert board.is_complete


def test_a_primary_that_was_robbed_is_asked_for_what_only_it_has() -> None:
    board = Board(3, 2)
    board.appoint(0)
    assert board.claim(1, 0.0) == range(1)
    board.landed(1, 0, OTHER, 0.1)
    assert board.claim(0, 0.1) == range(1, 2)
    assert board.claim(1, 0.1) == range(2, 3)
    board.landed(1, 2, TRUE, 0.2)
    assert board.victim_of(1, 9.0) == 0
    board.give_back(0)
    assert not board.is_wanted(0)
    board.learn(0, [TRUE])
    assert board.is_wanted(0)
    assert board.claim(0, 9.0) == range(1)


def test_when_the_quick_ones_are_lost_those_that_were_robbed_serve_again() -> None:
    board = Board(40, 3)
    board.appoint(0)
    for source in (0, 1):
        board.claim(source, 0.0)
    while (run := board.claim(2, 0.1)) is not None:
        for chunk in run:
            board.landed(2, chunk, TRUE, 0.1)
    for _ in range(2):
        victim = board.victim_of(2, 9.0)
        assert victim is not None
        board.give_back(victim)
    assert not board.is_wanted(0)
    assert not board.is_wanted(1)
    board.lose(2)
    assert board.is_wanted(0)
    assert board.is_wanted(1)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_every_chunk_ends_as_the_primary_has_it_and_no_two_write_at_once(seed: int) -> None:
    rng = random.Random(seed)
    count, sources = rng.randrange(1, 60), rng.randrange(1, 5)
    board = Board(count, sources)
    truth = {
        number: [TRUE if rng.random() < 0.9 else b"%d" % number for _ in range(count)] for number in range(sources)
    }
    live = list(range(sources))
    owed: dict[int, list[int]] = {number: [] for number in live}
    have: list[bytes] = [b""] * count
    with_digests = [True] * sources  # of what is owed
    told, now = 0, 0.0
    board.appoint(0)
    for _ in range(6_000):
        if board.is_complete:
            break
        now += rng.random() * 0.2
        number = rng.choice(live)
        if rng.random() < 0.02 and len(live) > 1:
            live.remove(number)
            owed[number] = []
            board.lose(number)
            if board.primary == number:
                board.appoint(live[0])
                told = 0
        elif rng.random() < 0.3 and told < count:
            assert board.primary is not None
            if rng.random() < 0.1:
                board.distrust()
                told = count  # its digests come no more
                continue
            board.learn(told, [truth[board.primary][told]])
            told += 1
        elif not owed[number] and not board.is_wanted(number):
            continue  # it was robbed: nobody asks it
        elif owed[number] and rng.random() < 0.05:
            owed[number] = []
            board.give_back(number)
        elif owed[number]:
            chunk = owed[number].pop(0)
            if rng.random() < 0.05:
                board.damaged(number, chunk, now)
            else:
                is_vouched_for = with_digests[number] or rng.random() < 0.1
                have[chunk] = DAMAGED if not is_vouched_for and rng.random() < 0.05 else truth[number][chunk]
                board.landed(number, chunk, have[chunk], now, is_vouched_for=is_vouched_for)
        elif (run := board.claim(number, now)) is not None:
            assert len(run) <= RUN_CHUNKS_MAX or len(live) == 1 or number == board.primary
            assert not set(run) & {chunk for chunks in owed.values() for chunk in chunks}
            owed[number] = list(run)
            with_digests[number] = board.needs_digests(number, run)
        elif (victim := board.victim_of(number, now)) is not None:
            assert owed[victim]
            owed[victim] = []
            board.give_back(victim)
    assert board.is_complete
    assert board.primary is not None
    assert have == truth[board.primary]
