"""Strategies that need no provider: any async function, escalation, model strings."""

from __future__ import annotations

from typing import Any

import pytest

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import Completion, RetryState, StrategySpec, TokenUsage
from batchllm_celery.strategies import (
    CallableStrategy,
    EscalatingStrategy,
    LLMCallStrategy,
    as_completion,
    catalog,
    classify_for,
)
from batchllm_celery.strategies.failures import priced_as

TOKENS = {"input_tokens": 10, "output_tokens": 5}


@pytest.mark.parametrize(
    ("answer", "output", "total"),
    [
        ("text", "text", 0),
        (("text", TOKENS), "text", 15),
        (("text", TokenUsage(input_tokens=3)), "text", 3),
        (("text", None), "text", 0),
        (Completion("text", TokenUsage(input_tokens=2)), "text", 2),
        (("a", "b"), ("a", "b"), 0),
        ({"input_tokens": 1}, {"input_tokens": 1}, 0),
    ],
)
async def test_any_async_function_is_a_strategy(answer: Any, output: Any, total: int) -> None:
    """It may answer bare, with its tokens, or with a Completion."""

    async def ask(prompt: str) -> Any:
        assert prompt == "Hello"
        return answer

    completion = await CallableStrategy(ask, model_name="x:y").execute("Hello", 1, 9)
    assert (completion.output, completion.usage.total_tokens) == (output, total)


def test_an_answer_of_another_shape_is_refused() -> None:
    """The message names both shapes that will do."""
    with pytest.raises(TypeError, match=r"\(output, usage\) or a Completion, not str"):
        as_completion("text")


async def test_the_default_dry_run_calls_nobody() -> None:
    """It shows the first 50 characters of the prompt."""

    async def never(prompt: str) -> str:
        raise AssertionError

    completion = as_completion(await CallableStrategy(never).dry_run("p" * 60))
    assert completion.output == f"[DRY-RUN] Mock output for prompt: {'p' * 50}..."
    assert completion.usage == TokenUsage(input_tokens=100, output_tokens=50, total_tokens=150)


class Level(LLMCallStrategy[str]):
    """Answers or raises what it is told to."""

    def __init__(self, name: str, outcome: Any) -> None:
        self.model_name = f"fake:{name}"
        self.outcome = outcome
        self.calls: list[str] = []
        self.prepared = self.closed = self.cleaned = 0

    async def prepare(self) -> None:
        self.prepared += 1

    async def close(self) -> None:
        self.closed += 1

    async def cleanup(self) -> None:
        self.cleaned += 1

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        self.calls.append(prompt)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome, TOKENS


async def attempts(strategy: LLMCallStrategy[Any], most: int = 3) -> tuple[Any, list[FailureKind]]:
    """What the runner does, as far as it matters here."""
    state = RetryState()
    kinds: list[FailureKind] = []
    for attempt in range(1, most + 1):
        try:
            return as_completion(await strategy.execute("q", attempt, 9, state)), kinds
        except Exception as error:
            failure = classify_for(strategy, error)
            kinds.append(failure.kind)
            await strategy.on_error(error, attempt, state)
    return None, kinds


@pytest.mark.parametrize("kind", ["validation", "truncated", "content_blocked"])
async def test_a_better_model_gets_what_the_cheaper_one_can_t_do(kind: str) -> None:
    """The next attempt goes one level up, and a kind that is otherwise final is retried."""
    weak = Level("weak", ProviderError("no use", kind=FailureKind(kind), usage=TOKENS))
    strong = Level("strong", "answer")
    strategy = EscalatingStrategy([weak, strong])
    completion, kinds = await attempts(strategy)
    assert completion.output == "answer"
    assert completion.metadata == {"model": "fake:strong"}
    assert kinds == [FailureKind.VALIDATION]
    assert (len(weak.calls), len(strong.calls)) == (1, 1)


async def test_tokens_of_a_level_that_failed_are_kept() -> None:
    """The error that escalates carries what the cheaper model has cost."""
    weak = Level("weak", ProviderError("no", kind=FailureKind.TRUNCATED, usage=TOKENS))
    strategy = EscalatingStrategy([weak, Level("strong", "x")])
    with pytest.raises(ProviderError) as caught:
        await strategy.execute("q", 1, 9, RetryState())
    assert classify_for(strategy, caught.value).usage == TokenUsage.of(TOKENS)
    assert priced_as(caught.value) == "fake:weak"


async def test_an_answer_that_is_not_good_enough_escalates() -> None:
    """`accept` judges; the last level's refusal is a validation failure like any other."""
    levels = [Level("weak", "meh"), Level("strong", "great")]
    completion, kinds = await attempts(EscalatingStrategy(levels, accept="great".__eq__))
    assert completion.output == "great"
    assert kinds == [FailureKind.VALIDATION]
    nothing, kinds = await attempts(EscalatingStrategy(levels, accept="best".__eq__))
    assert nothing is None
    assert kinds == [FailureKind.VALIDATION] * 3


async def test_other_failures_stay_at_their_level() -> None:
    """A 429 or a timeout is no reason to pay more."""
    weak = Level("weak", ProviderError("busy", kind=FailureKind.RATE_LIMITED))
    strong = Level("strong", "answer")
    completion, kinds = await attempts(EscalatingStrategy([weak, strong]))
    assert completion is None
    assert kinds == [FailureKind.RATE_LIMITED] * 3
    assert strong.calls == []


async def test_all_levels_share_the_life_cycle() -> None:
    """Prepared, cleaned and closed together; the quota is the first level's by default."""
    levels = [Level("weak", "x"), Level("strong", "y")]
    strategy = EscalatingStrategy(levels)
    await strategy.prepare()
    await strategy.cleanup()
    await strategy.close()
    assert [(one.prepared, one.cleaned, one.closed) for one in levels] == [(1, 1, 1)] * 2
    assert strategy.quota == "fake:weak"
    with pytest.raises(UsageError):
        EscalatingStrategy([])


# -- built-in names


@pytest.mark.parametrize(
    ("name", "model", "quota"),
    [
        ("gemini", "gemini-2.5-flash", "gemini:gemini-2.5-flash"),
        ("gemini-cached", "gemini-2.5-flash", "gemini:gemini-2.5-flash"),
        ("openai", "gpt-4.1-mini", "openai:gpt-4.1-mini"),
        ("openai", "org/model:free", "openai:org/model:free"),
        ("pydantic-ai", "gemini:gemini-2.5-flash", "gemini:gemini-2.5-flash"),
        ("simulated", "fast", "simulated:fast"),
    ],
)
def test_every_provider_builds_and_names_its_quota(name: str, model: str, quota: str) -> None:
    """The quota is known before the strategy is built, and the built one agrees."""
    params = {"model": model, "system": "s", "temperature": 0.5, "max_output_tokens": 9}
    spec = StrategySpec(name=name, params={**params, "schema": {"type": "object"}})
    registration = catalog.lookup(spec.name)
    assert registration.quota_for(spec) == quota
    built = registration.build(spec)
    assert (built.model_name, built.max_output_tokens) == (quota, 9)


@pytest.mark.parametrize("key", ["base_url", "api_key", "client"])
def test_no_message_can_name_a_server_or_a_key(key: str) -> None:
    """A key must not travel to a host that a message names."""
    for name in ("gemini", "gemini-cached", "openai", "pydantic-ai", "simulated"):
        spec = StrategySpec(name=name, params={"model": "m", key: "http://evil.example"})
        with pytest.raises(UsageError, match=key):
            catalog.lookup(name).build(spec)
