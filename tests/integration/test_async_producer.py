"""`AsyncProducer`: one implementation under both producers; forks; the warning on a loop."""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from batchllm_celery import (
    AsyncProducer,
    Batch,
    BlockingCallWarning,
    CallableStrategy,
    LLMCallStrategy,
    LLMWorkItem,
    Producer,
    Row,
    UsageError,
    strategy,
)
from batchllm_celery.models import BadRow
from batchllm_celery.producer.batch import AsyncBatch
from batchllm_celery.settings import Settings
from tests.integration.in_process import in_process_worker


class Word(BaseModel):
    text: str


async def _word(prompt: str) -> Word:
    if prompt == "fail":
        raise ValueError("told to")
    return Word(text=prompt)


@strategy("async-word")
def word() -> LLMCallStrategy[Word]:
    return CallableStrategy(_word)


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    return Settings(redis_url=redis_url, namespace=namespace, offer_seconds=0.05)


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[AsyncProducer]:
    with in_process_worker(settings):
        async with AsyncProducer(settings) as opened:
            yield opened


async def _texts(count: int) -> AsyncIterator[str]:
    for n in range(count):
        await asyncio.sleep(0)
        yield f"w{n}"


async def test_a_batch_from_a_loop(producer: AsyncProducer) -> None:
    """Submitted from an async iterable, followed, collected; outputs are the strategy's type."""
    batch = await producer.submit(_texts(30), strategy=word)
    assert isinstance(batch, AsyncBatch)
    assert (await batch.wait(timeout=20)).succeeded == 30
    seen = {result.item_id: result.output async for result in batch.results()}
    assert seen["7"] == Word(text="w7")
    whole = await (await producer.attach(batch.id, word)).collect(timeout=5)
    assert (whole.succeeded, whole.results[0].output.text[0]) == (30, "w")
    assert [one.batch_id for one in await producer.batches()] == [batch.id]


async def test_a_stream_from_a_loop(producer: AsyncProducer) -> None:
    """Feeding and reading go on at once, while the loop serves others."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    beside = asyncio.create_task(others())
    found = [result.output.text async for result in producer.stream(_texts(40), strategy=word)]
    beside.cancel()
    assert sorted(found) == sorted(f"w{n}" for n in range(40))
    assert turns > 5


async def test_a_stream_that_is_left_stops_its_feeder(producer: AsyncProducer) -> None:
    """Whoever breaks out of the loop leaves no task behind that goes on feeding."""
    fed = 0

    async def endless() -> AsyncIterator[str]:
        nonlocal fed
        while True:
            await asyncio.sleep(0)
            fed += 1
            yield f"w{fed}"

    stream = producer.stream(endless(), strategy=word)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    before = fed
    await asyncio.sleep(0.05)
    assert fed == before
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "batchllm-feeder"]


async def test_steering_from_a_loop(settings: Settings) -> None:
    """Pause, resume, cancel; a bad row, an unknown id and a wrong row are told as in sync code."""
    async with AsyncProducer(settings) as producer:
        rows: list[Row] = [BadRow("line-1", 1, "line 1: no JSON"), "x"]
        batch = await producer.submit(rows, strategy="nobody-runs-it")
        assert (await batch.pause()).state == "paused"
        assert (await batch.resume()).state == "running"
        assert (await batch.cancel()).state == "cancelled"
        kinds = {r.item_id: str(r.error_kind) async for r in batch.results()}
        assert kinds == {"line-1": "invalid_input", "1": "cancelled"}
        with pytest.raises(UsageError, match="a single str"):
            await producer.submit("text", strategy=word)
        with pytest.raises(UsageError, match="name a strategy"):
            await producer.submit(_texts(1))
        with pytest.raises(TypeError, match="prioritty"):
            await producer.submit(["x"], strategy=word, prioritty=1)  # type: ignore[call-overload]


async def test_rows_that_name_their_strategy_come_from_an_async_iterable_too(
    producer: AsyncProducer,
) -> None:
    """The first one says the batch's, and is a row like the others."""

    async def items() -> AsyncIterator[LLMWorkItem]:
        for n in range(3):
            yield LLMWorkItem(item_id=f"i{n}", strategy="async-word", prompt=f"w{n}")

    found = await (await producer.submit(items())).collect(timeout=20)
    assert {r.item_id: r.output for r in found.results} == {
        f"i{n}": {"text": f"w{n}"} for n in range(3)
    }


