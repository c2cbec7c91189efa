"""Reads the file of `--config`: YAML or TOML, one flat table of option names, with dashes or underscores."""

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError
from everstep.launcher.hang_options import BY_KEY, SECTION
from everstep.launcher.options import SCRIPT, SCRIPT_ARGS
from everstep.rendezvous_conf import check_key

FILE_BYTES_MAX = 1 << 20
SCRIPT_KEYS = (SCRIPT, SCRIPT_ARGS)


@dataclass(frozen=True)
class ConfigFile:
    """`values` by option name: text, whole numbers, booleans, lists and tables. `name`: as the operator called it."""

    name: str
    values: dict[str, Any]


def read_config_file(path: str, known: Collection[str]) -> ConfigFile:
    """Raises ConfigError for a file that cannot be read or parsed, and for a key that no option has."""
    text = _text(path, "--config")
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ConfigError(f"--config {path}: its name must end in .yaml, .yml or .toml, to say which it is")
    table = _toml(path, text) if suffix == ".toml" else _yaml(path, text)
    if not isinstance(table, dict):
        raise ConfigError(f"--config {path} must be a table of options (`nnodes: 2`), not a {type(table).__name__}")
    allowed = (*(name for name in known if name != "config"), *SCRIPT_KEYS)
    table = dict(table)
    values = _of_section(f"--config {path}", table.pop(SECTION, None) or {})
    for key, value in table.items():
        name = str(key).replace("-", "_").strip()
        check_key(f"--config {path}: ", name, allowed)
        if name in values:
            raise ConfigError(f"--config {path} has {name} twice, with dashes and with underscores; keep one")
        values[name] = value
    return ConfigFile(path, values)


def read_ft_file(path: str) -> ConfigFile:
    """The file of `--ft-cfg-path`. Raises ConfigError; also where it has no `fault_tolerance` section."""
    section = find_section(_yaml(path, _text(path, "--ft-cfg-path")))
    if section is None:
        raise ConfigError(f"--ft-cfg-path {path} has no section {SECTION}, at any depth")
    return ConfigFile(path, _of_section(f"--ft-cfg-path {path}", section))


def find_section(table: object) -> dict[str, Any] | None:
    """The first `fault_tolerance` at any depth, as NVIDIA's launcher finds it."""
    if isinstance(table, dict):
        if isinstance(table.get(SECTION), dict):
            return dict(table[SECTION])
        table = list(table.values())
    if isinstance(table, list):
        return next((found for item in table if (found := find_section(item)) is not None), None)
    return None


def _of_section(where: str, section: object) -> dict[str, Any]:
    """By option name, and as one would write it on the command line."""
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: {SECTION} must be a table")
    values: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_").strip()
        check_key(f"{where}: {SECTION}: ", name, tuple(BY_KEY))
        values[BY_KEY[name].option_name] = _as_text(value, f"{where}: {name}")
    return values


def _as_text(value: Any, where: str) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        if any("," in str(key) or isinstance(item, dict | list) for key, item in value.items()):
            raise ConfigError(f"{where} is {value!r}; it takes names without commas, and a number or null for each")
        return ",".join(f"{key}:{_as_text(item, where)}" for key, item in value.items())
    if isinstance(value, list):
        raise ConfigError(f"{where} is {value!r}, a list; it takes one value")
    return str(value)


def _text(path: str, option: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"{option} {path} is larger than {FILE_BYTES_MAX} bytes; is it the right file?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path} is not UTF-8: {error}") from error


def _toml(path: str, text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(text, parse_float=str)  # as it is written: a script's 3e-4 is not 0.0003
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path} is no TOML: {error}") from error


def _yaml(path: str, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Every value is the text that is there: YAML 1.1 takes `1:4` for 64, `no` for false, 2001-01-01 for a date.

        A key that is there twice is an error.
        """

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if not isinstance(key, str | int):
                    raise ConfigError(f"--config {path}: {key!r} is no name of an option")
                if key in keys[:index]:
                    raise ConfigError(f"--config {path} has {key} twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])
    try:
        found = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    return {} if found is None else found
