"""How Everstep's log lines look: which job, group and step they speak of, as text or as one JSON object a line.

The library logs to the loggers `everstep`, `everstep.link` and `everstep.lighthouse` and configures none of them;
`configure_logging` does, for scripts that have no set-up of their own.
"""

import json
import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

from everstep.errors import ConfigError

LogFormat = Literal["text", "json"]
TEXT = "%(asctime)s %(levelname)s %(message)s"


class JobLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic only in the stubs before Python 3.11
    """Puts `[job group/rank - step n]` before every line, and the same into the record for JSON."""

    def __init__(self, logger: logging.Logger, where: Callable[[], tuple[str, str, int, int]]) -> None:
        super().__init__(logger, {})
        self._where = where

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        job_id, group, rank, step = self._where()
        about = {"job_id": job_id, "replica_id": group, "group_rank": rank, "step": step}
        given = kwargs.get("extra") or {}
        kwargs["extra"] = {"everstep": about | given.get("everstep", {}), "everstep_text": str(msg)}
        return f"[{job_id} {group}/{rank} - step {step}] {msg}", kwargs


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix), level, logger, message, and what the record says of itself."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line |= getattr(record, "everstep", {})
        text = getattr(record, "everstep_text", None)
        line["message"] = record.getMessage() if text is None else text % record.args if record.args else text
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(log_format: LogFormat = "text", level: int | str = logging.INFO) -> None:
    """Show Everstep's lines on stderr. Calling it again replaces what it set; other loggers stay as they are."""
    if log_format not in ("text", "json"):
        raise ConfigError(f"log format {log_format!r} is unknown; use text or json")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT))
    handler.set_name("everstep")
    logger = logging.getLogger("everstep")
    for old in [h for h in logger.handlers if h.get_name() == "everstep"]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
