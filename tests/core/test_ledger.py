"""Where a group's time goes, and that it adds up."""

from everstep.core.ledger import GROUPS_MAX, Account, Books, Ledger, Spent


def test_every_instant_is_on_one_account() -> None:
    ledger = Ledger()
    ledger.begin(10.0)
    ledger.enter(Account.RECOVERING, 11.0)
    ledger.enter(Account.TRAINING, 11.5)
    ledger.enter(Account.TRAINING, 12.0)
    assert ledger.spent(14.0) == Spent(training_ms=2500, recovering_ms=500, waiting_ms=1000)
    assert ledger.spent(14.0).total_ms == 4000


def test_the_wait_that_a_failure_struck_is_booked_as_detecting_after_all() -> None:
    ledger = Ledger()
    ledger.begin(0.0)
    ledger.enter(Account.TRAINING, 1.0)
    ledger.rebook(Account.DETECTING, 5.0, 7.0)
    ledger.enter(Account.RECONFIGURING, 7.0)
    assert ledger.spent(8.0) == Spent(training_ms=4000, detecting_ms=2000, reconfiguring_ms=1000, waiting_ms=1000)


def test_a_wait_that_began_under_another_account_is_rebooked_from_its_change_only() -> None:
    ledger = Ledger()
    ledger.begin(0.0)
    ledger.enter(Account.TRAINING, 6.0)
    ledger.rebook(Account.DETECTING, 5.0, 7.0)
    assert ledger.spent(7.0) == Spent(detecting_ms=1000, waiting_ms=6000)


def test_a_group_s_processes_add_up_and_the_rest_of_its_wall_time_is_absence() -> None:
    books = Books()
    books.heard("a", "first", Spent(training_ms=500), 10.0)
    books.heard("a", "first", Spent(training_ms=2500), 12.0)
    books.heard("a", "second", Spent(recovering_ms=1000), 16.0)
    statement = books.statement("a")
    assert statement is not None
    assert statement["training_s"] == 2.5
    assert statement["recovering_s"] == 1.0
    assert statement["absent_s"] == 3.0
    assert statement["wall_s"] == 6.5 == sum(v for name, v in statement.items() if name != "wall_s")


def test_a_lighthouse_that_started_anew_counts_a_process_from_its_beginning() -> None:
    books = Books()
    books.heard("a", "first", Spent(training_ms=60_000), 3.0)
    statement = books.statement("a")
    assert statement is not None
    assert (statement["wall_s"], statement["absent_s"]) == (60.0, 0.0)


def test_books_are_bounded_and_forget_who_was_silent_longest() -> None:
    books = Books()
    for number in range(GROUPS_MAX + 1):
        books.heard(str(number), "n", Spent(), float(number))
    assert len(books.groups) == GROUPS_MAX
    assert books.statement("0") is None
    assert books.statement(str(GROUPS_MAX)) is not None
