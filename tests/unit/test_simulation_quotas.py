"""The simulated provider's limits, apart from HTTP."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_celery.simulation.config import SimulationConfig, Window
from batchllm_celery.simulation.quotas import Bucket, FixedWindow, Limits, Meter, SlidingWindow


def admitted(meter: Meter, arrivals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Which of the (time, amount) arrivals the meter lets in."""
    let_in = []
    for now, amount in arrivals:
        if meter.wait(amount, now) == 0:
            meter.charge(amount, now)
            let_in.append((now, amount))
    return let_in


def every(interval: float, seconds: float) -> list[tuple[float, float]]:
    return [(number * interval, 1.0) for number in range(round(seconds / interval))]


arrivals = st.lists(st.tuples(st.floats(0, 2), st.floats(0.1, 10)), min_size=1, max_size=60).map(
    lambda steps: [(sum(gap for gap, _ in steps[: i + 1]), a) for i, (_, a) in enumerate(steps)]
)


def test_a_bucket_lets_its_capacity_in_at_once_and_then_its_rate() -> None:
    """A bucket of one second at 600 a minute takes 10 at once, then 10 a second."""
    bucket = Bucket(600, 1.0, now=0.0)
    assert len(admitted(bucket, [(0.0, 1.0)] * 30)) == 10
    assert len(admitted(bucket, [(5.0 + n / 1000, 1.0) for n in range(5000)])) in (59, 60)


@given(arrivals)
def test_a_bucket_never_exceeds_its_rate_plus_its_capacity(
    arrivals: list[tuple[float, float]],
) -> None:
    """In every stretch of time a bucket grants at most its capacity and what was refilled."""
    let_in = admitted(Bucket(600, 1.0, now=0.0), arrivals)
    for first in range(len(let_in)):
        granted = 0.0
        for now, amount in let_in[first:]:
            granted += amount
            assert granted <= 10 + 10 * (now - let_in[first][0]) + 1e-6


@given(arrivals)
def test_a_sliding_window_never_holds_more_than_its_limit(
    arrivals: list[tuple[float, float]],
) -> None:
    """At every moment the last window's grants are within the limit."""
    let_in = admitted(SlidingWindow(12, 5.0), arrivals)
    for now, _ in let_in:
        assert sum(amount for at, amount in let_in if now - 5.0 + 1e-9 < at <= now) <= 12 + 1e-6


@given(arrivals, st.sampled_from(["bucket", "fixed", "sliding"]))
def test_a_refused_amount_fits_exactly_when_the_hint_says(
    arrivals: list[tuple[float, float]], kind: str
) -> None:
    """Coming back after the hinted wait succeeds, coming back a little earlier does not."""
    meters: dict[str, Meter] = {
        "bucket": Bucket(600, 1.0, now=0.0),
        "fixed": FixedWindow(12, 5.0, now=0.0),
        "sliding": SlidingWindow(12, 5.0),
    }
    meter = meters[kind]
    admitted(meter, arrivals)
    now = arrivals[-1][0]
    wait = meter.wait(8.0, now)
    if wait > 1e-3:
        assert meter.wait(8.0, now + wait * 0.99) > 0
        assert meter.wait(8.0, now + wait + 1e-6) == 0


def test_a_fixed_window_forgets_everything_at_its_end() -> None:
    """A fixed minute takes its whole limit at once and again when the next minute starts."""
    window = FixedWindow(60, 60.0, now=0.0)
    let_in = [now for now, _ in admitted(window, every(0.1, 130))]
    assert [sum(n * 60 <= now < (n + 1) * 60 for now in let_in) for n in range(3)] == [60, 60, 60]
    assert max(let_in[:60]) < 6


@pytest.mark.parametrize("kind", list(Window))
def test_more_than_a_whole_limit_is_let_in_alone(kind: Window) -> None:
    """An amount larger than the limit passes when nothing else is charged, and then blocks."""
    limits = Limits(SimulationConfig(tpm=600, window=kind), now=0.0)
    assert limits.admit(1000, 0, now=0.0) is None
    refusal = limits.admit(1, 0, now=0.1)
    assert refusal is not None
    assert refusal.limit_name == "tpm"


def test_a_call_is_charged_to_all_limits_or_to_none() -> None:
    """A call that the token limit refuses leaves the request limit as it was."""
    limits = Limits(SimulationConfig(rpm=120, tpm=6000), now=0.0)
    assert limits.admit(90, 10, now=0.0) is None
    for _ in range(10):
        refusal = limits.admit(90, 10, now=0.0)
        assert refusal is not None
        assert refusal.limit_name == "tpm"
        assert refusal.retry_after == pytest.approx(1.0)
    assert limits.admit(0, 0, now=0.0) is None
    refused = limits.admit(0, 0, now=0.0)
    assert refused is not None
    assert refused.limit_name == "rpm"


def test_input_and_output_tokens_are_limited_apart() -> None:
    """Each token limit counts its own kind of tokens."""
    limits = Limits(SimulationConfig(input_tpm=6000, output_tpm=600), now=0.0)
    assert limits.admit(50, 10, now=0.0) is None
    refusal = limits.admit(50, 1, now=0.0)
    assert refusal is not None
    assert refusal.limit_name == "output_tpm"


def test_the_day_s_limit_holds_until_the_day_s_end() -> None:
    """Requests per day are counted from the start, and the hint reaches to the day's end."""
    limits = Limits(SimulationConfig(rpd=3, day_seconds=1000), now=0.0)
    assert [limits.admit(1, 1, now=10.0) for _ in range(3)] == [None] * 3
    refusal = limits.admit(1, 1, now=10.0)
    assert refusal is not None
    assert (refusal.limit_name, refusal.retry_after) == ("rpd", 990.0)
    assert limits.admit(1, 1, now=1000.0) is None


def test_a_changed_limit_keeps_what_was_charged() -> None:
    """Halving a limit in mid-run halves the rate at once and gives no fresh bucket."""
    config = SimulationConfig(rpm=1200)
    limits = Limits(config, now=0.0)
    assert sum(limits.admit(1, 1, now=0.0) is None for _ in range(30)) == 20
    limits.reconfigure(config.changed(rpm=600), now=0.0)
    assert limits.admit(1, 1, now=0.0) is not None
    assert sum(limits.admit(1, 1, now=n / 100) is None for n in range(1, 201)) in (19, 20)
    limits.reconfigure(config.changed(rpm=None), now=2.0)
    assert limits.admit(1, 1, now=2.0) is None


def test_the_hint_shrinks_as_time_goes_by() -> None:
    """A refused call that asks again later is told a shorter wait."""
    limits = Limits(SimulationConfig(rpm=6, window=Window.SLIDING), now=0.0)
    for _ in range(6):
        limits.admit(1, 1, now=0.0)
    waits = []
    for now in (1.0, 20.0, 59.0):
        refusal = limits.admit(1, 1, now=now)
        assert refusal is not None
        waits.append(refusal.retry_after)
    assert waits == pytest.approx([59.0, 40.0, 1.0])
    assert all(later < earlier for earlier, later in pairwise(waits))
