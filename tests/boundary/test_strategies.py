"""Whatever user code returns, raises or does, its item ends once, within the bound of calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchllm_celery import FailureKind, LLMCallStrategy, strategy
from batchllm_celery.models import WorkItemResult
from tests.boundary import strategy_cases as made
from tests.boundary.harness import (
    CONFIG,
    SEED,
    Bench,
    Violation,
    all_logs,
    check_logs,
    check_texts,
    chosen,
    count,
    most_calls,
    one_outcome_each,
    replay,
    require,
)

CHUNK = 250
# A strategy that forgets an `await` is one of the cases.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@strategy("boundary", quota="wide")
def boundary() -> LLMCallStrategy[Any]:
    return made.Boundary()


@strategy("boundary-good", quota="wide")
def good() -> LLMCallStrategy[Any]:
    return made.Good()


@pytest.fixture
def bench(redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("OPENAI_API_KEY", made.KEY)
    with Bench(redis_url, namespace) as opened:
        yield opened


def _run(bench: Bench, numbers: list[int]) -> None:
    numbers = chosen("strategies", numbers)
    if not numbers:
        return
    made.cases.clear()
    made.cases.update({number: made.case(number, SEED) for number in numbers})
    rows: list[dict[str, Any]] = [
        {"item_id": f"c{n}", "prompt": f"{n} {made.PROMPT}", "context": {"n": n}} for n in numbers
    ]
    with all_logs() as logged:
        results = one_outcome_each(bench.run(rows, "boundary"), [row["item_id"] for row in rows])
        [good] = bench.run([{"item_id": "good", "prompt": "good"}], "boundary-good")
    if not good.success:
        raise Violation(f"the process does not answer a good item any more: {good.error}")
    check_logs(logged, [made.KEY, made.PROMPT])
    wrong = []
    for number in numbers:
        try:
            _check(made.cases[number], results[f"c{number}"])
        except Violation as problem:
            steps = [step.name for step in made.cases[number].taken]
            wrong.append(f"{replay('strategies', number)}\n  {steps}\n  {problem}")
    assert not wrong, f"{len(wrong)} violations:\n" + "\n".join(wrong[:20])


def _check(case: made.Case, result: WorkItemResult[Any, Any]) -> None:
    check_texts(result, [made.KEY])
    taken = case.taken
    require(case.calls <= most_calls(), f"{case.calls} calls")
    require(not any(step.last for step in taken[:-1]), "it is called again after its answer")
    require(result.attempts <= CONFIG.retry.max_attempts, f"{result.attempts} attempts")
    require(result.context == {"n": case.number}, f"its context is {result.context!r}")
    last = taken[-1]
    if last.success is not None and result.error_kind is not FailureKind.EXHAUSTED:
        require(result.success is last.success, f"success {result.success}: {result.error}")
    if result.success and last.output is not ...:
        require(result.output == last.output, f"output {result.output!r}, given {last.output!r}")
    total = result.token_usage.total_tokens
    known = sum(step.tokens for step in taken if step.tokens is not None)
    open_ = sum(step.tokens is None for step in taken)
    most = known + 30_000_000 * open_
    require(known <= total <= most, f"{total} tokens, of {known} to {most}: {result.error}")


def test_each_item_ends_once_within_the_bound(bench: Bench) -> None:
    """The short form: the same cases each time."""
    _run(bench, list(range(300)))


@pytest.mark.boundary
@pytest.mark.parametrize("first", range(0, count(2500), CHUNK))
def test_each_item_ends_once_within_the_bound_long(bench: Bench, first: int) -> None:
    _run(bench, list(range(1000 + first, 1000 + first + CHUNK)))
