"""events.jsonl: what a learner said while it ran, one JSON object a line; metrics are in metrics.jsonl."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from aspo.text import printable

_PER_STEP = "aspo_learner.report"  # whose INFO lines repeat what metrics.jsonl holds
_MAX_MESSAGE = 4000


class EventLog(logging.Handler):
    """Appends the log to a file; a disk that does not take it is named by what must be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(level=logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _PER_STEP and record.levelno == logging.INFO:
            return
        event = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "source": record.name,
            "message": printable(record.getMessage(), _MAX_MESSAGE),
        }
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError:
            return
