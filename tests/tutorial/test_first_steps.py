"""Read this first: what the library does, one small test a feature, with a real worker."""

from __future__ import annotations

import asyncio

import pytest

from batchllm_celery import (
    LLMWorkItem,
    ParallelBatchProcessor,
    ProcessorConfig,
    Producer,
    Quota,
    QuotaLimits,
    UsageError,
)
from batchllm_celery.errors import FailureKind
from tests.tutorial import strategies


def test_a_batch_is_an_iterable_of_prompts_and_the_name_of_a_strategy(producer: Producer) -> None:
    """Submit texts, take results as they complete; each knows its place in the input."""
    texts = ["one", "two", "three"]

    batch = producer.submit(texts, strategy="shout")

    answers = {result.index: result.output for result in batch.results()}
    assert answers == {0: "ONE", 1: "TWO", 2: "THREE"}


def test_items_carry_an_id_and_a_context_that_come_back(producer: Producer) -> None:
    """What you need to file an answer travels with its item."""
    item = LLMWorkItem("mail-7", "shout", "hello", context={"folder": "inbox"})

    (result,) = producer.submit([item]).results()

    assert (result.item_id, result.context, result.output) == (
        "mail-7",
        {"folder": "inbox"},
        "HELLO",
    )
    assert result.token_usage["input_tokens"] == 5


def test_results_can_be_awaited_too(producer: Producer) -> None:
    """In a coroutine, `async for` keeps your loop free."""

    async def collect() -> set[str]:
        batch = await asyncio.to_thread(producer.submit, ["a", "b"], strategy="shout")
        return {result.output async for result in batch.results()}

    assert asyncio.run(collect()) == {"A", "B"}


def test_a_failed_attempt_is_tried_again_and_its_tokens_are_counted(producer: Producer) -> None:
    """`on_error` and the state let the second attempt know what was wrong with the first."""
    (result,) = producer.submit(["hello"], strategy="moody").results()

    assert result.output == "hello, after 'in no mood'"
    assert result.attempts == 2
    assert result.token_usage["input_tokens"] == 10


def test_a_failure_is_data_and_never_stops_the_others(producer: Producer) -> None:
    """An item that can't be answered says why; the rest of the batch goes on."""
    results = producer.submit(["please", "now!"], strategy="stubborn").results()

    polite, rude = sorted(results, key=lambda result: result.index)

    assert polite.success
    assert not rude.success
    assert rude.error_kind is FailureKind.LOGIC_ERROR
    assert rude.error == "ValueError: say please"


def test_the_same_batch_id_pays_only_for_what_is_new(producer: Producer) -> None:
    """Feeding rows again under their batch's id runs none of the finished ones again."""
    first = producer.submit(["a", "b"], strategy="moody", batch_id="again")
    first.wait(timeout=60)

    second = producer.submit(["a", "b"], strategy="moody", batch_id="again")

    assert second.resumed
    assert second.wait(timeout=60).input_tokens == 20


def test_a_quota_is_named_once_and_shared_by_all(producer: Producer) -> None:
    """Whoever draws on the quota of this name draws on the same limits, in every process."""
    quota = Quota(name="tutorial", limits=QuotaLimits(requests_per_minute=6000))

    batch = producer.submit(["x"] * 20, strategy="shout", quota=quota)

    assert batch.wait(timeout=60).succeeded == 20
    state = producer.quota("tutorial")
    assert state is not None


def test_a_batch_can_be_paused_resumed_and_cancelled(producer: Producer) -> None:
    """Control takes effect on the whole fleet; every item still gets its one outcome."""
    slow = Quota(name="slow", limits=QuotaLimits(requests_per_minute=60))
    batch = producer.submit(["x"] * 300, strategy="shout", quota=slow)
    assert batch.pause().state == "paused"
    assert batch.resume().state == "running"

    batch.cancel()

    progress = batch.wait(timeout=60)
    kinds = {result.error_kind for result in batch.results(follow=False)}
    assert progress.finished == 300
    assert FailureKind.CANCELLED in kinds


def test_an_instance_belongs_to_the_in_process_api(producer: Producer) -> None:
    """A strategy object can't travel to another process; the refusal says what to do."""
    item = LLMWorkItem("a", strategies.build_shout(), "hello")

    with pytest.raises(UsageError, match=r"@strategy"):
        producer.submit([item])


async def test_the_in_process_api_needs_no_worker(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ParallelBatchProcessor` is batch-llm's API on the same runner and limiter."""
    monkeypatch.setenv("BATCHLLM_REDIS_URL", redis_url)
    monkeypatch.setenv("BATCHLLM_NAMESPACE", namespace)
    shared = strategies.build_shout()
    async with ParallelBatchProcessor[str, str, None](
        config=ProcessorConfig(max_workers=5)
    ) as processor:
        for i in range(10):
            await processor.add_work(LLMWorkItem(f"item_{i}", shared, f"text {i}"))
        result = await processor.process_all()

    assert (result.total_items, result.succeeded) == (10, 10)
