"""The options of `everstep run`: torchrun's and ours, and a parser that treats a command line as torchrun's does.

No torch is needed. Values that were not on the command line are not in what `parse` returns: `values.py` finds them.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from everstep.launcher.hang_options import FT_OPTIONS
from everstep.launcher.option import Fate, Kind, Option, Value, ours
from everstep.launcher.torchrun_options import TORCHRUN_OPTIONS

OUR_OPTIONS: tuple[Option, ...] = (
    ours(
        "replica_groups",
        "EVERSTEP_REPLICA_GROUPS",
        "Replica groups on this node; its devices are split between them.",
        kind=Kind.INTEGER,
    ),
    ours(
        "replica_group_id",
        "REPLICA_GROUP_ID",
        "Name of this node's replica group, or what the names of several begin with.",
    ),
    ours(
        "num_replica_groups",
        "NUM_REPLICA_GROUPS",
        "Replica groups that the first step waits for, on all nodes.",
        kind=Kind.INTEGER,
    ),
    ours(
        "share_devices",
        "EVERSTEP_SHARE_DEVICES",
        "Every replica group sees all devices of this node.",
        kind=Kind.FLAG,
        default=False,
    ),
    ours(
        "restart_policy",
        "EVERSTEP_RESTART_POLICY",
        "What a failure restarts: any-failed (all), min-healthy (all, below min nodes), group (the failed group; "
        "default with replica groups).",
    ),
    ours(
        "rank_assignment",
        "EVERSTEP_RANK_ASSIGNMENT",
        "Where node ranks come from: previous, infrastructure or topology.",
    ),
    ours("lighthouse", "EVERSTEP_LIGHTHOUSE", "HOST:PORT or URL of a lighthouse that runs already."),
    ours("token_file", "EVERSTEP_TOKEN_FILE", "File of the job token, mode 0600."),
    ours("tls_ca", "EVERSTEP_TLS_CA", "PEM file of authorities for an https lighthouse."),
    ours(
        "no_template",
        "EVERSTEP_NO_TEMPLATE",
        "Start workers as new interpreters, not as forks of one that has imported torch.",
        kind=Kind.FLAG,
        default=False,
    ),
    ours("preload", "EVERSTEP_PRELOAD", "Modules that the template imports too, A,B.", kind=Kind.LIST, default=()),
    ours("config", "EVERSTEP_CONFIG", "YAML or TOML file with the same names; the command line wins."),
)
OPTIONS: tuple[Option, ...] = (*TORCHRUN_OPTIONS, *OUR_OPTIONS, *FT_OPTIONS)
BY_NAME = {option.name: option for option in OPTIONS}
SCRIPT, SCRIPT_ARGS = "training_script", "training_script_args"

_END = "\0everstep: the end of the command line"  # no argument can hold a NUL


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What was said on it, and nothing else. `script` is None where there was none."""

    values: dict[str, Value]
    script: str | None
    script_args: tuple[str, ...]


def parse(arguments: Sequence[str], prog: str = "everstep run", switches: dict[str, str] | None = None) -> CommandLine:
    """Ends with code 2 and the usage as argparse does. `switches`: more flags of this command, and their help.

    A file may name the script, so it is not required here. An option that lacks its value takes the mark at the end.
    """
    parser = make_parser(prog, switches or {})
    found = vars(parser.parse_args([*arguments, _END]))
    script, rest = found.pop(SCRIPT), found.pop(SCRIPT_ARGS)
    if script == _END:
        script = None
    elif not rest or rest.pop() != _END:
        parser.error("an option lacks its value")
    return CommandLine(values=found, script=script, script_args=tuple(rest))


def make_parser(prog: str, switches: dict[str, str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [OPTIONS] SCRIPT [ARGUMENTS]",
        description="Start, watch and restart the workers of a training job. Accepts every option of torchrun; what "
        "becomes of each is in docs/launcher.md.",
        argument_default=argparse.SUPPRESS,
    )
    for name, help_text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_text)
    ours = parser.add_argument_group("Everstep's options")
    torchruns = parser.add_argument_group("torchrun's options")
    hangs = parser.add_argument_group("Rank monitoring (docs/hangs.md)")
    for option in OPTIONS:
        group = torchruns if option.is_torchruns else hangs if option.is_hangs else ours
        group.add_argument(*option.flags, **_declaration(option))
    parser.add_argument(SCRIPT, help="The script (or module, or program) to run, with its arguments after it.")
    parser.add_argument(SCRIPT_ARGS, nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


class Parser(argparse.ArgumentParser):
    """An abbreviation that torchrun understands means the same here, whatever options we have beside its own."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        found = super()._get_option_tuples(option_string)
        actions = {id(entry[0]): entry for entry in found}
        if len(actions) > 1:
            actions = {key: entry for key, entry in actions.items() if _is_torchruns(entry[0])} or actions
        return list(actions.values())

    def error(self, message: str) -> NoReturn:
        start, unknown = "unrecognized arguments: ", message.removeprefix("unrecognized arguments: ")
        if message.startswith(start):
            message += _nearest(unknown.split())
        super().error(message.replace(repr(_END), "nothing").replace(_END, "nothing"))


def _nearest(arguments: list[str]) -> str:
    """What may have been meant by those that no option has."""
    flags = [flag for option in OPTIONS for flag in option.flags]
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    found = [near[0] for name in names if (near := difflib.get_close_matches(name, flags, n=1))]
    return f"; did you mean {', '.join(found)}?" if found else ""


def _is_torchruns(action: argparse.Action) -> bool:
    return action.dest in BY_NAME and BY_NAME[action.dest].is_torchruns


def _declaration(option: Option) -> dict[str, Any]:
    help_text = option.help.replace("%", "%%")
    if option.fate is Fate.REFUSED:
        help_text += " (Refused; see docs/launcher.md.)"
    if option.kind is Kind.FLAG:
        return {"action": "store_true", "help": help_text, "dest": option.name}
    return {
        "type": {Kind.INTEGER: _integer, Kind.NUMBER: _number}.get(option.kind, _text_of(option)),
        "choices": option.choices or None,
        "help": help_text,
        "dest": option.name,
        "metavar": None if option.choices else option.kind.name,
    }


def _text_of(option: Option) -> Any:
    def text(value: str) -> Value:
        if value == _END:
            raise argparse.ArgumentTypeError("expected one argument")
        return split_list(value, option) if option.kind is Kind.LIST else value

    return text


def _integer(value: str) -> int:
    if value == _END:
        raise argparse.ArgumentTypeError("expected one argument")
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {value!r}") from None


def _number(value: str) -> float:
    if value == _END:
        raise argparse.ArgumentTypeError("expected one argument")
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {value!r}") from None


def split_list(text: str, option: Option) -> tuple[str, ...]:
    """At commas; where the option says so, two of them are one that is meant."""
    if not option.escapes_commas:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    mark = "\0"
    return tuple(item.replace(mark, ",") for item in text.replace(",,", mark).split(","))
