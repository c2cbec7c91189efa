"""Reads the file of `--config`: YAML or TOML, one flat table of option names, with dashes or underscores."""

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError
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
    try:
        with Path(path).open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"--config {path} is larger than {FILE_BYTES_MAX} bytes; is it the right file?")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8: {error}") from error
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ConfigError(f"--config {path}: its name must end in .yaml, .yml or .toml, to say which it is")
    table = _toml(path, text) if suffix == ".toml" else _yaml(path, text)
    if not isinstance(table, dict):
        raise ConfigError(f"--config {path} must be a table of options (`nnodes: 2`), not a {type(table).__name__}")
    allowed = (*(name for name in known if name != "config"), *SCRIPT_KEYS)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = str(key).replace("-", "_").strip()
        check_key(f"--config {path}: ", name, allowed)
        if name in values:
            raise ConfigError(f"--config {path} has {name} twice, with dashes and with underscores; keep one")
        values[name] = value
    return ConfigFile(path, values)


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
