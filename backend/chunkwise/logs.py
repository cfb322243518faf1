"""Log lines on standard output: plain text, or the JSON objects that TGI's launcher reads from its children (the shape
of loguru's ``serialize=True``). One write per line."""

from __future__ import annotations

import json
import logging
import sys

from chunkwise.config.settings import LogSettings

# TGI's launcher also names TRACE, SUCCESS, WARN and OFF; logging has no such levels.
_LEVELS = {"TRACE": "DEBUG", "SUCCESS": "INFO", "WARN": "WARNING", "OFF": "CRITICAL"}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return json.dumps({"text": text, "record": {"level": {"name": record.levelname}, "name": record.name}})


def configure_logging(settings: LogSettings, process: str) -> None:
    """Sends this process's log to standard output. ``process`` names it in plain lines."""
    handler = logging.StreamHandler(sys.stdout)
    if settings.json_output:
        handler.setFormatter(_JsonFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {process}: %(message)s"))
    level = _LEVELS.get(settings.level, settings.level)
    logging.basicConfig(level=level, handlers=[handler], force=True)
