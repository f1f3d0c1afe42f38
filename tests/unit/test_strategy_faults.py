"""Faults of user code are told where they are made, and leave their place in the log."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from batchllm_celery import LLMCallStrategy, RetryState, TokenUsage
from batchllm_celery.errors import UsageError
from batchllm_celery.models import BatchSpec, StrategySpec
from batchllm_celery.strategies import CallableStrategy, catalog, strategy
from batchllm_celery.strategies.base import ProcessResources, as_completion
from batchllm_celery.strategies.registry import Registration, Registry, StrategyCatalog

SPEC = StrategySpec(name="mine")


class Plain(LLMCallStrategy[str]):
    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, TokenUsage]:
        return prompt, TokenUsage()


class Blocking(Plain):
    def execute(self, *args: Any) -> Any:
        return "", TokenUsage()


class Yielding(Plain):
    async def execute(self, *args: Any) -> Any:
        yield ""


NAMES = ["summarise reviews", "a{b}c", "", "tab\there", "esc\x1b[31m", "x" * 201, "line\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_key_can_have_is_refused_where_it_is_written(name: str) -> None:
    """In the decorator, in its quota, and in a batch."""
    with pytest.raises(UsageError, match="must be 1 to 200 letters"):
        strategy(name)
    with pytest.raises(UsageError, match="must be 1 to 200 letters"):
        strategy("fine", quota=name)
    with pytest.raises(ValidationError, match="must be 1 to 200 letters"):
        BatchSpec(batch_id="b", strategy=SPEC, quota=name)


@pytest.mark.parametrize("name", ["gemini:gemini-2.5-flash", "org/model", "a.b_c-d"])
def test_usual_names_are_taken(name: str) -> None:
    """Those of models above all."""
    strategy(name, quota=name)
    BatchSpec(batch_id="b", strategy=SPEC, quota=name)


@pytest.mark.parametrize("attribute", ["quota", "model_name"])
async def test_a_quota_that_an_instance_names_is_checked_too(attribute: str) -> None:
    """Before any call draws on it."""

    def build() -> LLMCallStrategy[str]:
        built = Plain()
        setattr(built, attribute, "a{b}c")
        return built

    names = StrategyCatalog()
    names.register(Registration("mine", build))
    registry = Registry(ProcessResources(), names)
    if attribute == "quota":
        with pytest.raises(UsageError, match=r"'a\{b\}c'"):
            await registry.get(SPEC)
    else:  # a model is called as its provider likes
        assert (await registry.get(SPEC)).quota == "a%7Bb%7Dc"


@pytest.mark.parametrize("made", [Blocking, Yielding])
def test_an_execute_that_is_not_async_is_refused(made: type[LLMCallStrategy[Any]]) -> None:
    """A class when it is registered, an instance when it is built for the first time."""
    with pytest.raises(UsageError, match="async def"):
        strategy("not-async")(made)
    assert "not-async" not in catalog
    with pytest.raises(UsageError, match="async def"):
        Registration("mine", lambda: made()).build(SPEC)
    Registration("mine", Plain).build(SPEC)


async def test_a_forgotten_await_is_called_that() -> None:
    """By our words, not by asyncio's."""

    async def answer() -> tuple[str, TokenUsage]:
        return "", TokenUsage()

    with pytest.raises(TypeError, match="`await` is missing"):
        as_completion(answer())
    blocking: Any = lambda prompt: prompt  # noqa: E731
    with pytest.raises(TypeError, match="must be async"):
        await CallableStrategy(blocking).execute("hello", 1, 1.0)


def test_a_factory_that_fails_leaves_its_place_too(caplog: pytest.LogCaptureFixture) -> None:
    """No other item fares better, and nobody sees where it was."""

    def factory() -> LLMCallStrategy[str]:
        raise OSError("no such file")

    with pytest.raises(UsageError, match="its factory failed"):
        Registration("mine", factory).build(SPEC)
    assert "in factory" in caplog.text
