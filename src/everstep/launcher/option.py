"""What one option of `everstep run` is: its names, its type, where else it may be said, and what becomes of it."""

import dataclasses
import enum

Value = str | int | float | bool | tuple[str, ...] | None


class Kind(enum.Enum):
    """How a value is written."""

    TEXT = "text"
    INTEGER = "whole number"
    NUMBER = "number"
    FLAG = "flag"
    LIST = "list"  # a,b,c


class Fate(enum.Enum):
    """What `everstep run` does with an option of torchrun."""

    HONOURED = "honoured"  # means what it means there
    TRANSLATED = "translated"  # accepted; what it is for is reached in another way
    WITHOUT_EFFECT = "accepted without effect"  # and explained once, in the log
    REFUSED = "refused"  # an error that says what to use instead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """`name` is the key in a configuration file, and argparse's dest; `note` says what the fate means."""

    name: str
    flags: tuple[str, ...]
    kind: Kind = Kind.TEXT
    default: Value = None
    choices: tuple[str, ...] = ()
    variable: str | None = None
    fate: Fate = Fate.HONOURED
    note: str = ""
    help: str = ""
    metavar: str | None = None
    is_torchruns: bool = False
    is_hangs: bool = False  # a setting of rank monitoring: docs/hangs.md
    escapes_commas: bool = False  # of a LIST: ",," is a comma


def torchruns(
    name: str, fate: Fate, note: str, help_text: str, default: Value = "", *, short: str = "", env: bool = True
) -> Option:
    """An option as torchrun has it: `--a-b` and `--a_b`, PET_A_B, and a type that follows from the default."""
    dashed, underscored = f"--{name.replace('_', '-')}", f"--{name}"
    flags = ((short,) if short else ()) + ((dashed,) if dashed == underscored else (dashed, underscored))
    return Option(
        name=name,
        flags=flags,
        kind=Kind.FLAG if isinstance(default, bool) else Kind.TEXT,
        default=default,
        variable=f"PET_{name.upper()}" if env else None,
        fate=fate,
        note=note,
        help=help_text,
        is_torchruns=True,
    )


def ours(name: str, variable: str | None, help_text: str, *, kind: Kind = Kind.TEXT, default: Value = None) -> Option:
    """An option that torchrun does not have."""
    dashed, underscored = f"--{name.replace('_', '-')}", f"--{name}"
    return Option(
        name=name,
        flags=(dashed,) if dashed == underscored else (dashed, underscored),
        kind=kind,
        default=default,
        variable=variable,
        help=help_text,
    )
