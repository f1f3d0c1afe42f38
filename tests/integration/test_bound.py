"""Calls of one item are bounded, and it ends with one outcome, whatever user code does."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter, UserDict
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from pydantic import BaseModel, model_serializer

from batchllm_celery import (
    Batch,
    Completion,
    FailureKind,
    LLMCallStrategy,
    Producer,
    ProviderError,
    RetryState,
    strategy,
)
from batchllm_celery.limiter import Limiter
from batchllm_celery.models import (
    MAX_OVERLOADS,
    ProcessorConfig,
    Quota,
    QuotaLimits,
    RetryConfig,
    WorkItemResult,
)
from batchllm_celery.settings import Settings
from batchllm_celery.worker.process import Runtime
from tests.support import ValkeyServer
from tests.unit.test_item_runner import FakeLimiter

WIDE = Quota(name="wide", limits=QuotaLimits(requests_per_minute=1_000_000))
FAST = ProcessorConfig(retry=RetryConfig(initial_wait=0.001, max_wait=0.001, jitter=False))
USAGE = {"input_tokens": 3, "output_tokens": 2}
calls: Counter[str] = Counter()


class Own(BaseException):
    """What a library derives from BaseException, so that nobody catches it by accident."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Sly(Exception):
    @property
    def status_code(self) -> int:
        raise RuntimeError("no status")


class Leaving:
    """Exits wherever it is looked at."""

    def __bool__(self) -> bool:
        sys.exit(3)

    __str__ = __repr__ = __len__ = __bool__  # type: ignore[assignment]


class LeavingModel(BaseModel):
    @model_serializer
    def leave(self) -> Any:
        sys.exit(3)


class Broken(dict[str, int]):
    def __contains__(self, name: object) -> bool:
        raise OSError("its file is gone")


def _raise(error: BaseException) -> Any:
    raise error


class Exits(UserDict[str, Any]):
    """A mapping whose own code ends the process."""

    def get(self, *_: Any) -> Any:
        sys.exit(4)


class Fails(dict[str, Any]):
    def __len__(self) -> int:
        raise RuntimeError("no length")

    items = __len__  # type: ignore[assignment]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _exit_in_a_task() -> Any:
    async def leave() -> None:
        sys.exit(3)

    return asyncio.ensure_future(leave())


