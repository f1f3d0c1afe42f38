"""Redis URLs in messages and for Celery, scripts, what waiting can cure, and many in one call."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence

import pytest
import redis.exceptions as redis_errors

from batchllm_celery.connection import (
    Connection,
    Reminder,
    Script,
    broker_url,
    safe_url,
)
from batchllm_celery.connection.redis_connection import passes_by_itself
from batchllm_celery.errors import RedisDeniedError, RedisUnavailableError, UsageError
from batchllm_celery.events import ConnectionLost, ConnectionRestored, Event, Events
from batchllm_celery.ledger.batching import Coalescer
from tests.support import Clock, wait_until_async


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://user:secret@host:1/0", "redis://user:***@host:1/0"),
        ("rediss://:secret@host", "rediss://:***@host"),
        ("redis://:sec/ret#with@signs@host/2", "redis://:***@host/2"),
        ("redis://host/0?password=secret&db=1", "redis://host/0?password=***&db=1"),
        ("unix:///tmp/a@b.sock?db=1", "unix:///tmp/a@b.sock?db=1"),
        ("unix://:secret@/tmp/s.sock", "unix://:***@/tmp/s.sock"),
        ("user:secret@host", "host"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """Messages name the Redis they speak of and never its password, however odd the URL."""
    assert safe_url(url) == shown
    assert "secret" not in safe_url(url)


@pytest.mark.parametrize(
    ("url", "celerys"),
    [
        ("redis://:pw@host:6379/3", "redis://:pw@host:6379/3"),
        ("rediss://host", "rediss://host:6379/0"),
        ("unix:///run/v.sock", "redis+socket:///run/v.sock?virtual_host=0"),
        ("unix:///run/v.sock?db=2", "redis+socket:///run/v.sock?virtual_host=2"),
        ("unix://:pw@/run/v.sock", "redis+socket://:pw@/run/v.sock?virtual_host=0"),
    ],
)
def test_celery_is_given_the_same_redis_in_its_own_spelling(url: str, celerys: str) -> None:
    """Unix sockets have another scheme in Celery; everything else stays as it is."""
    assert broker_url(url) == celerys


def test_a_url_of_another_kind_is_refused_with_what_to_write() -> None:
    """A URL that is no Redis URL is a usage error that names the schemes, not the password."""
    with pytest.raises(UsageError, match="must begin with redis://, rediss:// or unix") as caught:
        Connection("http://user:secret@host")
    assert "secret" not in str(caught.value)


def test_a_script_is_read_from_the_package_that_holds_it() -> None:
    """A script is a file beside the Python that calls it, known to Redis by its SHA-1."""
    script = Script.load("tests.unit", "answer.lua")
    assert script.name == "answer.lua"
    assert script.sha == hashlib.sha1(script.text.encode()).hexdigest()
    assert script.text.startswith("-- answer.lua")


def test_an_included_file_stands_where_it_is_named() -> None:
    """Steps of a script are files of their own, and share its locals."""
    text = Script.load("tests.unit", "steps/sum.lua").text
    assert "--#include" not in text
    assert text.index("local first = 1") < text.index("local second = 2") < text.index("return")


#: What Redis 6.2 puts before the answer that a command in a script got.
BEFORE_7 = "Error running script (call to f_2248ea7f10): @user_script:1: @user_script: 1: "


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (redis_errors.ConnectionError("gone"), True),
        (redis_errors.TimeoutError("late"), True),
        (redis_errors.BusyLoadingError("loading"), True),
        (redis_errors.ReadOnlyError("a replica"), True),
        (redis_errors.OutOfMemoryError("full"), True),
        (redis_errors.ResponseError("MISCONF Errors writing to the AOF file"), True),
        (redis_errors.ResponseError("BUSY Valkey is busy running a script"), True),
        (ConnectionResetError("reset"), True),
        (redis_errors.AuthenticationError("wrong password"), False),
        (redis_errors.AuthorizationError("no permission"), False),
        (redis_errors.NoPermissionError("may not"), False),
        (redis_errors.ResponseError(BEFORE_7 + "-OOM command not allowed when used"), True),
        (redis_errors.ResponseError(BEFORE_7 + "-MISCONF Redis is configured to"), True),
        (redis_errors.ResponseError(BEFORE_7 + "-READONLY You can't write against a"), True),
        (redis_errors.ResponseError(BEFORE_7 + "-WRONGTYPE Operation against a key"), False),
        (redis_errors.ResponseError("ERR the prompt says: OOM here"), False),
        (redis_errors.ResponseError("ACL failure in script: User u has no permissions"), False),
        (redis_errors.ResponseError("ERR unknown command"), False),
        (redis_errors.DataError("not a string"), False),
        (ValueError("ours"), False),
        (TimeoutError("ours"), False),
    ],
)
def test_only_what_waiting_can_cure_is_waited_for(error: Exception, passes: bool) -> None:
    """A Redis that is away, loading or full is waited for; a wrong password is an error."""
    assert passes_by_itself(error) is passes


async def test_an_outage_is_told_once_and_its_end_once() -> None:
    """Many calls meet one outage: one event when it is noticed, one when it is over."""
    heard: list[Event] = []
    failures = iter([redis_errors.ConnectionError("gone")] * 6)

    async def call() -> str:
        for failure in failures:
            raise failure
        return "answer"

    async with Connection("redis://localhost:1", events=Events(heard.append)) as connection:
        answers = await asyncio.gather(*(connection.patiently(call) for _ in range(3)))
        assert not connection.lost
    assert answers == ["answer"] * 3
    assert [type(event) for event in heard] == [ConnectionLost, ConnectionRestored]


DENIALS = [
    redis_errors.NoPermissionError("this user has no permissions to run the 'eval' command"),
    redis_errors.AuthenticationError("invalid username-password pair or user is disabled."),
    redis_errors.ResponseError("ACL failure in script: No permissions to access a channel"),
    redis_errors.ResponseError(
        "The user executing the script can't run this command or subcommand script: 80c9, on @user"
    ),
    redis_errors.ResponseError(BEFORE_7 + "The user executing the script can't run this command"),
]


@pytest.mark.parametrize("denial", DENIALS, ids=lambda error: type(error).__name__)
async def test_a_denial_is_one_line_that_says_where_the_rights_are(denial: Exception) -> None:
    """A right or a password that is missing is told at once, without the password that was used."""

    async def call() -> None:
        raise denial

    async with Connection("redis://me:secret@localhost:1") as connection:
        with pytest.raises(RedisDeniedError, match=r"me:\*\*\*@localhost:1 denies") as caught:
            await connection.patiently(call)
    assert "docs/deploy.md" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("denial", DENIALS, ids=lambda error: type(error).__name__)
async def test_a_worker_waits_out_a_denial_in_mid_run(denial: Exception) -> None:
    """Rights and passwords change in more than one step: what is paid for is not dropped for it."""
    answers = iter([None, denial, denial, None])

    async def call() -> str:
        if (answer := next(answers)) is not None:
            raise answer
        return "answer"

    heard: list[Event] = []
    events = Events(heard.append)
    async with Connection("redis://localhost:1", events=events, denied_seconds=30) as connection:
        assert [await connection.patiently(call) for _ in range(2)] == ["answer"] * 2
    assert [type(event) for event in heard] == [ConnectionLost, ConnectionRestored]


async def test_a_denial_that_lasts_ends_the_wait_though_other_calls_succeed() -> None:
    """One right that is missing for good is no outage."""

    async def call(error: Exception | None) -> None:
        if error is not None:
            raise error

    async with Connection("redis://localhost:1", denied_seconds=0.2) as connection:
        await connection.patiently(lambda: call(None))
        denied = asyncio.ensure_future(connection.patiently(lambda: call(DENIALS[0])))
        while not denied.done():
            await connection.patiently(lambda: call(None))
            await asyncio.sleep(0.01)
        with pytest.raises(RedisDeniedError):
            await denied


async def test_a_denial_at_the_start_is_no_outage() -> None:
    """Who was never served has no rights or no password: waiting would not help."""

    async def call() -> None:
        raise DENIALS[1]

    async with Connection("redis://localhost:1", denied_seconds=30) as connection:
        with pytest.raises(RedisDeniedError):
            await asyncio.wait_for(connection.patiently(call), timeout=5)


def test_a_wait_is_said_after_seconds_and_then_rarely() -> None:
    """Three seconds, a minute, ten minutes; each word once."""
    clock = Clock()
    reminder = Reminder(clock)
    said = []
    for second in range(2_000):
        clock.now = 100.0 + second
        if reminder.due():
            said.append(second)
    assert said == [3, 63, 663, 1263, 1863]


async def test_what_waiting_can_not_cure_is_raised_at_once() -> None:
    """An error of the command itself is not repeated."""
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        raise redis_errors.ResponseError("ERR wrong")

    async with Connection("redis://localhost:1") as connection:
        with pytest.raises(redis_errors.ResponseError):
            await connection.patiently(call)
    assert calls == 1


async def test_waiting_for_redis_can_be_cancelled() -> None:
    """Nobody is held by an outage who wants to stop."""
    async with Connection("redis://localhost:1") as connection:
        waiting = asyncio.create_task(connection.patiently(connection.client.time))
        await wait_until_async(lambda: connection.lost)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@pytest.mark.parametrize("stop", ["cancel", "timeout"])
async def test_a_cancel_that_a_command_swallows_is_not_lost(stop: str) -> None:
    """redis-py sends through `asyncio.wait_for`, which in Python 3.11 returns the result of what
    has just ended in place of raising the cancel: a loop of commands would never end."""
    asked = asyncio.Event()

    async def command() -> str:
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "answer"
        raise AssertionError

    async with Connection("redis://localhost:1") as connection:
        if stop == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await connection.patiently(command)
            assert await connection.patiently(lambda: asyncio.sleep(0, "next")) == "next"
            return
        asking = asyncio.create_task(connection.patiently(command))
        await asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://user:secret@localhost:1/0", "Connection refused"),
        ("unix:///nowhere/v.sock", "No such file or directory"),
    ],
)
async def test_an_unreachable_redis_is_one_clear_line(url: str, reason: str) -> None:
    """The message names the URL without its password and the reason, in one line, at once."""
    async with Connection(url) as connection:
        with pytest.raises(RedisUnavailableError, match=reason) as caught:
            await asyncio.wait_for(connection.ping(), timeout=4)
    assert str(caught.value) == f"Redis at {safe_url(url)} can't be used: {reason}"


class Flushes:
    """A flush that records its batches and answers when it is allowed to."""

    def __init__(self, answer: Callable[[int], int | BaseException] = lambda item: -item) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.answer = answer

    async def __call__(self, items: list[int]) -> Sequence[int | BaseException]:
        self.batches.append(items)
        await self.gate.wait()
        return [self.answer(item) for item in items]


def _ask(coalescer: Coalescer[int, int], *items: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(_call(coalescer, item)) for item in items]


async def _call(coalescer: Coalescer[int, int], item: int) -> int:
    return await coalescer.submit(item)


async def test_callers_of_one_tick_share_a_flush_and_later_ones_the_next() -> None:
    """The first goes at once with all of its tick; what comes during a flush goes with the next."""
    flushes = Flushes()
    coalescer: Coalescer[int, int] = Coalescer(flushes)
    first = _ask(coalescer, 1, 2, 3)
    await wait_until_async(lambda: flushes.batches)
    later = [*_ask(coalescer, 4), *_ask(coalescer, 5)]
    await asyncio.sleep(0)
    assert flushes.batches == [[1, 2, 3]]
    flushes.gate.set()
    assert await asyncio.gather(*first, *later) == [-1, -2, -3, -4, -5]
    assert flushes.batches == [[1, 2, 3], [4, 5]]


async def test_a_lone_caller_waits_for_nobody() -> None:
    """An idle coalescer adds two ticks of the loop and no time."""
    flushes = Flushes()
    flushes.gate.set()
    coalescer: Coalescer[int, int] = Coalescer(flushes)
    assert await coalescer.submit(7) == -7
    assert await coalescer.submit(8) == -8
    assert flushes.batches == [[7], [8]]


async def test_no_flush_is_larger_than_max_batch() -> None:
    """More items than one flush may hold go in several, in the order they came."""
    flushes = Flushes()
    flushes.gate.set()
    coalescer: Coalescer[int, int] = Coalescer(flushes, max_batch=4)
    assert await asyncio.gather(*_ask(coalescer, *range(10))) == [-item for item in range(10)]
    assert flushes.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_a_crowd_is_served_in_groups_without_waiting_for_the_gap() -> None:
    """A group or a quarter of the crowd at a time, so that its first need not wait for its last."""
    flushes = Flushes()
    flushes.gate.set()
    coalescer: Coalescer[int, int] = Coalescer(flushes, gap=3600.0, group=4)
    assert await asyncio.gather(*_ask(coalescer, *range(36))) == [-item for item in range(36)]
    assert [len(batch) for batch in flushes.batches] == [9, 6, 5, 4, 4, 4, 4]
    assert [item for batch in flushes.batches for item in batch] == list(range(36))


async def test_on_a_slow_link_a_crowd_travels_together() -> None:
    """Its last would else wait for the round trips of all groups before it."""
    sizes: list[int] = []

    async def flush(items: list[int]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(0.02)
        return items

    coalescer = Coalescer(flush, group=4)
    for item in range(10):
        await coalescer.submit(item)
    await asyncio.gather(*_ask(coalescer, *range(100)))
    assert sizes[-1] == 100


async def test_as_many_flushes_run_together_as_allowed() -> None:
    """With concurrency 2 a second flush starts while the first is under way, a third doesn't."""
    flushes = Flushes()
    coalescer: Coalescer[int, int] = Coalescer(flushes, max_batch=2, concurrency=2)
    asked = _ask(coalescer, *range(6))
    await wait_until_async(lambda: len(flushes.batches) == 2)
    await asyncio.sleep(0)
    assert flushes.batches == [[0, 1], [2, 3]]
    flushes.gate.set()
    await asyncio.gather(*asked)
    assert flushes.batches == [[0, 1], [2, 3], [4, 5]]


