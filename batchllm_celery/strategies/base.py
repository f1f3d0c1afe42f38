"""What a strategy is: how one kind of LLM call is made. Everything provider-specific is in one."""

from __future__ import annotations

import asyncio
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from batchllm_celery.errors import describe
from batchllm_celery.events import Events
from batchllm_celery.keys import Keys
from batchllm_celery.models import (
    NO_TOKENS,
    Completion,
    Failure,
    NativeRequest,
    Prompt,
    Request,
    RetryState,
    TokenUsage,
    TOutput,
)
from batchllm_celery.models.request import DialectName, text_of
from batchllm_celery.settings import Settings
from batchllm_celery.strategies.failures import charged
from batchllm_celery.strategies.usage import Reading, understand

if TYPE_CHECKING:
    from batchllm_celery.connection import Connection

logger = logging.getLogger("batchllm_celery")

#: Seconds that one strategy or client has for its `close`: a process must end when it is told to.
CLOSE_SECONDS = 10.0

T = TypeVar("T")

#: What `execute` may return: batch-llm's pair, or a `Completion` with metadata.
Answer: TypeAlias = Completion[TOutput] | tuple[TOutput, TokenUsage | Mapping[str, Any]]


@dataclass(slots=True)
class _Shared:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    value: Any = None
    close: Callable[[], Awaitable[None]] | None = None


@dataclass(slots=True)
class ProcessResources:
    """What the strategies of one process share. The registry hands it to each of them.

    Args:
        connection: the process's Redis; None without one.
        keys: names of our keys in Redis.
        settings: this process's settings, the only source of base URLs.
        slots: calls in flight at most; connection pools are sized to it.
        events: listeners of what happens.
    """

    connection: Connection | None = None
    keys: Keys = field(default_factory=Keys)
    settings: Settings = field(default_factory=Settings)
    slots: int = 100
    events: Events = field(default_factory=Events)
    _shared: dict[str, _Shared] = field(default_factory=dict, repr=False)

    async def shared(self, name: str, open_it: Callable[[], Awaitable[Opened[T]]]) -> T:
        """The process's one object called `name` (an SDK client, say), opened by the first caller.

        Strategies that differ only in their parameters thus share one connection pool.
        """
        entry = self._shared.setdefault(name, _Shared())
        async with entry.lock:
            if entry.close is None:
                opened = await open_it()
                entry.value, entry.close = opened.value, opened.close
        value: T = entry.value
        return value

    async def close(self) -> None:
        """Close what is shared, last opened first; a failing one does not stop the others."""
        while self._shared:
            name, entry = self._shared.popitem()
            if entry.close is not None:
                await close_quietly(name, entry.close)


@dataclass(frozen=True, slots=True)
class Opened(Generic[T]):
    """An object and how to close it."""

    value: T
    close: Callable[[], Awaitable[None]]


async def close_quietly(name: str, close: Callable[[], Awaitable[None]]) -> None:
    """Await `close()` for at most `CLOSE_SECONDS`; what it raises is logged, and goes no further.

    Raises:
        asyncio.CancelledError: when this task is cancelled.
    """
    task = asyncio.current_task()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await close()
    except BaseException as error:  # a `sys.exit()` in it would end the loop, and leave the rest
        if isinstance(error, GeneratorExit) or (task is not None and task.cancelling()):
            raise
        logger.warning("close_failed name=%s error=%s", name, type(error).__name__)


