"""Log lines say which job, group, rank and step they speak of."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from everstep.errors import ConfigError
from everstep.logs import JobLog, JsonFormatter, configure_logging


@pytest.fixture
def stream() -> Iterator[tuple[JobLog, io.StringIO, logging.Handler]]:
    logger = logging.getLogger("everstep.test_logs")
    logger.setLevel(logging.INFO)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger.addHandler(handler)
    yield JobLog(logger, lambda: ("llama", "3", 1, 120)), written, handler
    logger.removeHandler(handler)


def test_a_line_begins_with_job_group_rank_and_step(stream: tuple[JobLog, io.StringIO, logging.Handler]) -> None:
    log, written, _ = stream
    log.info("granted quorum=%s", "1.2")
    assert written.getvalue() == "[llama 3/1 - step 120] granted quorum=1.2\n"


def test_as_json_the_same_are_fields(stream: tuple[JobLog, io.StringIO, logging.Handler]) -> None:
    log, written, handler = stream
    handler.setFormatter(JsonFormatter())
    log.info("granted quorum=%s", "1.2", extra={"everstep": {"event": "granted", "quorum": "1.2"}})
    line = json.loads(written.getvalue())
    assert line.pop("time") > 0
    assert line == {
        "level": "info",
        "logger": "everstep.test_logs",
        "job_id": "llama",
        "replica_id": "3",
        "group_rank": 1,
        "step": 120,
        "event": "granted",
        "quorum": "1.2",
        "message": "granted quorum=1.2",
    }


def test_an_exception_is_part_of_the_json_line() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "failed", None, (type(error), error, None))
    assert json.loads(JsonFormatter().format(record))["exception"] == "ValueError: no"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="use text or json"):
        configure_logging("xml")  # type: ignore[arg-type]