#: What execute does; whether it is a success, and the tokens that must be counted.
ANSWERS: dict[str, tuple[Callable[[], Any], bool, int]] = {
    "a dict as usage": (lambda: Completion("ok", USAGE), True, 5),  # type: ignore[arg-type]
    "an object as usage": (
        lambda: Completion("ok", SimpleNamespace(prompt_tokens=3, completion_tokens=2)),  # type: ignore[arg-type]
        True,
        5,
    ),
    "a usage that is none": (lambda: Completion("ok", 17), False, 0),  # type: ignore[arg-type]
    "usage of other words": (lambda: ("ok", {"words": 5}), False, 0),
    "no metadata": (lambda: Completion("ok", USAGE, None), True, 5),  # type: ignore[arg-type]
    "metadata as a string": (lambda: Completion("ok", USAGE, "stop"), False, 5),  # type: ignore[arg-type]
    "metadata as a list": (lambda: Completion("ok", USAGE, [1]), False, 5),  # type: ignore[arg-type]
    "an odd model": (lambda: Completion("ok", USAGE, {"model": {}}), True, 5),  # type: ignore[arg-type]
    "keys of metadata that are no words": (lambda: Completion("ok", USAGE, {1: 2}), True, 5),  # type: ignore[arg-type,dict-item]
    "a mapping that exits as metadata": (
        lambda: Completion("ok", USAGE, Exits({"model": "x"})),  # type: ignore[arg-type]
        True,
        5,
    ),
    "a mapping that fails as metadata": (lambda: Completion("ok", USAGE, Fails(x=1)), False, 5),  # type: ignore[arg-type]
    "a mapping that exits as usage": (lambda: ("ok", Exits({"input_tokens": 3})), False, 0),
    "a mapping that fails as usage": (lambda: ("ok", Fails(x=1)), False, 0),
    "deep metadata": (lambda: Completion("ok", USAGE, {"x": _nested(900)}), True, 5),  # type: ignore[arg-type]
    "an impossible usage": (lambda: ("ok", {"input_tokens": 10**400}), True, 10_000_000),
    "a negative usage": (lambda: ("ok", {"input_tokens": -5, "output_tokens": 2}), True, 2),
    "no number": (lambda: ("ok", {"input_tokens": float("nan"), "output_tokens": 2}), True, 2),
    "a model that exits": (lambda: Completion("ok", USAGE, {"model": Leaving()}), True, 5),  # type: ignore[arg-type]
    "metadata that exits": (lambda: Completion("ok", USAGE, {"x": Leaving()}), True, 5),  # type: ignore[arg-type]
    "an output that exits": (lambda: (LeavingModel(), USAGE), False, 5),
    "a usage that fails": (lambda: ("ok", Broken(a=1)), False, 0),
    "no answer": (lambda: None, False, 0),
    "bytes": (lambda: (b"\xff\xfe", USAGE), False, 5),
    "a set": (lambda: ({1, 2}, USAGE), True, 5),
    "a deep answer": (lambda: (_nested(400), USAGE), False, 5),
    "an answer nested in itself": (lambda: (_itself(), USAGE), False, 5),
    "half a pair": (lambda: ("\ud800", USAGE), True, 5),
    "5,000 digits": (lambda: (10**5000, USAGE), False, 5),
    "5,000 digits in a list": (lambda: ([10**5000], USAGE), False, 5),
    "a kind that is none": (lambda: _raise(ProviderError("x", kind="typo", usage=USAGE)), False, 5),
    "no text": (lambda: _raise(Mute()), False, 0),
    "no status": (lambda: _raise(Sly()), False, 0),
    "an exception of its own": (lambda: _raise(Own("leave")), False, 0),
    "a closed generator": (lambda: _raise(GeneratorExit()), False, 0),
    "an exit": (lambda: sys.exit(3), False, 0),
    "an interrupt": (lambda: _raise(KeyboardInterrupt()), False, 0),
}


def _itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


class Mischief(LLMCallStrategy[Any]):
    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        calls[prompt] += 1
        return self.do()


class Blocking(LLMCallStrategy[Any]):
    def execute(self, prompt: str, attempt: int, timeout: float, state: Any = None) -> Any:
        calls[prompt] += 1
        return "ok", USAGE


class Elsewhere(Mischief):
    """Misbehaves around its call."""

    def __init__(self, where: str) -> None:
        super().__init__(lambda: _raise(ProviderError("x")))
        setattr(self, where, self._leave)

    async def _leave(self, *_: Any) -> None:
        raise Own("leave")


def _kind(kind: Any, **extra: Any) -> Callable[[], Any]:
    return lambda: _raise(ProviderError("told so", kind=kind, usage=USAGE, **extra))


class Unreadable(Mischief):
    """One of its properties fails."""

    def __init__(self) -> None:
        super().__init__(lambda: ("ok", USAGE))


def _unreadable(name: str, error: BaseException) -> LLMCallStrategy[Any]:
    failing = property(lambda self: _raise(error))
    found: LLMCallStrategy[Any] = type("Failing", (Unreadable,), {name: failing})()
    return found


UNREADABLE: dict[str, BaseException] = {
    "model_name": SystemExit(3),
    "max_output_tokens": OSError("no file"),
    "full_speed": RuntimeError("no"),
    "quota": RuntimeError("no"),
    "models": ProviderError("x", kind=FailureKind.RATE_LIMITED),
}


