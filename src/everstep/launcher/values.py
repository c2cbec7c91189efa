"""Every option's value and where it came from: the command line, else the environment, else the file, else the default.

Raises ConfigError for a value of the environment or the file that its option cannot have; what is wrong on the
command line itself is argparse's to say.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everstep.errors import ConfigError
from everstep.launcher.config_file import SCRIPT_KEYS, ConfigFile, read_config_file, read_ft_file
from everstep.launcher.option import Kind, Option, Value
from everstep.launcher.options import BY_NAME, OPTIONS, SCRIPT, SCRIPT_ARGS, CommandLine, split_list

COMMAND_LINE, DEFAULT = "command line", "default"
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
INTEGER_CHARS_MAX = 18


@dataclass(frozen=True)
class Given:
    """A value, and where it was said: COMMAND_LINE, the variable's name, the file's, or DEFAULT."""

    value: Value
    origin: str

    @property
    def is_given(self) -> bool:
        return self.origin != DEFAULT


@dataclass(frozen=True, kw_only=True)
class Values:
    """Of every option, by its name; and the script with its arguments, None and () where there is none."""

    options: Mapping[str, Given]
    script: Given
    script_args: Given

    def is_given(self, name: str) -> bool:
        return self.options[name].is_given

    def named(self, name: str) -> str:
        """What an error calls it: the option, and the variable or file where that is where it was said."""
        option, origin = BY_NAME[name], self.options[name].origin
        flag = next(flag for flag in option.flags if flag.startswith("--"))
        return flag if origin in (COMMAND_LINE, DEFAULT) else f"{flag} ({origin})"

    def text(self, name: str) -> str:
        value = self.options[name].value
        assert isinstance(value, str), name
        return value

    def optional_text(self, name: str) -> str | None:
        """None where it is empty, too."""
        return self.text(name) or None if self.options[name].value is not None else None

    def integer(self, name: str) -> int:
        value = self.options[name].value
        assert isinstance(value, int), name
        return value

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name) if self.options[name].value is not None else None

    def flag(self, name: str) -> bool:
        return self.options[name].value is True

    def items(self, name: str) -> tuple[str, ...]:
        value = self.options[name].value
        assert isinstance(value, tuple), name
        return value


def find_values(command_line: CommandLine, environ: Mapping[str, str]) -> Values:
    """Reads the file that `--config` or EVERSTEP_CONFIG names, if any."""
    config = BY_NAME["config"]
    path = _given(config, command_line, environ, None)
    file = read_config_file(str(path.value), BY_NAME) if path.value else None
    options = {option.name: _given(option, command_line, environ, file) for option in OPTIONS}
    if ft_path := options["ft_cfg_path"].value:
        ft_file = read_ft_file(str(ft_path))
        said_there = {name: Given(value, ft_file.name) for name, value in ft_file.values.items()}
        options |= {n: given for n, given in said_there.items() if options[n].origin in (DEFAULT, file and file.name)}
    _translate(options)
    for name, given in options.items():
        _check_choice(BY_NAME[name], given)
    script, script_args = (_of_file(file, key) for key in SCRIPT_KEYS)
    if command_line.script is not None:
        script, script_args = Given(command_line.script, COMMAND_LINE), Given(command_line.script_args, COMMAND_LINE)
    return Values(options=options, script=script, script_args=script_args)


def _translate(options: dict[str, Given]) -> None:
    """What `--ft-…` says of things that have an option of their own, which wins."""
    policy, infrastructure = options["ft_restart_policy"], options["ft_use_infra_group_rank"]
    if policy.is_given and not options["restart_policy"].is_given:
        options["restart_policy"] = policy
    if infrastructure.is_given and not options["rank_assignment"].is_given:
        is_wanted = str(infrastructure.value).strip().lower() in TRUE
        options["rank_assignment"] = Given("infrastructure" if is_wanted else "previous", infrastructure.origin)


def _given(option: Option, command_line: CommandLine, environ: Mapping[str, str], file: ConfigFile | None) -> Given:
    if option.name in command_line.values:
        return Given(command_line.values[option.name], COMMAND_LINE)
    text = environ.get(option.variable) if option.variable else None
    # An empty variable of torchrun's counts, as it does there; of ours, as elsewhere in Everstep, it says nothing.
    if option.variable and (text or (text is not None and option.is_torchruns)):
        return Given(from_text(option, text, option.variable), option.variable)
    if file is not None and option.name in file.values:
        where = f"{option.name} in {file.name}"
        return Given(from_file(option, file.values[option.name], where), file.name)
    return Given(option.default, DEFAULT)


def _of_file(file: ConfigFile | None, key: str) -> Given:
    if file is None or key not in file.values:
        return Given(() if key == SCRIPT_ARGS else None, DEFAULT)
    value = file.values[key]
    if key == SCRIPT:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{key} in {file.name} is {value!r}; give the script's path")
        return Given(value, file.name)
    if not isinstance(value, list) or not all(_is_scalar(item) and not isinstance(item, bool) for item in value):
        raise ConfigError(f"{key} in {file.name} is {value!r}; give a list of words, in quotes")
    return Given(tuple(str(item) for item in value), file.name)


def from_text(option: Option, text: str, where: str) -> Value:
    """As the environment has it."""
    match option.kind:
        case Kind.FLAG:
            word = text.strip().lower()
            if word in TRUE or word in FALSE:
                return word in TRUE
            if word.isascii() and word.isdigit():  # PET_STANDALONE=2 is a yes there
                return int(word[:INTEGER_CHARS_MAX]) != 0
            raise ConfigError(f"{where}={text!r} must be 1 or 0")
        case Kind.INTEGER:
            digits = text.strip().removeprefix("-")
            if not (digits.isascii() and digits.isdigit() and len(digits) <= INTEGER_CHARS_MAX):
                raise ConfigError(f"{where}={text!r} must be a whole number")
            return int(text)
        case Kind.NUMBER:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise ConfigError(f"{where}={text!r} must be a number")
            return number
        case Kind.LIST:
            return split_list(text, option)
        case Kind.TEXT:
            return text


def from_file(option: Option, value: Any, where: str) -> Value:
    """As YAML and TOML have it: with types of its own, or as text."""
    if value is None:
        raise ConfigError(f"{where} has no value; give one, or leave the line out")
    if option.kind is Kind.FLAG and not isinstance(value, (bool, str)):
        raise ConfigError(f"{where} is {value!r}; it must be true or false")
    if option.kind is not Kind.FLAG and isinstance(value, bool):
        raise ConfigError(f"{where} is {str(value).lower()}, but it takes a {option.kind.value}")
    if isinstance(value, bool):
        return value
    if option.kind is Kind.LIST and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if option.name == "rdzv_conf" and isinstance(value, dict):
        return _as_pairs(value, where)
    if not _is_scalar(value):
        raise ConfigError(f"{where} is {value!r}, but it takes one {option.kind.value}")
    return from_text(option, str(value), where)


def _as_pairs(table: Mapping[Any, Any], where: str) -> str:
    for key, value in table.items():
        if not _is_scalar(value) or "," in str(value):
            raise ConfigError(f"{where}: {key} is {value!r}; give a word or a number, without a comma")
    return ",".join(f"{key}={value}" for key, value in table.items())


def _check_choice(option: Option, given: Given) -> None:
    if option.choices and given.is_given and given.value not in option.choices:
        raise ConfigError(f"{given.origin}: {option.name}={given.value!r} must be one of {', '.join(option.choices)}")


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, int, float))
