"""What user code returns, raises and does, call by call; and what must come of it."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import decimal
import random
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import redis

from batchllm_celery import Completion, FailureKind, LLMCallStrategy, ProviderError, RetryState
from batchllm_celery.errors import (
    BatchNotFoundError,
    QuotaUnavailableError,
    RedisUnavailableError,
    TokenTrackingError,
    UsageError,
)
from batchllm_celery.models import TokenUsage
from tests.boundary import odd

#: Stands in every prompt; no log may hold it.
PROMPT = "the-prompt-nobody-logs"
#: The value of an API key in use; neither a log nor a result may hold it.
KEY = "hush-4711-our-own-key"

#: Kinds that stop a batch: they would end the case's neighbours, and have tests of their own.
STOPPING = {FailureKind.AUTHENTICATION, FailureKind.BILLING}
KINDS = [kind for kind in FailureKind if kind not in STOPPING]


@dataclass
class Step:
    """What one call does.

    `tokens`: what it reports in a way that must be understood; None where that is open.
    `success`: whether it is an answer; None where that is open.
    `output`: the answer as the result must hold it; `...` where that is open.
    `last`: whether no call follows it.
    """

    name: str
    act: Callable[[], Awaitable[Any]]
    tokens: int | None = None
    success: bool | None = None
    output: Any = ...
    last: bool = False


@dataclass
class Case:
    number: int
    steps: list[Step]
    calls: int = 0
    odd_hooks: Callable[[], Any] | None = None

    @property
    def taken(self) -> list[Step]:
        """The steps that its calls took."""
        last = len(self.steps) - 1
        return [self.steps[min(n, last)] for n in range(self.calls)]


cases: dict[int, Case] = {}
#: Names of steps, and how often they were taken.
seen: defaultdict[str, int] = defaultdict(int)


def case(number: int, seed: int) -> Case:
    rng = random.Random(f"strategies {seed} {number}")
    steps = [_step(rng) for _ in range(rng.choice([1, 1, 1, 2, 3, 5]))]
    hooks = rng.choice(_RAISED)(rng) if rng.random() < 0.1 else None
    return Case(number, steps, odd_hooks=None if hooks is None else lambda: _raise(hooks))


class Boundary(LLMCallStrategy[Any]):
    """Does what the case says that its prompt names."""

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        found = cases[int(prompt.split()[0])]
        found.calls += 1
        step = found.taken[-1]
        seen[step.name] += 1
        if state is not None and found.number % 7 == 0:
            state.set("kept", [found.calls] * 3)
        if state is not None and found.number % 50 == 0:
            state.set("kept", object())
        try:
            return await step.act()
        except BaseException as error:
            if found.odd_hooks is not None:
                with contextlib.suppress(BaseException):
                    error.hooks = found.odd_hooks  # type: ignore[attr-defined]
            raise

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        _hooks_of(exception)()

    def classify(self, exception: BaseException) -> Any:
        _hooks_of(exception)()
        return None


def _hooks_of(exception: BaseException) -> Callable[[], Any]:
    found = getattr(exception, "__dict__", {}).get("hooks")
    return found if callable(found) else lambda: None


def _raise(error: Any) -> Any:
    raise error


def _step(rng: random.Random) -> Step:
    return rng.choices([_returned, _raised, _done], weights=[6, 5, 2])[0](rng)


# -- returns


def _returned(rng: random.Random) -> Step:
    usage, tokens = rng.choice(_USAGES)(rng)
    usable = tokens is not None
    open_ = usable and tokens == _OPEN
    if rng.random() < 0.5:
        output, known = odd.plain(rng), True
    else:
        output, known = odd.value(rng), False
    metadata, fine = rng.choice(_METADATA)(rng)
    form = rng.randint(0, 9)
    if form <= 3:
        answer: Any = Completion(output, usage, metadata)
    elif form <= 7:
        answer, fine = (output, usage), True
    else:
        answer = rng.choice(_NO_ANSWERS)(rng)
        return Step(f"returns {type(answer).__name__}", _gives(answer), 0, False, last=True)
    success: bool | None = None
    if not usable or fine is False:
        success = False
    elif known and fine and not open_:
        success = True
    name = f"returns {type(output).__name__}, {type(usage).__name__}, {type(metadata).__name__}"
    shown = output if success and known else ...
    return Step(name, _gives(answer), None if open_ else tokens or 0, success, shown, last=True)


def _gives(answer: Any) -> Callable[[], Awaitable[Any]]:
    async def act() -> Any:
        return answer

    return act


def _named(rng: random.Random) -> tuple[Any, int]:
    names = rng.choice(
        [
            ("input_tokens", "output_tokens"),
            ("prompt_tokens", "completion_tokens"),
            ("inputTokens", "outputTokens"),
            ("prompt_token_count", "candidates_token_count"),
            ("promptTokenCount", "candidatesTokenCount"),
        ]
    )
    inputs, outputs = rng.randint(0, 5000), rng.randint(0, 5000)
    found: dict[str, Any] = {names[0]: inputs, names[1]: outputs}
    form = rng.randint(0, 4)
    if form == 1:
        found = {name: str(value) for name, value in found.items()}
    if form == 2:
        found = {name: float(value) for name, value in found.items()}
    wrap = rng.choice(["", "", "usage", "usage_metadata", "meta"])
    shaped: Any = SimpleNamespace(**found) if rng.random() < 0.5 else found
    if wrap:
        shaped = SimpleNamespace(**{wrap: shaped}) if rng.random() < 0.5 else {wrap: shaped}
    return shaped, inputs + outputs


#: In place of tokens: whatever comes of it will do.
_OPEN = -1

_NUMBERS: list[Any] = [
    *(-1, 10**12, 10**400, -(10**400), float("nan"), float("inf"), "7", "many", None, [], {}),
    *(True, decimal.Decimal("5"), decimal.Decimal("NaN"), decimal.Decimal("sNaN"), Fraction(9, 2)),
    *(1e300, "1e999", b"5", 2 + 1j, odd.Number(4), "9" * 5000),
]


def _odd_numbers(rng: random.Random) -> tuple[Any, int]:
    names = ["input_tokens", "output_tokens", "total_tokens", "cached_input_tokens"]
    return {name: rng.choice(_NUMBERS) for name in rng.sample(names, rng.randint(1, 4))}, _OPEN


def _whole(rng: random.Random) -> tuple[Any, int]:
    inputs, outputs = rng.randint(0, 999), rng.randint(0, 999)
    usage = TokenUsage(input_tokens=inputs, output_tokens=outputs)
    return usage, inputs + outputs


_USAGES: list[Callable[[random.Random], tuple[Any, int | None]]] = [
    _named,
    _named,
    _whole,
    _odd_numbers,
    lambda rng: (None, 0),
    lambda rng: ({}, 0),
    lambda rng: (rng.choice(["5", 17, 1.5, [1], {1}, b"x", ("a", "b")]), None),
    lambda rng: (odd.value(rng), _OPEN),
    lambda rng: (rng.choice([odd.Hostile, odd.Leaving, odd.Endless, MagicMock])(), _OPEN),
    lambda rng: (odd.BadMapping(rng.choice([RuntimeError, SystemExit])), _OPEN),
    lambda rng: (lambda: {"input_tokens": 5}, 5),
    lambda rng: (lambda: _raise(rng.choice([ValueError, SystemExit])("no")), _OPEN),
    lambda rng: (
        TokenUsage.model_construct(
            input_tokens=rng.choice(_NUMBERS), output_tokens=rng.choice(_NUMBERS), total_tokens=1
        ),
        _OPEN,
    ),
]
_METADATA: list[Callable[[random.Random], tuple[Any, bool | None]]] = [
    lambda rng: ({}, True),
    lambda rng: (None, True),
    lambda rng: ({"finish_reason": "stop", "model": odd.plain(rng)}, True),
    lambda rng: ({"model": odd.value(rng)}, None),
    lambda rng: ({"a": odd.value(rng)}, None),
    lambda rng: ({odd.odd_text(rng): odd.odd_text(rng)}, None),
    lambda rng: ({rng.choice([1, None, (1, 2)]): 2}, None),
    lambda rng: (rng.choice(["stop", [1], 5, {1}]), False),
    lambda rng: (odd.BadMapping(rng.choice([RuntimeError, SystemExit])), None),
    lambda rng: (odd.value(rng), None),
]


async def _nothing() -> None:
    pass


class _Sub(Completion[Any]):
    @property
    def usage(self) -> Any:
        raise RuntimeError("no usage")

    @usage.setter
    def usage(self, value: Any) -> None:
        pass


_NO_ANSWERS: list[Callable[[random.Random], Any]] = [
    lambda rng: None,
    lambda rng: "a bare answer",
    lambda rng: ["x", {"input_tokens": 1}],
    lambda rng: ("x", {"input_tokens": 1}, {}),
    lambda rng: (),
    lambda rng: _nothing(),
    lambda rng: rng.choice([odd.Hostile, odd.Leaving, odd.Endless])(),
    lambda rng: Completion,
    lambda rng: (n for n in [1]),
]


# -- raises


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class Sly(Exception):
    @property
    def status_code(self) -> Any:
        raise SystemExit(3)


class Own(BaseException):
    pass


def _worded(rng: random.Random) -> str:
    return rng.choice(
        [
            "",
            "it failed",
            f"the row said: {PROMPT}",
            f"the key is {KEY}",
            odd.ESC,
            "\ud800",
            "429 rate limit",
            "503 overloaded",
            "time out",
            "x" * 500_000,
            "quota " * 100_000,
            odd.odd_text(rng),
        ]
    )


_USAGE = {"input_tokens": 3, "output_tokens": 2}


def _provider_error(rng: random.Random) -> tuple[BaseException, int | None]:
    kind = rng.choice([*KINDS, *KINDS, *(k.value for k in KINDS), "typo", None, 5, object()])
    usage, tokens = rng.choice([(_USAGE, 5), (None, 0), (odd.value(rng), None)])
    status = rng.choice([None, 400, 404, 413, 422, 429, 500, 503, 529, 599, 0, -1, "429", 1.5])
    wait = rng.choice([None, None, 0, 0.01, -5, float("nan"), "soon", "0.01", object()])
    error = ProviderError(
        _worded(rng),
        kind=kind,  # type: ignore[arg-type]
        status=status,  # type: ignore[arg-type]
        retry_after=wait,  # type: ignore[arg-type]
        usage=usage,
        error_type=rng.choice([None, "Named", "", 5, PROMPT[:0] + "\x1b[31m"]),  # type: ignore[arg-type]
    )
    return error, tokens


def _with_attributes(rng: random.Random) -> tuple[BaseException, int | None]:
    error = rng.choice([RuntimeError, ValueError, OSError, KeyError])(_worded(rng))
    usage, tokens = rng.choice([(_USAGE, 5), (SimpleNamespace(**_USAGE), 5), (None, 0)])
    values = {
        "usage": usage,
        "status_code": rng.choice([429, 503, 418, 0, "429", None, odd.value(rng)]),
        "code": rng.choice([None, 5, "x", lambda: 1, odd.value(rng)]),
        "response": rng.choice([None, odd.value(rng), SimpleNamespace(headers=odd.value(rng))]),
        "__cause__": rng.choice([None, ValueError(_worded(rng))]),
    }
    # (What it can't look at costs it the tokens: they may be behind the same fault.)
    for name, value in values.items():
        with contextlib.suppress(TypeError):
            setattr(error, name, value)
    return error, tokens


def _builtin(rng: random.Random) -> tuple[BaseException, int | None]:
    names = [
        name
        for name, value in vars(builtins).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, UnicodeError | BaseExceptionGroup | Warning)
    ]
    return getattr(builtins, rng.choice(sorted(names)))(_worded(rng)), 0


def _of_ours(rng: random.Random) -> tuple[BaseException, int | None]:
    found: list[BaseException] = [
        UsageError(_worded(rng)),
        BatchNotFoundError(_worded(rng)),
        RedisUnavailableError(_worded(rng)),
        redis.ConnectionError(_worded(rng)),
        redis.ResponseError("NOPERM no"),
        QuotaUnavailableError("q", 0.0),
        TimeoutError(),
        asyncio.QueueEmpty(),
    ]
    return rng.choice(found), 0


def _tracking(rng: random.Random) -> tuple[BaseException, int | None]:
    error = TokenTrackingError("x", _USAGE)
    error.__cause__ = rng.choice([None, ValueError("y"), error])
    return error, None


def _group(rng: random.Random) -> tuple[BaseException, int | None]:
    inner = [rng.choice(_RAISED[:4])(rng) for _ in range(rng.randint(1, 3))]
    found: BaseException = BaseExceptionGroup(_worded(rng), inner)
    for _ in range(rng.choice([0, 1, 8])):
        found = BaseExceptionGroup("deeper", [found])
    return found, None


def _circular(rng: random.Random) -> tuple[BaseException, int | None]:
    first, second = ValueError(_worded(rng)), RuntimeError(_worded(rng))
    first.__cause__, second.__cause__ = second, first
    return first, 0


_ERRORS: list[Callable[[random.Random], tuple[BaseException, int | None]]] = [
    _provider_error,
    _provider_error,
    _provider_error,
    _with_attributes,
    _builtin,
    _of_ours,
    _tracking,
    _group,
    _circular,
    lambda rng: (rng.choice([Mute(), Sly()]), None),
    lambda rng: (rng.choice([Own, SystemExit, KeyboardInterrupt, GeneratorExit])("go"), 0),
    lambda rng: (asyncio.CancelledError(), 0),
]
_RAISED: list[Callable[[random.Random], BaseException]] = [
    lambda rng: ValueError(_worded(rng)),
    lambda rng: ProviderError(_worded(rng), kind=FailureKind.OVERLOADED),
    lambda rng: Mute(),
    lambda rng: TimeoutError(_worded(rng)),
    lambda rng: SystemExit(3),
    lambda rng: Own(_worded(rng)),
    lambda rng: redis.ConnectionError("away"),
    lambda rng: asyncio.CancelledError(),
    lambda rng: GeneratorExit(),
]


def _raised(rng: random.Random) -> Step:
    error, tokens = rng.choice(_ERRORS)(rng)

    async def act() -> Any:
        raise error

    said = f" {error.kind}" if isinstance(error, ProviderError) else ""
    name = f"raises {type(error).__name__}{said[:30] if isinstance(said, str) else ''}"
    return Step(name, act, tokens, False)


# -- other deeds


async def _hang() -> Any:
    await asyncio.sleep(3600)


async def _hang_on() -> Any:
    """Does not go at once when it is cancelled."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        await asyncio.sleep(0.01)
        raise