async def test_a_rows_failure_gives_the_batch_up(settings: Settings) -> None:
    """An async iterable that raises in the middle leaves no batch that is paid for."""

    async def rows() -> AsyncIterator[str]:
        for n in range(25):
            yield f"w{n}"
        raise OSError("the source broke")

    async with AsyncProducer(settings) as producer:
        with pytest.raises(OSError, match="the source broke"):
            await producer.submit(rows(), strategy=word, batch_id="broken-source")
        progress = await (await producer.attach("broken-source")).progress()
    assert (str(progress.state), progress.failed) == ("cancelled", progress.fed)


async def test_a_blocking_call_on_a_loop_is_warned_of_with_its_line(settings: Settings) -> None:
    """Of every method that blocks, and of a loop over results; not from a thread of its own."""
    producer = Producer(settings)
    batch = await asyncio.to_thread(lambda: producer.submit(["x"], strategy=word))
    calls: dict[str, Any] = {
        "submit": lambda: producer.submit(["x"], strategy=word),
        "progress": lambda: batch.progress(),
        "batches": lambda: producer.batches(),
        "results": lambda: list(batch.results(follow=False)),
    }
    for name, call in calls.items():
        with pytest.warns(BlockingCallWarning, match=rf"^{name}\(\) blocks the running") as seen:
            call()
        assert (seen[0].filename, seen[0].lineno) == (__file__, call.__code__.co_firstlineno)
    await asyncio.to_thread(producer.close)


def test_a_blocking_call_without_a_loop_says_nothing(settings: Settings) -> None:
    with Producer(settings) as producer:
        assert producer.batches() == []


def _in_child(work: Any) -> str:
    """What `work` returned, or how it failed, in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, str(work()).encode())
        except BaseException:
            os.write(writing, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return told


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_producer_that_was_used_before_a_fork(settings: Settings) -> None:
    """Child and parent go on, each with connections of its own (gunicorn --preload)."""

    def submit(name: str) -> str:
        batch = producer.submit(["x", "y"], strategy=word, batch_id=name)
        return f"{name} {batch.progress().fed}"

    async def asubmit() -> str:
        batch = await aproducer.submit(["x"], strategy=word, batch_id="from-async-child")
        return f"async {(await batch.progress()).fed}"

    producer, aproducer = Producer(settings), AsyncProducer(settings)
    assert submit("before") == "before 2"
    asyncio.run(aproducer.check())
    assert _in_child(lambda: submit("from-child")) == "from-child 2"
    assert _in_child(lambda: asyncio.run(asubmit())) == "async 1"
    assert submit("after") == "after 2"
    producer.close()
    asyncio.run(aproducer.close())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_uses_the_producer(settings: Settings) -> None:
    """What that thread held is not held in the child for ever."""
    producer = Producer(settings)
    producer.check()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with producer._session._lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    assert _in_child(lambda: len(producer.batches())) == "0"
    release.set()
    thread.join()
    producer.close()


def test_both_producers_have_one_set_of_options() -> None:
    """A method of the blocking one that waits for Redis has its like, or a reason."""
    own = {"open", "check_runnable", "url"}  # of the command line
    own |= {"find", "prepare", "quiesce"}
    own |= {"aask"}  # `ask` of the other
    names = {n for n in vars(Producer) if not n.startswith("_")} - own
    assert names <= {n for n in vars(AsyncProducer) if not n.startswith("_")}
    of_the_command_line = {"read", "consume", "take", "acknowledge", "give_up"}
    names = {n for n in vars(Batch) if not n.startswith("_")} - of_the_command_line
    assert names <= {n for n in vars(AsyncBatch) if not n.startswith("_")}
