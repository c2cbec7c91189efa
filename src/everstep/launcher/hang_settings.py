"""Makes MonitorSettings of what was said about hangs: on the command line, in a `fault_tolerance` section."""

import logging
import math
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from everstep.core.hang import HangPolicy
from everstep.core.limits import HEARTBEAT, OUTSIDE, LimitPolicy
from everstep.errors import ConfigError
from everstep.launcher.hang_options import BY_KEY, FT_KEYS, Form, FtKey
from everstep.launcher.option import Fate
from everstep.launcher.values import Values
from everstep.monitor.settings import MonitorSettings

NO_LIMIT = ("null", "none", "")
LEVELS = {"dbg": "DEBUG", "warn": "WARNING", "fatal": "CRITICAL"}
NEVER_SENT = (signal.SIGSTOP, signal.SIGCONT)

_log = logging.getLogger("everstep.launcher")


def monitor_settings(values: Values) -> MonitorSettings:
    """Raises ConfigError for a value that its key cannot have, and for what is refused."""
    said = {key: text for key in FT_KEYS if (text := _said(values, key)) is not None}
    for key, text in said.items():
        if key.fate is Fate.REFUSED and text.strip().lower() not in key.accepts:
            raise ConfigError(f"{_named(values, key)}={text} is not supported: {key.note.replace('`', '')}")
    found = {key.name: _parsed(key, text, _named(values, key)) for key, text in said.items()}
    given: dict[str, float | None] = dict(found.get("rank_section_timeouts", {}))
    for name, where in {"rank_heartbeat_timeout": HEARTBEAT, "rank_out_of_section_timeout": OUTSIDE}.items():
        if name in found:
            given[where] = found[name]

    def value(name: str) -> Any:
        key = BY_KEY[name]
        return found[name] if name in found else _parsed(key, key.default, name)

    limits = LimitPolicy(
        given=given,
        learns=value("timeouts") == "auto",
        safety_factor=value("safety_factor"),
        floor_s=value("learned_timeout_floor"),
        mixed_floor_s=value("learned_mixed_timeout_floor"),
    )
    return MonitorSettings(
        hang=HangPolicy(
            initial_s=value("initial_rank_heartbeat_timeout"),
            limits=limits,
            stopped_s=value("stopped_timeout"),
            uninterruptible_s=value("uninterruptible_timeout"),
            soft_share=value("suspect_share"),
        ),
        termination_signal=value("rank_termination_signal"),
        kill_after_s=value("kill_after"),
        log_level=value("log_level"),
    )


def max_no_progress_cycles(values: Values) -> int:
    key = BY_KEY["max_no_progress_cycles"]
    text = _said(values, key)
    return int(_parsed(key, key.default if text is None else text, _named(values, key)))


def explain_without_effect(values: Values) -> Iterator[str]:
    """One line for each setting that was given and changes nothing."""
    for key in FT_KEYS:
        if key.fate is Fate.WITHOUT_EFFECT and _said(values, key) is not None:
            yield f"{_named(values, key)} has no effect here: {key.note}"


def say_without_effect(values: Values) -> None:
    for line in explain_without_effect(values):
        _log.warning("%s", line)


def _said(values: Values, key: FtKey) -> str | None:
    value = values.options[key.option_name].value
    return value if isinstance(value, str) else None


def _named(values: Values, key: FtKey) -> str:
    return values.named(key.option_name)


def _parsed(key: FtKey, text: str, name: str) -> Any:
    text = text.strip()
    match key.form:
        case Form.LIMIT:
            return None if text.lower() in NO_LIMIT else _positive(text, name, "a number of seconds, or null")
        case Form.SECONDS:
            return _positive(text, name, "a number of seconds")
        case Form.NUMBER:
            return _number(key, text, name)
        case Form.COUNT:
            if not (text.isascii() and text.isdigit() and len(text) <= 9):
                raise ConfigError(f"{name}={text!r} must be a whole number")
            return int(text)
        case Form.SECTIONS:
            return _sections(text, name)
        case Form.SIGNAL:
            return _signal(text, name)
        case Form.LEVEL:
            return _level(text, name)
        case Form.MODE:
            if text not in ("auto", "given"):
                raise ConfigError(f"{name}={text!r} must be auto or given")
            return text
        case Form.TEXT:
            return text


def _positive(text: str, name: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name}={text!r} must be {what}")
    return number


def _number(key: FtKey, text: str, name: str) -> float:
    number = _positive(text, name, "a number")
    if key.name == "suspect_share" and number > 1:
        raise ConfigError(f"{name}={text} must be at most 1: it is a share of a limit")
    if key.name == "safety_factor" and number < 1:
        raise ConfigError(f"{name}={text} must be at least 1, or every usual interval is a hang")
    return number


def _sections(text: str, name: str) -> Mapping[str, float | None]:
    found: dict[str, float | None] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        section, colon, limit = (part.strip() for part in pair.rpartition(":"))
        if not colon or not section or section in found:
            raise ConfigError(f"{name}: {pair!r} is no new NAME:SECONDS")
        found[section] = (
            None if limit.lower() in NO_LIMIT else _positive(limit, f"{name}: {section}", "seconds or null")
        )
    return found


def _signal(text: str, name: str) -> int:
    upper = text.upper()
    try:
        number = signal.Signals(int(text)) if text.isdecimal() else signal.Signals[upper]
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={text!r} is no signal; give a name such as SIGTERM, or its number") from None
    if number in NEVER_SENT:
        raise ConfigError(f"{name}={text} does not end a process")
    return int(number)


def _level(text: str, name: str) -> int:
    if text.isdecimal() and logging.DEBUG <= int(text) <= logging.CRITICAL:
        return int(text)
    level = logging.getLevelName(LEVELS.get(text.lower(), text.upper()))
    if not isinstance(level, int):
        raise ConfigError(f"{name}={text!r} must be debug, info, warning, error or critical")
    return level