async def _answers_late() -> Any:
    """Swallows the cancellation of its time limit."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        return "late", _USAGE


async def _fails_late() -> Any:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        raise ValueError("another one") from None


async def _cancels_itself() -> Any:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    return "x", _USAGE


async def _cancelled_child() -> Any:
    child = asyncio.ensure_future(asyncio.sleep(3600))
    child.cancel()
    return await child


async def _exits_in_a_task() -> Any:
    async def leave() -> None:
        sys.exit(3)

    child = asyncio.ensure_future(leave())
    await asyncio.sleep(0.001)
    del child
    return "left", _USAGE


async def _blocks() -> Any:
    time.sleep(0.005)  # on purpose
    return "blocked", _USAGE


async def _in_a_thread() -> Any:
    return await asyncio.to_thread(lambda: _raise(SystemExit(3)))


async def _own_limit() -> Any:
    async with asyncio.timeout(0.001):
        await asyncio.sleep(3600)


async def _task_group() -> Any:
    async with asyncio.TaskGroup() as group:
        group.create_task(_cancelled_child())
        group.create_task(_own_limit())


async def _uncancels() -> Any:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.uncancel()
    return "stayed", _USAGE


async def _closes_the_loop() -> Any:
    asyncio.get_running_loop().close()


async def _stops_the_loop() -> Any:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0)
    return "stopped", _USAGE


_DEEDS: list[tuple[Callable[[], Awaitable[Any]], int | None, bool | None]] = [
    (_hang, 0, False),
    (_hang_on, 0, False),
    (_answers_late, None, None),
    (_fails_late, None, False),
    (_cancels_itself, None, None),
    (_cancelled_child, 0, False),
    (_exits_in_a_task, None, None),
    (_blocks, 5, True),
    (_in_a_thread, None, False),
    (_own_limit, 0, False),
    (_task_group, None, False),
    (_uncancels, 5, True),
    (_closes_the_loop, 0, False),
    (_stops_the_loop, None, None),
]


def _done(rng: random.Random) -> Step:
    act, tokens, success = rng.choice(_DEEDS)
    return Step(act.__name__.strip("_").replace("_", " "), act, tokens, success)


class Good(LLMCallStrategy[Any]):
    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        return "good", _USAGE
