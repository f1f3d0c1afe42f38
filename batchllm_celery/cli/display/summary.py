"""The summary of a run: for a person, or as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from batchllm_celery.cli import exit_codes
from batchllm_celery.cli.display.wording import count, duration, money, plural, rate
from batchllm_celery.models import BatchProgress, BatchState


@dataclass(slots=True)
class Failures:
    """The number of failures by kind, and one message of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, lines: Iterable[dict[str, Any]]) -> None:
        """Count the failures among result lines."""
        for line in lines:
            if line["success"]:
                continue
            kind = line["error"]["kind"]
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self.examples.setdefault(kind, f"{line['item_id']}: {line['error']['message']}")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. Durations are in seconds, costs in US dollars (None: no price is known)."""

    batch_id: str
    state: str
    exit_code: int
    total: int | None
    succeeded: int
    failed: int
    answered_now: int
    """Outcomes of this run; the others are from earlier runs of the batch."""
    errors: dict[str, int]
    input_tokens: int
    output_tokens: int
    cached_input_tokens: int
    cost: float | None
    maybe_billed: int
    seconds: float
    output: str | None
    resume: str | None = None
    """The command that resumes an interrupted batch."""
    resume_needs: str | None = None
    """Options that must change in that command, or it stops again at once."""
    retry: str | None = None
    """The command that runs failed rows again."""
    logs: str | None = None
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def exit_code(progress: BatchProgress) -> int:
    """The exit code for the state of a batch."""
    if progress.state.stopped or not progress.is_over:
        return exit_codes.STOPPED
    return exit_codes.SOME_FAILED if progress.failed else exit_codes.OK


_ENDS = {
    BatchState.CANCELLED: "Cancelled",
    BatchState.DEADLINE: "Stopped: the deadline has passed",
    BatchState.BUDGET: "Stopped: the budget is spent",
    BatchState.ABORTED: "Stopped: the failure would repeat for every item",
}


def _title(summary: Summary) -> tuple[str, str]:
    if summary.exit_code == exit_codes.INTERRUPTED:
        return "Interrupted", "yellow"
    if summary.state in _ENDS:
        return _ENDS[BatchState(summary.state)], "yellow"
    if summary.exit_code == exit_codes.STOPPED:
        return "Stopped", "yellow"
    if summary.failed:
        return "Done, with failures", "yellow"
    return "Done", "green"


def print_summary(console: Console, summary: Summary, examples: dict[str, str]) -> None:
    """Print the outcome, the time and cost, the files, and how to go on."""
    title, colour = _title(summary)
    if summary.dry_run:
        title = "Dry run" if title == "Done" else f"Dry run: {title.lower()}"
    text = Text()
    text.append(title, style=f"bold {colour}")
    text.append(f"  {_outcome(summary)}\n")
    for name, value in _rows(summary):
        text.append(f"  {name:<9}", style="dim").append(f"{value}\n")
    for kind, number in sorted(summary.errors.items(), key=lambda pair: -pair[1]):
        text.append(f"  {'failed':<9}", style="dim").append(f"{count(number)} {kind}", style="red")
        text.append(f"  e.g. {examples[kind][:200]}\n" if kind in examples else "\n", style="dim")
    if summary.retry and not summary.resume:
        text.append(f"  {'again':<9}", style="dim").append(f"{summary.retry}\n", style="bold")
    if summary.resume_needs:
        text.append(f"  {'to resume':<9}", style="dim")
        text.append(f" give {summary.resume_needs}, or it stops again at once:\n")
    if summary.resume:
        text.append(f"  {'resume':<9}", style="dim").append(f"{summary.resume}\n", style="bold")
    console.print(text, end="", soft_wrap=True, highlight=False)


def _outcome(summary: Summary) -> str:
    of = "" if summary.total is None else f" of {count(summary.total)}"
    done = "would be called (no provider was)" if summary.dry_run else "succeeded"
    words = f"{count(summary.succeeded)}{of} {done}"
    if summary.failed:
        words += f", {count(summary.failed)} failed"
    if summary.total and not summary.answered_now and summary.succeeded + summary.failed:
        words += "; all were answered earlier, nothing was called"
    return words


def _rows(summary: Summary) -> list[tuple[str, str]]:
    rows = [("batch", summary.batch_id), ("time", _time(summary))]
    if summary.input_tokens or summary.output_tokens:
        rows.append(("tokens", _tokens(summary)))
        rows.append(("cost", money(summary.cost)))
    if summary.maybe_billed:
        rows.append(
            ("repeated", f"{plural(summary.maybe_billed, 'call')} may have been billed twice")
        )
    if summary.output:
        rows.append(("results", summary.output))
    if summary.logs:
        rows.append(("logs", summary.logs))
    return rows


def _time(summary: Summary) -> str:
    text = duration(summary.seconds)
    if summary.answered_now and summary.seconds > 0:
        text += f"  ({rate(summary.answered_now / summary.seconds)})"
    return text


def _tokens(summary: Summary) -> str:
    cached = (
        f" ({count(summary.cached_input_tokens)} cached)" if summary.cached_input_tokens else ""
    )
    return f"{count(summary.input_tokens)} in{cached}, {count(summary.output_tokens)} out"
