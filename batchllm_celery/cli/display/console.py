"""The consoles: results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment

from batchllm_celery.redaction import printable, printable_json, without_secrets


class _SafeConsole(Console):
    """Escapes control characters of texts. Those that rich itself writes are kept."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def say(message: str) -> None:
    """Print a line on standard error, without secrets and control characters."""
    click.echo(printable(without_secrets(message)), err=True)


def to_stderr() -> Console:
    """A console for progress, warnings, and summaries beside data."""
    return _SafeConsole(stderr=True)


def to_stdout() -> Console:
    """A console for what a person asked for."""
    return _SafeConsole()


def print_json(value: Any) -> None:
    """Print an object as one line of JSON on standard output."""
    utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    sys.stdout.write(printable_json(json.dumps(value, ensure_ascii=not utf8)) + "\n")
    sys.stdout.flush()


def log_to(console: Console, *, verbose: bool) -> None:
    """Log warnings (with `-v` every message of this package) above the display."""
    handler = RichHandler(console=console, show_path=False, markup=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    if verbose:
        logging.getLogger("batchllm_celery").setLevel(logging.DEBUG)
