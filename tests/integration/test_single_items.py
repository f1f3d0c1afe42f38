"""Standing batches: `ask`, `enqueue`, item handles, and what is left of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import redis

from batchllm_celery import (
    AsyncProducer,
    CallableStrategy,
    FailureKind,
    LLMCallStrategy,
    Producer,
    UsageError,
    strategy,
)
from batchllm_celery.errors import BatchConflictError, BatchNotFoundError
from batchllm_celery.ledger.standing import PERIOD, ItemPlace, standing_spec
from batchllm_celery.models import BatchSpec, StrategySpec
from batchllm_celery.settings import Settings
from tests.integration.in_process import in_process_worker
from tests.integration.test_async_producer import Word
from tests.support import wait_until_async

CALLS: list[str] = []


async def _answer(prompt: str) -> Word:
    CALLS.append(prompt)
    if prompt.startswith("slow"):
        await asyncio.sleep(0.5)
    if prompt == "fail":
        raise ValueError("told to")
    return Word(text=prompt)


@strategy("single-word")
def word(suffix: str = "") -> LLMCallStrategy[Word]:
    return CallableStrategy(lambda prompt: _answer(prompt + suffix))


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    CALLS.clear()
    return Settings(redis_url=redis_url, namespace=namespace, offer_seconds=0.05)


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as opened:
        yield opened


def test_one_prompt_one_answer(producer: Producer, settings: Settings) -> None:
    """Typed as the strategy is; parameters, context and ids come back; a failure is a result."""
    with in_process_worker(settings):
        found = producer.ask("hello", strategy=word, context={"n": 1}, item_id="mine", timeout=20)
        assert (found.output, found.context, found.item_id) == (
            Word(text="hello"),
            {"n": 1},
            "mine",
        )
        assert producer.ask("a", strategy=word.bind("!"), timeout=20).output.text == "a!"
        plain = producer.ask("a", strategy="single-word", params={"suffix": "?"}, timeout=20)
        assert plain.output == {"text": "a?"}
        failed = producer.ask("fail", strategy=word, timeout=20)
        assert (failed.success, failed.error_kind) == (False, FailureKind.LOGIC_ERROR)
        again = producer.ask("hello", strategy=word, item_id="mine", timeout=20)
        assert (again.output.text, CALLS.count("hello")) == ("hello", 1)  # the same item


def test_a_handle_finds_its_item_again(producer: Producer, settings: Settings) -> None:
    """In another process by its id; done or not, as often as it is asked."""
    item = producer.enqueue("later", strategy=word)
    assert not item.done()
    with pytest.raises(TimeoutError, match=r"no outcome within 0\.1 s"):
        item.result(timeout=0.1)
    with in_process_worker(settings), Producer(settings) as other:
        assert other.item(item.id, word).result(timeout=20).output == Word(text="later")
        assert item.done()
        assert item.result(timeout=20).output.text == "later"
        assert item.cancel() is False


def test_what_nobody_runs_can_be_cancelled(producer: Producer) -> None:
    """And what nobody waits for any more is."""
    item = producer.enqueue("x", strategy=word)
    assert item.cancel() is True
    assert item.result(timeout=5).error_kind is FailureKind.CANCELLED
    with pytest.raises(TimeoutError):
        producer.ask("y", strategy=word, timeout=0.1)
    (progress,) = producer.batches()
    assert (progress.failed, progress.total, str(progress.state)) == (2, 2, "finished")


def test_a_standing_batch_that_was_cancelled_says_so(
    producer: Producer, settings: Settings
) -> None:
    """With the command that lets it go on."""
    item = producer.enqueue("x", strategy=word)
    batch = producer.attach(ItemPlace.parse(item.id).batch_id)
    batch.cancel()
    with pytest.raises(BatchConflictError, match="is cancelled: `batchllm resume single-word-"):
        producer.enqueue("y", strategy=word)
    with Producer(settings) as other, pytest.raises(BatchConflictError, match="is cancelled"):
        other.enqueue("y", strategy=word)
    assert batch.progress().failed == 1
    batch.resume()
    producer.enqueue("y", strategy=word)


async def test_many_ask_at_once(settings: Settings) -> None:
    """200 coroutines and a thread share one standing batch; each gets the answer to its own."""
    with in_process_worker(settings):
        async with AsyncProducer(settings) as producer:
            asked = [producer.ask(f"q{n}", strategy=word, timeout=60) for n in range(200)]
            with Producer(settings) as blocking:
                thread = asyncio.to_thread(
                    lambda: blocking.ask("from a thread", strategy=word, timeout=60)
                )
                *answers, last = await asyncio.gather(*asked, thread)
                assert (
                    await blocking.aask("aask", strategy=word, timeout=60)
                ).output.text == "aask"
                await asyncio.to_thread(blocking.close)
            item = await producer.enqueue("handle", strategy=word)
            assert (await item.result(timeout=20)).output.text == "handle"
            assert len(await producer.batches()) == 1
    assert [a.output.text for a in answers] == [f"q{n}" for n in range(200)]
    assert last.output.text == "from a thread"
    assert len(CALLS) == 203


async def test_a_coroutine_that_is_cancelled_takes_its_item_along(settings: Settings) -> None:
    """A client that closes its request pays for no answer that waits."""
    async with AsyncProducer(settings) as producer:
        task = asyncio.create_task(producer.ask("x", strategy=word))

        async def is_stored() -> bool:
            return [one.total for one in await producer.batches()] == [1]

        await wait_until_async(is_stored)
        task.cancel()
        await asyncio.wait([task])
        (progress,) = await producer.batches()
    assert (progress.failed, progress.total) == (1, 1)


def test_what_is_done_expires(
    redis_url: str, namespace: str, settings: Settings, producer: Producer
) -> None:
    """What waits is kept as long as a batch; an hour after the last outcome nothing is left."""
    item = producer.enqueue("x", strategy=word)
    keys = f"{namespace}:{{batch:*"
    with redis.Redis.from_url(redis_url) as client:
        ttls = [client.ttl(key) for key in client.scan_iter(keys)]
        assert min(ttls) > settings.item_ttl_seconds
        with in_process_worker(settings):
            item.result(timeout=20)
        ttls = [client.ttl(key) for key in client.scan_iter(keys)]
        assert 0 < max(ttls) <= settings.item_ttl_seconds
        client.delete(*client.scan_iter(keys))
    with pytest.raises(BatchNotFoundError):
        item.result(timeout=5)
    producer.enqueue("y", strategy=word)  # a new one is made


def test_what_can_not_be_asked_is_refused(producer: Producer) -> None:
    with pytest.raises(TypeError, match="a prompt is text, not int"):
        producer.ask(7, strategy=word)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="half a surrogate"):
        producer.ask("\ud800", strategy=word)
    with pytest.raises(UsageError, match="as JSON"):
        producer.ask("x", strategy=word, context={1, 2})
    with pytest.raises(UsageError, match="BATCH:NUMBER"):
        producer.item("x")
    with pytest.raises(TypeError, match="prioritty"):
        producer.enqueue("x", strategy=word, prioritty=1)  # type: ignore[call-overload]


def test_items_of_a_kind_share_a_batch_for_an_hour() -> None:
    """Of the same strategy, parameters, queue and priority; its name is one that can be typed."""
    one = BatchSpec(batch_id="standing", strategy=StrategySpec(name="a/b:c", params={"x": 1}))
    now = time.time() // PERIOD * PERIOD
    first = standing_spec(one, now).batch_id
    assert first == standing_spec(one, now + PERIOD - 1).batch_id
    others = [
        standing_spec(one, now + PERIOD),
        standing_spec(one.model_copy(update={"priority": 1}), now),
        standing_spec(one.model_copy(update={"queue": "q"}), now),
        standing_spec(
            one.model_copy(update={"strategy": StrategySpec(name="a/b:c", params={"x": 2})}), now
        ),
    ]
    assert len({first, *(spec.batch_id for spec in others)}) == 5
    assert first.startswith("a_b_c-")
