"""The testing kit: strategies under test without a server, a queue or a provider."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery import (
    CallableStrategy,
    FailureKind,
    LLMCallStrategy,
    Producer,
    ProviderError,
    RetryState,
    UsageError,
    current_item,
    strategy,
)
from batchllm_celery.errors import StrategyNotFoundError
from batchllm_celery.testing import answers, arun_item, pipeline, run_item

Answers = Callable[[Any, Callable[[str], Any]], list[str]]


async def _never(prompt: str) -> str:
    raise AssertionError("the provider was called")


@strategy("kit-summary")
def summary(words: int = 3) -> LLMCallStrategy[str]:
    return CallableStrategy(_never)


class Stubborn(LLMCallStrategy[str]):
    """Answers at the third attempt, and keeps a list of its life."""

    def __init__(self) -> None:
        self.life: list[str] = []

    async def prepare(self) -> None:
        self.life.append("prepare")

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, dict[str, int]]:
        self.life.append(f"execute {attempt}")
        if attempt < 3:
            raise ProviderError("no", kind=FailureKind.VALIDATION, usage={"input_tokens": 2})
        return f"{prompt} at last", {"input_tokens": 2}

    async def cleanup(self) -> None:
        self.life.append("cleanup")

    async def close(self) -> None:
        self.life.append("close")


@pytest.mark.parametrize("number", range(100))
def test_a_hundred_tests_of_a_strategy(number: int, llm_answers: Answers) -> None:
    """With the provider by a function: milliseconds each."""
    prompts = llm_answers("kit-summary", lambda prompt: prompt.upper())
    found = run_item("kit-summary", f"text {number}", params={"words": 1})
    assert (found.output, prompts) == (f"TEXT {number}", [f"text {number}"])


def test_a_hundred_items_take_a_second() -> None:
    """The kit costs no more than the item runner."""
    started = time.process_time()
    with answers(summary, lambda prompt: prompt):
        for number in range(100):
            assert run_item(summary, str(number)).success
    assert time.process_time() - started < 3


async def test_an_item_goes_through_its_whole_life() -> None:
    """As in a worker; retries wait for nothing, and their tokens count."""
    one = Stubborn()
    found = await arun_item(one, "yes", context={"ticket": 7})
    assert (found.output, found.attempts, found.context) == ("yes at last", 3, {"ticket": 7})
    assert found.token_usage.input_tokens == 6
    assert one.life == ["prepare", *(f"execute {n}" for n in (1, 2, 3)), "cleanup", "close"]


def test_a_refusal_and_a_failure() -> None:
    """A 429 costs no attempt; an answer may be a coroutine; what ends an item ends it here."""
    said: Iterator[Any] = iter(
        [ProviderError("429", kind=FailureKind.RATE_LIMITED, status=429), "fine"]
    )

    async def answer(prompt: str) -> str:
        one = next(said)
        if isinstance(one, Exception):
            raise one
        return str(one)

    with answers(summary, answer) as prompts:
        found = run_item(summary, "x")
    assert (found.output, found.attempts, len(prompts)) == ("fine", 1, 2)
    with answers(summary, lambda prompt: 1 / 0) as prompts:
        found = run_item(summary.bind(words=5), "x")
    assert (found.success, found.error_kind, len(prompts)) == (False, FailureKind.LOGIC_ERROR, 1)


async def test_a_strategy_knows_which_item_it_answers() -> None:
    """Also in what it calls, and in each of many items at once; nowhere else."""

    async def tell(prompt: str) -> str:
        await asyncio.sleep(0)
        item = current_item()
        assert item is not None
        return f"{item.item_id} {item.attempt} {item.context} {prompt}"

    one = CallableStrategy(tell)
    many = [asyncio.create_task(arun_item(one, f"p{n}", context=n)) for n in range(20)]
    found = [result.output for result in await asyncio.gather(*many)]
    assert found == [f"item 1 {n} p{n}" for n in range(20)]
    assert current_item() is None


def test_a_name_that_is_ours_is_refused() -> None:
    with pytest.raises(UsageError, match="run_items"):
        strategy("run_items")


def test_an_overload_uses_attempts_up() -> None:
    """Of a provider without room for anybody, as in a fleet in which no call succeeds."""

    def refuse(prompt: str) -> str:
        raise ProviderError("503", kind=FailureKind.OVERLOADED, status=503)

    with answers(summary, refuse) as prompts:
        found = run_item(summary, "x")
    assert (found.error_kind, found.attempts, len(prompts)) == (FailureKind.OVERLOADED, 3, 3)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(StrategyNotFoundError):
        run_item("kit-nothing", "x")
    with pytest.raises(StrategyNotFoundError), answers("kit-nothing", str):
        pass
    with pytest.raises(UsageError, match="has its parameters already"):
        run_item(Stubborn(), "x", params={"a": 1})


def test_the_strategy_is_back_after_the_block() -> None:
    with answers(summary, str):
        pass
    assert run_item(summary, "x").error == "AssertionError: the provider was called"


def test_a_pipeline_in_memory(llm_answers: Answers, llm_pipeline: Producer) -> None:
    """Batches, streams, single items: the ledger's own scripts, without a server."""
    prompts = llm_answers(summary, str.upper)
    batch = llm_pipeline.submit(["a", "b"], strategy=summary)
    assert sorted(result.output for result in batch.results()) == ["A", "B"]
    assert batch.progress().succeeded == 2
    assert llm_pipeline.ask("c", strategy=summary, timeout=20).output == "C"
    streamed = llm_pipeline.stream((f"s{n}" for n in range(30)), strategy=summary)
    assert len({result.output for result in streamed}) == 30
    assert len(prompts) == 33


def test_two_pipelines_know_nothing_of_each_other() -> None:
    """Each has a memory of its own."""
    with answers(summary, str.upper), pipeline() as one, pipeline() as other:
        one.submit(["a"], strategy=summary, batch_id="one").wait(timeout=20)
        assert [batch.batch_id for batch in one.batches()] == ["one"]
        assert other.batches() == []


def test_the_plugin_is_light(tmp_path: Path) -> None:
    """A project that has the package pays for no import of it in its own tests."""
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_it():\n"
        "    assert not {'celery', 'redis', 'pydantic', 'fakeredis'} & set(sys.modules)\n"
    )
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:hypothesispytest"]
    plugin = ["-p", "batchllm_celery.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *plugin, "-o", "addopts=", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout
