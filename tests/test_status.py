from io import StringIO

from rich.console import Console

from everstep.status import ACCOUNTS, ledger_table

A_DAY_AND_MORE = (123.45, 986_400.12)


def test_the_ledgers_headings_are_whole_in_a_terminal_of_80_columns() -> None:
    names = (*ACCOUNTS, "wall")
    ledger = {str(i): {f"{name}_s": seconds for name in names} for i, seconds in enumerate(A_DAY_AND_MORE)}
    shown = StringIO()

    Console(file=shown, width=80).print(ledger_table(ledger))

    headings = shown.getvalue().splitlines()[1].split()
    assert headings == ["group", *names]
    assert "123.45" in shown.getvalue()
    assert "986400" in shown.getvalue()
