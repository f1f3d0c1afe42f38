"""Standard output is for what was asked for; everything else goes to standard error."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from rich.console import Console
from rich.logging import RichHandler


def to_stderr() -> Console:
    """Progress, summaries beside data, words of warning."""
    return Console(stderr=True)


def to_stdout() -> Console:
    """What was asked for, for a person."""
    return Console()


def print_json(value: Any) -> None:
    """One object, one line, on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def log_to(console: Console, *, verbose: bool) -> None:
    """Warnings (or, with `-v`, everything of ours) between the lines of the display."""
    handler = RichHandler(console=console, show_path=False, markup=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    if verbose:
        logging.getLogger("batchllm_celery").setLevel(logging.DEBUG)