async def test_an_error_belongs_to_its_own_item() -> None:
    """An exception among the answers is raised to one caller; the others get their answers."""
    flushes = Flushes(lambda item: ValueError("odd") if item % 2 else item)
    flushes.gate.set()
    coalescer: Coalescer[int, int] = Coalescer(flushes)
    answers = await asyncio.gather(*_ask(coalescer, 0, 1, 2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [int, ValueError, int]


async def test_a_failed_flush_fails_its_own_callers_only() -> None:
    """When a flush raises, all of its callers hear it, and the next flush is tried all the same."""
    batches = []

    async def flush(items: list[int]) -> list[int]:
        batches.append(items)
        if len(batches) == 1:
            raise OSError("gone")
        return items

    coalescer: Coalescer[int, int] = Coalescer(flush, max_batch=2)
    answers = await asyncio.gather(*_ask(coalescer, 1, 2, 3, 4), return_exceptions=True)
    assert [type(answer) for answer in answers] == [OSError, OSError, int, int]


async def test_a_flush_that_forgets_an_answer_is_an_error() -> None:
    """Answers are matched by position, so a missing one may not shift the others silently."""

    async def flush(items: list[int]) -> list[int]:
        return items[1:]

    coalescer: Coalescer[int, int] = Coalescer(flush)
    answers = await asyncio.gather(*_ask(coalescer, 1, 2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError, ValueError]


async def test_a_cancelled_caller_takes_nobody_along() -> None:
    """One caller cancelled in mid-flush, one still waiting: the others get their own answers."""
    flushes = Flushes()
    coalescer: Coalescer[int, int] = Coalescer(flushes)
    under_way = _ask(coalescer, 1, 2, 3)
    await wait_until_async(lambda: flushes.batches)
    waiting = _ask(coalescer, 4, 5, 6)
    await asyncio.sleep(0)
    under_way[1].cancel()
    waiting[1].cancel()
    await asyncio.sleep(0)
    flushes.gate.set()
    answers = await asyncio.gather(*under_way, *waiting, return_exceptions=True)
    assert [a for a in answers if isinstance(a, int)] == [-1, -3, -4, -6]
    assert [type(a) for a in answers].count(asyncio.CancelledError) == 2
    assert flushes.batches == [[1, 2, 3], [4, 6]]  # who was cancelled before the flush is left out


async def test_a_cancelled_flush_cancels_its_callers() -> None:
    """A flush cancelled from within leaves nobody waiting for ever."""

    async def flush(items: list[int]) -> list[int]:
        raise asyncio.CancelledError

    coalescer: Coalescer[int, int] = Coalescer(flush)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(coalescer.submit(1), timeout=5)