class LLMCallStrategy(ABC, Generic[TOutput]):
    """How one kind of LLM call is made. One instance serves all items of a process at once,
    so keep nothing of an item on `self`: that is what `state` is for.

    Life of an item: `prepare` (once per instance) -> for each attempt
    `execute`, and `on_error` if it raised -> `cleanup`. `close` comes once, when the process ends.

        class Shout(LLMCallStrategy[str]):
            async def execute(self, prompt, attempt, timeout, state=None):
                return prompt.upper(), {"input_tokens": len(prompt)}
    """

    #: The quota to draw on; None: the registration's, else PROVIDER:MODEL.
    quota: str | None = None
    #: `PROVIDER:MODEL`, the key of its price; None: no price is known.
    model_name: str | None = None
    #: Most tokens that one answer may have, for the limiter's estimate; None: not bounded.
    max_output_tokens: int | None = None
    #: Forms of prompts that `execute` takes: `str`, `Request`, `NativeRequest`. An item of another
    #: form is refused when it is submitted, or before its first call.
    accepts: tuple[type[Any], ...] = (str,)
    #: Whether input that the provider read from its cache counts towards tokens a minute.
    cached_input_counts: bool = True
    #: Whose rules count the tokens of images and files, for the limiter's estimate.
    dialect: DialectName = "openai"
    #: Set by the registry before `prepare`.
    resources: ProcessResources | None = None

    @property
    def full_speed(self) -> bool:
        """Whether calls start as fast as slots allow while no limits are set and no quota is named.
        True without a model name. Otherwise the rate starts low and grows."""
        return self.model_name is None

    def refusal(self, prompt: Prompt) -> str | None:
        """Why this prompt can't be sent; None where it can. Asked where an item is submitted, if
        the strategy is registered there, and before its first call; it makes no call itself."""
        return unsupported(self, prompt)

    async def prepare(self) -> None:
        """Open what all calls share: once per instance; after a failure the next item retries."""

    @abstractmethod
    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Answer[TOutput]:
        """Make one call and return `(output, usage)` or a `Completion`.

        Args:
            prompt: the item's text; a `Request` or a `NativeRequest` where `accepts` has these.
            attempt: 1 for the first; a refusal (429) does not count.
            timeout: seconds that this attempt has; the runner cancels it after that.
            state: what earlier attempts at this item left behind.

        Raises:
            ProviderError: with the kind of failure and the tokens spent all the same. Any other
                exception is classified by `classify` and the general rules.
        """

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Learn from a failed attempt (feed the error back through `state`, change the model).

        It has the seconds of an attempt, and is cancelled after that.
        """

    async def cleanup(self) -> None:
        """After every item, also when `prepare` failed. Must leave what the others use alone.

        It has the seconds of an attempt, and is cancelled after that: the answer waits for it.
        """

    async def close(self) -> None:
        """Once, when the process ends; also after a failed `prepare`. Has `CLOSE_SECONDS`."""

    async def dry_run(self, prompt: Any) -> Answer[Any]:
        """Stands in for `execute` in a rehearsal: no provider is called."""
        output = f"[DRY-RUN] Mock output for prompt: {text_of(prompt)[:50]}..."
        return output, TokenUsage(input_tokens=100, output_tokens=50, total_tokens=150)

    def models(self) -> tuple[str, ...]:
        """Every `PROVIDER:MODEL` that a call may use; default: `model_name`, if it is set."""
        return () if self.model_name is None else (self.model_name,)

    def classify(self, exception: BaseException) -> Failure | None:
        """Say why an attempt failed; None leaves it to the general rules (`failures.classify`)."""
        return None


def as_completion(answer: Any) -> Completion[Any]:
    """What `execute` returned, as a `Completion`: the only shape that the code after it handles.

    A usage may be a mapping or an object of any known SDK. Impossible figures become the
    nearest possible one.

    Raises:
        TypeError: for an answer that is neither a `Completion` nor an `(output, usage)` pair, a
            usage without tokens, metadata that is no mapping, or for what fails when it is looked
            at. The error carries the tokens.
    """
    try:
        return _completion(answer)
    except TypeError:
        raise
    except Exception as error:  # else the call would be taken for failed, and paid again
        raise TypeError(f"execute() returned what can't be read: {describe(error)}") from error


def _completion(answer: Any) -> Completion[Any]:
    given = answer if isinstance(answer, Completion) else None
    if given is not None:
        output, usage, metadata = given.output, given.usage, given.metadata
    elif isinstance(answer, tuple) and len(answer) == 2:
        (output, usage), metadata = answer, {}
    elif inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError("execute() returned an awaitable: an `await` is missing before its answer")
    else:
        raise TypeError(
            f"execute() must return (output, usage) or a Completion, not {type(answer).__name__}"
        )
    reading = usage_in(usage)
    if reading is None:
        raise TypeError(f"no tokens can be read from a usage of type {type(usage).__name__}")
    with charged(reading.usage):
        notes = _metadata(metadata)
    if reading.guessed:
        notes = {**notes, "usage_guessed": True}
    if given is None:
        return Completion(output, reading.usage, notes)
    if given.usage is reading.usage and given.metadata is notes:
        return given
    return replace(given, usage=reading.usage, metadata=notes)


_FORMS: dict[type[Any], str] = {
    str: "texts",
    Request: "a Request",
    NativeRequest: "a NativeRequest",
}


def unsupported(strategy: LLMCallStrategy[Any], prompt: Prompt) -> str | None:
    """Why a strategy can't take this prompt; None where it can."""
    if isinstance(prompt, strategy.accepts):
        return None
    taken = " or ".join(_FORMS.get(form, form.__name__) for form in strategy.accepts)
    return f"unsupported: {type(strategy).__name__} takes {taken}, not a {type(prompt).__name__}"


def usage_in(usage: Any) -> Reading | None:
    """The tokens of a usage; none for None and for an empty mapping. None: it is no usage."""
    if usage is None or (isinstance(usage, Mapping) and not usage):
        return Reading(NO_TOKENS)
    return understand(usage)


def _metadata(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"metadata must be a mapping, not {type(given).__name__}")
    # A plain dict: what reads it later must not meet a mapping's own code.
    return {name if type(name) is str else str(name): value for name, value in given.items()}