ENDLESS: dict[str, Callable[[], Any]] = {
    "refusals as a word": _kind("rate_limited"),
    "days that end at once": _kind(FailureKind.QUOTA_EXHAUSTED, retry_after=0),
    "days without an end": _kind(FailureKind.QUOTA_EXHAUSTED),
    "overloads": _kind(FailureKind.OVERLOADED),
    "a large answer": lambda: ("x" * 2_000_000, USAGE),
}


@strategy("mischief", quota="wide")
def mischief(how: str) -> LLMCallStrategy[Any]:
    if how == "blocking":
        return Blocking()
    if how in ("prepare", "on_error", "cleanup"):
        return Elsewhere(how)
    if how in UNREADABLE:
        return _unreadable(how, UNREADABLE[how])
    return Mischief(ENDLESS[how] if how in ENDLESS else ANSWERS[how][0])


@pytest.fixture
async def runtime(redis_url: str, namespace: str) -> AsyncIterator[Runtime]:
    # Nothing goes back for another worker: there is none.
    settings = Settings(redis_url=redis_url, namespace=namespace, unrunnable_after=0)
    opened = Runtime(settings, redis_url, lambda *_: None, slots=4)
    await opened.open()
    # The real one waits for minutes while nobody succeeds.
    opened.items.runner.limiter = cast(Limiter, FakeLimiter())
    yield opened
    await opened.close()


async def run(
    runtime: Runtime, items: list[Any], how: str, **options: Any
) -> list[WorkItemResult[Any, Any]]:
    """Bring the items again and again, as messages do, until each has its outcome."""
    calls.clear()
    url, namespace = str(runtime.services.settings.redis_url), runtime.services.settings.namespace
    with Producer(redis_url=url, namespace=namespace) as producer:

        def submit() -> Batch:
            named = {"strategy": "mischief", "params": {"how": how}, "quota": WIDE, **options}
            return producer.submit(items, **named)

        batch = await asyncio.to_thread(submit)
        for _ in range(100):
            await runtime.run_items(batch.id, range(len(items)))
            if (await runtime.services.ledger.batches.progress(batch.id)).is_over:
                break
        return await asyncio.to_thread(lambda: list(batch.results()))


