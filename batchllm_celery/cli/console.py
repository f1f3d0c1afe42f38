"""Standard output is for what was asked for; everything else goes to standard error."""

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
    """Lets no control character of a text reach the terminal; rich's own are no text."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def say(message: str, *, err: bool = True) -> None:
    """A line in plain words, on standard error unless it was asked for."""
    click.echo(printable(without_secrets(message)), err=err)


def to_stderr() -> Console:
    """Progress, summaries beside data, words of warning."""
    return _SafeConsole(stderr=True)


def to_stdout() -> Console:
    """What was asked for, for a person."""
    return _SafeConsole()


def print_json(value: Any) -> None:
    """One object, one line, on standard output."""
    utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    sys.stdout.write(printable_json(json.dumps(value, ensure_ascii=not utf8)) + "\n")
    sys.stdout.flush()


def log_to(console: Console, *, verbose: bool) -> None:
    """Warnings (or, with `-v`, everything of ours) between the lines of the display."""
    handler = RichHandler(console=console, show_path=False, markup=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    if verbose:
        logging.getLogger("batchllm_celery").setLevel(logging.DEBUG)
