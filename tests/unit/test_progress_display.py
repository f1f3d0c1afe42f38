"""What a person sees while a batch runs, and when it has ended."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from batchllm_celery.cli.display.progress import (
    Display,
    LiveDisplay,
    PlainDisplay,
    RateMeter,
    View,
    headline,
    open_display,
    time_left,
)
from batchllm_celery.cli.display.quota_view import doing, quota_words
from batchllm_celery.cli.display.summary import Failures, Summary, exit_code, print_summary
from batchllm_celery.cli.display.wording import duration, money, rate, short
from batchllm_celery.limiter import QuotaState
from batchllm_celery.models import BatchProgress, BatchState, QuotaLimits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def progress(**changes: Any) -> BatchProgress:
    values = {
        "batch_id": "b",
        "state": BatchState.RUNNING,
        "total": 1000,
        "succeeded": 400,
        "failed": 2,
    }
    return BatchProgress.model_validate(values | changes)


def console(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, **options), stream


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    """An early burst is forgotten."""
    clock = Clock()
    meter = RateMeter(clock)
    assert meter.update(0) == 0.0
    clock.now += 10
    assert meter.update(1000) == 100.0
    for _ in range(4):
        clock.now += 10
        speed = meter.update(1000)
    assert speed == 0.0


def test_without_a_terminal_a_line_comes_every_few_seconds() -> None:
    """A log gets the count, rate, time left, tokens, cost and what it waits for."""
    clock = Clock()
    screen, stream = console()
    display = PlainDisplay(screen, interval=5, clock=clock)
    view = View(
        progress(input_tokens=1_200_000, cost=0.25), 1000, 10.0, doing="at the quota's speed"
    )
    for _ in range(12):
        display.update(view)
        clock.now += 1
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    for words in (
        "402/1,000",
        "10.0/s",
        "1 min 00 s left",
        "1.2M tokens",
        "$0.25",
        "quota's speed",
    ):
        assert words in lines[0]


def test_on_a_terminal_a_bar_redraws_itself_and_leaves_nothing() -> None:
    """The live display shows the same words, and what is said stays above it."""
    screen, stream = console(force_terminal=True)
    display = LiveDisplay(screen)
    display.update(View(progress(), 1000, 10.0, doing="cooling down for 12 s"))
    display.say("a word [in brackets]")
    display.close()
    assert "402/1,000" in stream.getvalue()
    assert "cooling down for 12 s" in stream.getvalue()
    assert "a word [in brackets]" in stream.getvalue()


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        (3, ""),
        (16, "40 s to 2 min 00 s left"),
        (100, "50 s to 1 min 15 s left"),
        (900, "1 min 00 s left"),
    ],
)
def test_the_time_left_says_how_sure_it_is(counted: int, words: str) -> None:
    """Of few answers nobody knows a rate; then it is a range, at last a figure."""
    assert time_left(View(progress(), 1000, 598 / 60, counted=counted)) == words


def test_a_total_that_is_estimated_says_so() -> None:
    """While rows are read the total is a guess."""
    assert headline(View(progress(), 1000, 10.0, estimated=True)).startswith("402/about 1,000")


def test_quiet_shows_nothing() -> None:
    """--quiet has no display, wherever it runs."""
    screen, stream = console(force_terminal=True)
    display = open_display(screen, quiet=True)
    assert type(display) is Display
    display.say("x")
    display.update(View(progress()))
    display.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"waiting": 2, "limits": QuotaLimits(requests_per_minute=6)}, "at the quota's speed"),
        ({"waiting": 2}, "finding the provider's rate"),
        ({"waiting": 2, "rate_factor": 0.7}, "at 70% of the quota"),
        ({"cooldown_remaining": 12.0, "consecutive": 1}, "cooling down for 12 s after a refusal"),
        ({"cooldown_remaining": 13.0}, "waiting 13 s: Redis was started after the last calls"),
        ({"probing": True}, "one call at a time"),
        ({"ramp_position": 3}, "starting slowly"),
        ({"exhausted_until": 4600.0}, "the day's quota is used up, 1 h 00 min"),
    ],
)
def test_what_a_quota_makes_everybody_wait_for_is_said(changes: dict[str, Any], words: str) -> None:
    """Each state of the limiter has its words."""
    said = quota_words(QuotaState(name="q", **changes), now=1000.0)
    assert words in said
    assert bool(words) == bool(said)


def test_a_parked_batch_says_until_when() -> None:
    """The state of the batch comes before that of its quota."""
    parked = progress(state=BatchState.PARKED, parked_until=1120.0)
    assert doing(parked, QuotaState(name="q", waiting=1), 1000.0).startswith(
        "parked for 2 min 00 s"
    )


def test_a_stopped_batch_says_whether_anything_is_left() -> None:
    """Its last items get their outcomes in the background."""
    some = {"state": BatchState.CANCELLED, "total": 2, "succeeded": 1}
    assert doing(progress(**some, failed=0), None, 1000.0) == "cancelled: ending what is left"
    assert doing(progress(**some, failed=1), None, 1000.0) == "cancelled"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"succeeded": 1000, "failed": 0}, 0),
        ({"succeeded": 998, "failed": 2}, 1),
        ({"succeeded": 998, "failed": 2, "state": BatchState.CANCELLED}, 3),
        ({"succeeded": 10, "failed": 990, "state": BatchState.BUDGET}, 3),
        ({"succeeded": 10, "failed": 0}, 3),
    ],
)
def test_the_exit_code_says_how_it_ended(changes: dict[str, Any], code: int) -> None:
    """0 all succeeded, 1 some failed, 3 stopped before the end."""
    assert exit_code(progress(**changes)) == code


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "batch_id": "b", "state": "finished", "exit_code": 1, "total": 1000, "succeeded": 998,
        "failed": 2, "answered_now": 1000, "errors": {"timeout": 2}, "input_tokens": 1000,
        "output_tokens": 500, "cached_input_tokens": 100, "cost": 0.0123, "maybe_billed": 0,
        "seconds": 100.0, "output": "out.jsonl",
    }  # fmt: skip
    return Summary(**(values | changes))


def test_the_summary_says_what_came_of_it_and_what_it_took() -> None:
    """Counts, kinds of failure with an example, tokens, cost, time and the file."""
    screen, stream = console()
    print_summary(screen, summary(), {"timeout": "item-7: Timeout: after 1 s"})
    text = stream.getvalue()
    for words in (
        "998 of 1,000 succeeded, 2 failed", "2 timeout  e.g. item-7: Timeout: after 1 s",
        "1,000 in (100 cached), 500 out", "$0.0123", "1 min 40 s  (10.0/s)", "out.jsonl",
    ):  # fmt: skip
        assert words in text
    assert "resume" not in text


def test_an_interrupted_run_shows_the_command_that_resumes() -> None:
    """The command can be copied: it is on one line, however long."""
    command = "batchllm run " + "x" * 200 + " --batch-id b"
    screen, stream = console()
    print_summary(screen, summary(exit_code=130, resume=command), {})
    assert stream.getvalue().startswith("Interrupted")
    assert command in stream.getvalue()


def test_failures_are_counted_by_kind_with_one_example() -> None:
    """The first message of each kind is kept."""
    failures = Failures()
    for number in range(3):
        error = {"kind": "timeout", "message": f"m{number}"}
        failures.note([{"item_id": str(number), "success": False, "error": error}])
    failures.note([{"item_id": "9", "success": True, "error": None}])
    assert failures.counts == {"timeout": 3}
    assert failures.examples == {"timeout": "0: m0"}


def test_numbers_read_like_prose() -> None:
    """Durations, money, rates and large numbers."""
    assert [duration(s) for s in (0.84, 9.96, 42, 185, 7800, 273_600)] == [
        "0.8 s", "10 s", "42 s", "3 min 05 s", "2 h 10 min", "3 d 4 h",
    ]  # fmt: skip
    assert [money(m) for m in (None, 0, 0.0000001, 0.0034, 3.4, 1234.5)] == [
        "price unknown", "$0.0000", "< $0.0001", "$0.0034", "$3.40", "$1,234.50",
    ]  # fmt: skip
    assert [rate(r) for r in (0.5, 12.34)] == ["30/min", "12.3/s"]
    assert [short(n) for n in (999, 9999, 12_340, 1_200_000)] == ["999", "9,999", "12.3k", "1.2M"]