@pytest.mark.parametrize("how", ANSWERS)
async def test_an_odd_answer_is_one_outcome_and_paid_once(
    runtime: Runtime, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept where it can be understood, else one `logic_error` with its stack in the log."""
    _, success, tokens = ANSWERS[how]
    results = await run(runtime, ["a", "b"], how, config=FAST)
    assert sorted(result.item_id for result in results) == ["0", "1"]
    for result in results:
        assert result.success is success, result.error
        assert result.token_usage.total_tokens == tokens
        if not success and how not in ("no text", "no status"):
            assert result.error_kind is FailureKind.LOGIC_ERROR
    most = 1 if success or results[0].error_kind is FailureKind.LOGIC_ERROR else 3
    assert set(calls.values()) == {most}
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    bugs = {FailureKind.LOGIC_ERROR, FailureKind.UNKNOWN}
    assert bool(errors) == any(r.error_kind in bugs for r in results) or "metadata" in how
    progress_tokens = sum(result.token_usage.total_tokens for result in results)
    assert progress_tokens == 2 * tokens


@pytest.mark.parametrize("how", ["prepare", "on_error", "cleanup", "blocking"])
async def test_what_goes_wrong_beside_the_call_ends_the_item_too(
    runtime: Runtime, how: str
) -> None:
    """BaseExceptions of prepare, on_error and cleanup; an execute that is not async."""
    results = await run(runtime, ["a"], how, config=FAST)
    assert len(results) == 1
    assert calls["a"] <= 3
    if how == "blocking":
        assert "async def" in (results[0].error or "")


@pytest.mark.parametrize("how", UNREADABLE)
async def test_a_strategy_that_can_not_be_read_fails_its_items(runtime: Runtime, how: str) -> None:
    """In place of going back for ever, or ending the worker."""
    results = await run(runtime, ["a", "b"], how, config=FAST)
    assert [result.error_kind for result in results] == [FailureKind.LOGIC_ERROR] * 2
    assert not calls


@pytest.mark.parametrize("how", [how for how in ENDLESS if how != "a large answer"])
async def test_what_would_go_on_for_ever_ends_as_exhausted(runtime: Runtime, how: str) -> None:
    """Refusals, day's ends and overloads: at most the bound's calls, then the last error's name."""
    config = FAST.model_copy(update={"max_rate_limit_retries": 3})
    quick = Quota(name="quick", limits=QuotaLimits(requests_per_minute=1_000_000))
    results = await run(runtime, ["a"], how, config=config, quota=quick)
    [result] = results
    settings = runtime.services.settings
    assert calls["a"] <= 3 + 3 + MAX_OVERLOADS + 1 + settings.max_deliveries
    assert not result.success
    assert "told so" in (result.error or "")
    assert result.token_usage.total_tokens == 5 * calls["a"]


async def test_an_answer_that_can_not_be_recorded_is_not_paid_for_ever(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails behind the call: the next call does not begin once the item had its share."""

    async def broken(*_: Any, **__: Any) -> bool:
        for claim in list(runtime.services.ledger.claims.holding):
            claim.settled = False
        raise OSError("the outcome is lost")

    record = runtime.services.ledger.claims.record

    async def record_failures(claim: Any, result: Any, **values: Any) -> bool:
        if result.error_kind is FailureKind.EXHAUSTED:
            return await record(claim, result, **values)
        return await broken()

    monkeypatch.setattr(runtime.services.ledger.claims, "record", record_failures)
    run_items = runtime.run_items

    async def run_quietly(*arguments: Any) -> Any:
        try:
            return await run_items(*arguments)
        except OSError:
            return None

    monkeypatch.setattr(runtime, "run_items", run_quietly)
    [result] = await run(runtime, ["a"], "a set", config=FAST)
    most = FAST.most_calls + runtime.services.settings.max_deliveries + 1
    assert result.error_kind in (FailureKind.EXHAUSTED, FailureKind.CUT_OFF)
    assert calls["a"] <= most


@pytest.mark.parametrize(("depth", "success"), [(260, True), (490, True), (700, False)])
async def test_a_deep_context_costs_one_call_at_most(
    runtime: Runtime, depth: int, success: bool
) -> None:
    """It comes back with the answer, or the row fails before its call; neighbours run."""
    deep = {"item_id": "deep", "prompt": "deep", "context": _nested(depth)}
    rows = [deep, "beside"]
    results = {r.item_id: r for r in await run(runtime, rows, "a set", config=FAST)}
    assert results["1"].success
    assert results["deep"].success is success
    assert calls["deep"] == int(success)
    if success:
        assert results["deep"].context == _nested(depth)
    else:
        assert results["deep"].error_kind is FailureKind.INVALID_INPUT
        assert "nested deeper" in (results["deep"].error or "")


async def test_an_answer_larger_than_redis_takes_is_paid_once_and_says_so(namespace: str) -> None:
    """In place of the connection's end, five more calls and the word that the worker died."""
    server = ValkeyServer().start()
    try:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("proto-max-bulk-len", 1024**2)
        settings = Settings(redis_url=server.url, namespace=namespace)
        small = Runtime(settings, server.url, lambda *_: None, slots=4)
        await small.open()
        try:
            async with asyncio.timeout(30):
                [result] = await run(small, ["a"], "a large answer", config=FAST)
        finally:
            await small.close()
    finally:
        await asyncio.to_thread(server.stop)
    assert calls["a"] == 1
    assert result.error_kind is FailureKind.LOGIC_ERROR
    assert "proto-max-bulk-len" in (result.error or "")
    assert result.token_usage.total_tokens == 5
