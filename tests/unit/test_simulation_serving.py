"""The simulated server's room and speed, and what its headers say: in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from batchllm_celery.dialects.headers import rate_limits_of
from batchllm_celery.simulation.config import SimulationConfig
from batchllm_celery.simulation.journal import Call
from batchllm_celery.simulation.provider import Provider
from batchllm_celery.simulation.replies import GenerateRequest
from tests.virtual_loop import VirtualLoop, virtual_provider

T = TypeVar("T")


def in_virtual_time(act: Callable[[Provider], Awaitable[T]], **settings: Any) -> T:
    async def main() -> T:
        return await act(virtual_provider(SimulationConfig(**settings)))

    return VirtualLoop().run(main())


async def ask(provider: Provider, prompt: str = "x") -> Call:
    call, _ = await provider.answer("openai", GenerateRequest("m", prompt))
    return call


def took(call: Call) -> float:
    assert call.finished is not None
    return round(call.finished - call.time, 6)


@pytest.mark.parametrize("status", [503, 529])
def test_calls_beyond_its_room_are_refused_at_once(status: int) -> None:
    """Five calls at a server with room for three; when they are answered there is room again."""

    async def act(provider: Provider) -> list[Call]:
        calls = await asyncio.gather(*(ask(provider, str(n)) for n in range(5)))
        return [*calls, await ask(provider)]

    calls = in_virtual_time(act, refuse_beyond=3, overload_status=status, latency=1.0)
    assert [call.status for call in calls] == [200, 200, 200, status, status, 200]
    assert [took(call) for call in calls] == [1, 1, 1, 0, 0, 1]


def test_its_room_changes_in_mid_run() -> None:
    """Calls in flight stay; what comes now meets the new bound."""

    async def act(provider: Provider) -> list[int]:
        first = [asyncio.ensure_future(ask(provider)) for _ in range(3)]
        await asyncio.sleep(0.5)
        provider.change(refuse_beyond=2)
        refused = await ask(provider)
        return [*(call.status for call in await asyncio.gather(*first)), refused.status]

    assert in_virtual_time(act, refuse_beyond=3, latency=1.0) == [200, 200, 200, 503]


def test_calls_that_decode_together_slow_each_other_down() -> None:
    """Alone a token takes 10 ms, beside three others 10 % more for each; a fifth call queues."""

    async def act(provider: Provider) -> list[float]:
        alone = await ask(provider)
        together = await asyncio.gather(*(ask(provider, str(n)) for n in range(5)))
        return [took(call) for call in (alone, *together)]

    times = in_virtual_time(
        act, decode_slots=4, decode_seconds=0.01, decode_slowdown=0.1, output_tokens=95
    )
    assert times == [1.0, 1.3, 1.3, 1.3, 1.3, 2.3]


def test_beyond_its_queue_it_has_no_room_and_who_hangs_up_makes_room() -> None:
    """One decodes, one queues, the third is refused; after the first has gone the next begins."""

    async def act(provider: Provider) -> tuple[int, float]:
        first, second = (asyncio.ensure_future(ask(provider, str(n))) for n in range(2))
        await asyncio.sleep(0.5)
        refused = await ask(provider, "third")
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        return refused.status, took(await second)

    settings = {"decode_slots": 1, "decode_queue": 1, "decode_seconds": 0.01, "output_tokens": 95}
    assert in_virtual_time(act, **settings) == (503, 1.5)


def test_a_long_prompt_takes_longer() -> None:
    """Reading and writing have a time each; in a decoding server reading takes the slot's time."""

    async def act(provider: Provider) -> list[float]:
        return [took(await ask(provider, "x" * length)) for length in (400, 40_000)]

    plain = {"latency": 0.1, "input_seconds": 0.5, "output_seconds": 10.0, "output_tokens": 100}
    assert in_virtual_time(act, **plain) == [1.15, 6.1]
    decoding = {"decode_slots": 2, "input_seconds": 0.5, "output_tokens": 95}
    assert in_virtual_time(act, **decoding) == [2.05, 7.0]


def test_a_burst_refuses_its_share() -> None:
    """Every 100 s there is no room for half of the calls, for 20 s."""

    async def act(provider: Provider) -> dict[bool, list[int]]:
        seen: dict[bool, list[int]] = {True: [], False: []}
        for number in range(1000):
            call = await ask(provider, str(number % 10))
            seen[number % 100 >= 80].append(call.status)
            await asyncio.sleep(1.0)
        return seen

    seen = in_virtual_time(act, burst_every=100.0, burst_share=0.5, overload_status=529)
    assert set(seen[False]) == {200}
    assert 70 <= seen[True].count(529) <= 130


def test_lengths_of_answers_keep_their_mean() -> None:
    """Log-normal lengths: a long tail, and the same mean."""

    async def act(provider: Provider) -> list[int]:
        return [(await ask(provider, str(number))).output_tokens for number in range(4000)]

    lengths = in_virtual_time(act, output_tokens=300, output_tail=0.8)
    assert 285 <= sum(lengths) / len(lengths) <= 315
    assert max(lengths) > 2000 > 50 > min(lengths)


@pytest.mark.parametrize("form", ["openai", "anthropic"])
@pytest.mark.parametrize("window", ["bucket", "sliding"])
def test_headers_tell_the_limits_as_the_providers_do(form: str, window: str) -> None:
    """What the worker reads from them: limits a minute, what is left, and when all of it is."""

    async def act(provider: Provider) -> Call:
        for number in range(59):
            await ask(provider, str(number))
        return await ask(provider, "last")

    call = in_virtual_time(
        act, rpm=600, tpm=60_000, output_tokens=99, rate_limit_headers=form, window=window
    )
    limits = rate_limits_of(
        {**call.headers, "date": "Fri, 15 Jan 2027 08:00:00 GMT"}  # the virtual clock's beginning
    )
    assert limits is not None
    assert limits.requests is not None
    assert limits.tokens is not None
    assert (limits.requests.limit, limits.tokens.limit) == (600, 60_000)
    assert limits.requests.remaining == 540
    assert limits.tokens.remaining == 54_000
    if window == "bucket":
        assert limits.requests.window_seconds() == 60


def test_other_users_of_the_key_take_their_share() -> None:
    """30 % of the rate are gone when we come back, as far as the bucket held them."""

    async def act(provider: Provider) -> list[str]:
        left = []
        for pause in (0.0, 10.0, 0.0):
            await asyncio.sleep(pause)
            call = await ask(provider)
            left.append(call.headers["x-ratelimit-remaining-requests"])
        return left

    settings: dict[str, Any] = {"rpm": 600, "rate_limit_headers": "openai", "other_users": 0.3}
    assert in_virtual_time(act, **settings) == ["599", "599", "598"]
    sliding = in_virtual_time(act, **settings, window="sliding")
    assert sliding == ["599", "568", "567"]
