# SPDX-License-Identifier: Apache-2.0
"""Logs as one JSON object per line."""

from __future__ import annotations

import json
import logging

__all__ = ["JSONLines", "log_to_stderr"]


class JSONLines(logging.Formatter):
    """A record as JSON: time, level, event, and the entries of its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Write the logs of this package and uvicorn to stderr, from level INFO up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines())
    for name in ("msdda_fast", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
