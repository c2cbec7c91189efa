"""`everstep run` and `everstep config show`: from a command line to an agent, or to a table of what it says."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from everstep.errors import ConfigError
from everstep.launcher.option import Value
from everstep.launcher.options import OPTIONS, SCRIPT, SCRIPT_ARGS, CommandLine, make_parser, parse
from everstep.launcher.settings import JobSettings

RUN, SHOW = "everstep run", "everstep config show"
SWITCHES = {"origin": "Say where each value comes from.", "json": "Print one JSON object."}


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Start the agent, and be back with its exit code. Raises ConfigError."""
    settings = settings_of(arguments, environ, says=True)
    from everstep.launcher import agent  # heavy, and nothing else here needs it

    return agent.run(settings)


def settings_of(arguments: Sequence[str], environ: Mapping[str, str], *, says: bool = False) -> JobSettings:
    """`says`: log what was said and has no effect."""
    command_line = parse(arguments, RUN)  # first: --help needs nothing else
    from everstep.launcher.hang_settings import say_without_effect
    from everstep.launcher.job_settings import job_settings
    from everstep.launcher.machine import this_machine
    from everstep.launcher.values import find_values

    values = find_values(command_line, environ)
    if values.script.value is None:
        _usage_error(RUN, f"the following arguments are required: {SCRIPT}")
    if says:
        say_without_effect(values)
    return job_settings(values, this_machine(environ))


def show(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Print every value, as it would be for `everstep run` with the same arguments. Raises ConfigError."""
    from everstep.launcher.values import find_values

    command_line = parse(arguments, SHOW, SWITCHES)
    said = dict(command_line.values)
    with_origin, as_json = (bool(said.pop(switch, False)) for switch in SWITCHES)
    values = find_values(
        CommandLine(values=said, script=command_line.script, script_args=command_line.script_args), environ
    )
    rows = [(option.name, values.options[option.name]) for option in OPTIONS]
    rows += [(SCRIPT, values.script), (SCRIPT_ARGS, values.script_args)]
    if as_json:
        import json

        shown = {
            name: {"value": given.value, "origin": given.origin} if with_origin else given.value for name, given in rows
        }
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    _print_table([(name, _text(given.value), given.origin) for name, given in rows], with_origin)


def explain(arguments: Sequence[str]) -> None:
    """Print what one option or key is, and what becomes of it. Raises ConfigError with the nearest one."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        raise ConfigError("usage: everstep config explain KEY, an option or a key of a fault_tolerance section")
    key = arguments[0]
    from everstep.launcher.hang_options import BY_KEY
    from everstep.launcher.options import BY_NAME
    from everstep.rendezvous_conf import check_key

    name = key.strip().removeprefix("--").replace("-", "_")
    name = f"ft_{name}" if name in BY_KEY and name not in BY_NAME else name
    check_key("", name.removeprefix("ft_") if name not in BY_NAME else name, (*BY_NAME, *BY_KEY))
    option = BY_NAME[name]
    lines = [" ".join(flag for flag in option.flags if "_" not in flag)]
    ft_key = BY_KEY.get(name.removeprefix("ft_")) if option.is_hangs else None
    default = ft_key.default if ft_key is not None else option.default
    lines.append(f"value    {ft_key.form.value if ft_key is not None else option.kind.value}")
    if default not in (None, "", ()):
        lines.append(f"default  {_text(default)}")
    if option.variable:
        lines.append(f"variable {option.variable}")
    lines.append(f"fate     {(ft_key or option).fate.value}")
    if ft_key is not None and ft_key.accepts:
        lines.append(f"accepted {', '.join(filter(None, ft_key.accepts))}")
    lines.append(option.help if not option.note or option.note in option.help else f"{option.help} {option.note}")
    sys.stdout.write("\n".join(lines) + "\n")


def _print_table(rows: list[tuple[str, str, str]], with_origin: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("option", "value", *(["origin"] if with_origin else []))
    for name, value, origin in rows:
        # Text: brackets in a value are no markup
        table.add_row(*(Text(cell) for cell in _cells(name.replace("_", "-"), value, origin, with_origin)))
    Console().print(table)


def _cells(name: str, value: str, origin: str, with_origin: bool) -> Iterator[str]:
    yield name
    yield value
    if with_origin:
        yield origin


def _text(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _usage_error(prog: str, message: str) -> NoReturn:
    make_parser(prog, {}).error(message)
