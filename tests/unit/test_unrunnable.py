"""What a process that can't run a strategy does about it: delays, messages, blocked batches."""

from __future__ import annotations

import logging

import pytest

from batchllm_celery.errors import (
    FailureKind,
    ProviderError,
    StrategyNotFoundError,
    UsageError,
)
from batchllm_celery.models import StrategySpec
from batchllm_celery.strategies.failures import classify
from batchllm_celery.worker.unrunnable import (
    HAND_BACK_SECONDS,
    LAST_TRIES,
    MOST_AFTER_CALLS,
    MOST_HAND_BACKS,
    Faults,
    is_missing,
    is_of_the_process,
    reason_of,
)

SPEC = StrategySpec(name="summarise")
OTHER = StrategySpec(name="summarise", params={"style": "long"})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def faults(clock: Clock) -> Faults:
    return Faults(clock)


def test_the_next_try_comes_after_a_delay_that_doubles_up_to_a_minute(
    faults: Faults, clock: Clock
) -> None:
    """Items that came together are one try."""
    delays = []
    for _ in range(8):
        for index in range(3):
            fault = faults.add(SPEC, "not registered", "b", called=False)
            waited = faults.delay(fault, "b", index)
        delays.append(waited)
        assert faults.waiting(SPEC) is fault
        clock.now = fault.retry_at
        assert faults.waiting(SPEC) is None
    assert delays == [2, 4, 8, 16, 32, 60, 60, 60]


def test_one_item_goes_back_sixteen_times_in_ten_minutes(faults: Faults, clock: Clock) -> None:
    """Whoever requeues it: the sixteenth time it stays away until the ten minutes are over."""
    began = clock.now
    for _ in range(MOST_HAND_BACKS - 1):
        fault = faults.add(SPEC, "not registered", "b", called=False)
        faults.delay(fault, "b", 7)
        clock.now += 1
    fault = faults.add(SPEC, "not registered", "b", called=False)
    assert clock.now + faults.delay(fault, "b", 7) == began + HAND_BACK_SECONDS
    assert faults.delay(fault, "b", 8) <= 60


def test_after_calls_an_item_goes_back_twice(faults: Faults) -> None:
    """They may have been paid for."""
    for _ in range(MOST_AFTER_CALLS):
        assert faults.may_hand_back("b", 1)
        faults.delay(faults.add(SPEC, "MemoryError", "b", called=True), "b", 1)
    assert not faults.may_hand_back("b", 1)
    assert faults.may_hand_back("b", 2)


def test_a_process_that_runs_nothing_takes_one_message_for_each_delay(
    faults: Faults, clock: Clock
) -> None:
    """One whose other strategies run takes what it can."""
    faults.ran(OTHER)
    for _ in range(LAST_TRIES - 1):
        fault = faults.add(SPEC, "not registered", "b", called=False)
    assert faults.messages() is None
    fault = faults.add(SPEC, "not registered", "b", called=False)
    assert faults.messages() == 0
    clock.now = fault.retry_at
    assert faults.messages() == 1
    faults.ran(OTHER)
    assert faults.messages() is None


def test_it_requeues_nothing_of_the_batches_that_it_cannot_run(
    faults: Faults, clock: Clock
) -> None:
    """Until the next try, or until nobody can run them: then it ends them."""
    fault = faults.add(SPEC, "not registered", "b", called=False)
    assert faults.blocks("b")
    assert not faults.blocks("c")
    clock.now = fault.retry_at
    assert not faults.blocks("b")
    fault = faults.add(SPEC, "not registered", "b", called=False)
    fault.hopeless = True
    assert not faults.blocks("b")


def test_one_line_is_logged_and_only_what_shows_more_ends_it(
    faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """A prepared strategy says nothing of a key that its calls were refused for; other parameters
    are another strategy."""
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            faults.add(SPEC, "401", "b", called=True)
    assert len(caplog.records) == 1
    faults.was_prepared(SPEC)
    faults.ran(OTHER)
    assert faults.waiting(SPEC) is not None
    faults.ran(SPEC)
    assert faults.waiting(SPEC) is None
    assert faults.all() == []


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (StrategyNotFoundError("x"), True),
        (_caused(UsageError("needs the extra `openai`"), ModuleNotFoundError("openai")), True),
        (_caused(UsageError("its factory failed"), KeyError("MY_KEY")), True),
        (UsageError("the schema is none"), False),
        (RuntimeError("the model is on holiday"), True),
        (ProviderError("no key", kind=FailureKind.AUTHENTICATION), True),
        (ProviderError("busy", kind=FailureKind.OVERLOADED, status=503), True),
        (ProviderError("no such model", kind=FailureKind.INVALID_REQUEST, status=404), False),
        (ProviderError("pay first", kind=FailureKind.BILLING, status=402), False),
    ],
)
def test_what_is_raised_before_a_call_is_the_process_own(error: Exception, ours: bool) -> None:
    """But for what the provider answered about the job, and for what the job itself says."""
    assert is_of_the_process(classify(error), error) is ours


def test_a_package_or_memory_that_is_missing_is_found_behind_other_errors() -> None:
    """An import that a call makes, for one; a bug of the strategy is none."""
    assert is_missing(_caused(RuntimeError("x"), ImportError("y")))
    assert is_missing(MemoryError())
    assert not is_missing(ValueError("x"))


def test_status_says_it_in_plain_words() -> None:
    """The registry's sentence is long."""
    assert reason_of(StrategyNotFoundError("no strategy ...")) == "not registered"
    assert reason_of(UsageError("x")) == "UsageError: x"
