"""Names for strategies, and the one instance of each that a process holds.

catalog    name -> factory; filled by `@strategy` when a module is imported, and by `providers`
Registry   (name, parameters) -> instance, prepared once, closed once
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar, overload

from batchllm_celery.errors import (
    StrategyNotFoundError,
    StrategyParametersError,
    UsageError,
    describe,
)
from batchllm_celery.events import StrategyPrepared
from batchllm_celery.models import StrategySpec, TOutput
from batchllm_celery.models.names import as_label, check_label
from batchllm_celery.redaction import keep_secrets_of
from batchllm_celery.strategies.base import LLMCallStrategy, ProcessResources, close_quietly
from batchllm_celery.strategies.failures import log_bug
from batchllm_celery.strategies.registered import RegisteredStrategy, parameters_of

#: Number of strategies built from names that a process keeps open. A fleet has a handful, but each
#: item may have its own parameters, so idle ones above this number are closed.
MOST_KEPT = 200

Factory: TypeAlias = Callable[..., LLMCallStrategy[Any]]
P = ParamSpec("P")
Class = TypeVar("Class", bound=type[LLMCallStrategy[Any]])


@dataclass(frozen=True, slots=True)
class Registration:
    """One name: how to build it, what it draws on."""

    name: str
    factory: Factory
    quota: str | None = None
    provider: str | None = None
    """Built-ins: the PROVIDER of `PROVIDER:MODEL`; the model is the parameter `model`. Empty where
    that parameter names both."""

    def model_for(self, spec: StrategySpec) -> str | None:
        """`PROVIDER:MODEL` of a built-in; None where only the instance knows."""
        if self.provider is None:
            return None
        model = str(spec.params.get("model", ""))
        return ":".join(part for part in (self.provider, model) if part) or None

    def quota_for(self, spec: StrategySpec) -> str | None:
        """The quota's name as far as it is known without building the strategy."""
        return self.quota or self.model_for(spec)

    def build(self, spec: StrategySpec) -> LLMCallStrategy[Any]:
        """Call the factory.

        Raises:
            StrategyParametersError: for parameters it does not take.
            UsageError: for a factory that fails, or an answer that is
                not a strategy.
        """
        try:
            inspect.signature(self.factory).bind(**spec.params)
        except TypeError as error:
            raise StrategyParametersError(
                f"strategy {self.name!r}: {error}; it takes {parameters_of(self.factory)}"
            ) from error
        keep_secrets_of(spec.params)
        try:
            built = self.factory(**spec.params)
        except UsageError:
            raise
        except Exception as error:  # a setting is missing, say: no other item fares better
            log_bug("strategy.factory_failed", error, strategy=self.name)
            raise UsageError(
                f"strategy {self.name!r}: its factory failed: {describe(error)}"
            ) from error
        if not isinstance(built, LLMCallStrategy):
            raise UsageError(
                f"strategy {self.name!r}: its factory returned {type(built).__name__}, "
                f"not an LLMCallStrategy"
            )
        _check_async(self.name, built)
        return built


def _check_async(name: str, strategy: Any) -> None:
    """Refuse a blocking `execute` once, before every item fails for it."""
    execute = getattr(strategy, "execute", None)
    if not (inspect.iscoroutinefunction(execute) or asyncio.iscoroutinefunction(execute)):
        raise UsageError(
            f"strategy {name!r}: its execute() must be `async def`; "
            f"run blocking code by `await asyncio.to_thread(...)`"
        )


class StrategyCatalog:
    """Registered names. The module-level `catalog` is the one that `@strategy` fills.

    Args:
        builtins: module whose `builtin_registrations()` are added before the first use.
    """

    def __init__(self, builtins: str | None = None) -> None:
        self._builtins = builtins
        self.listeners: list[Callable[[Registration], None]] = []
        """Told of each name that is registered from then on."""
        self._registrations: dict[str, Registration] = {}

    @property
    def _known(self) -> dict[str, Registration]:
        builtins = self._builtins
        if builtins is not None:
            # Threads may get here at once, as a worker's and its event loop's do. Each adds the
            # same names, and none may see the catalog without them.
            for registration in importlib.import_module(builtins).builtin_registrations():
                self._registrations.setdefault(registration.name, registration)
            self._builtins = None
        return self._registrations

    def register(self, registration: Registration) -> None:
        """Add a name; importing its module again replaces it.

        Raises:
            UsageError: for a name or a quota that can't be one, or if another factory has the name.
        """
        check_label(registration.name, "strategy name")
        if registration.quota is not None:
            check_label(registration.quota, "quota name")
        known = self._known.get(registration.name)
        if known is not None and not _same_code(known.factory, registration.factory):
            raise UsageError(
                f"strategy {registration.name!r} is already registered by "
                f"{known.factory.__module__}.{known.factory.__qualname__}; choose another name"
            )
        self._known[registration.name] = registration
        for listen in self.listeners:
            listen(registration)

    def lookup(self, name: str) -> Registration:
        """The registration of `name`.

        Raises:
            StrategyNotFoundError: naming those that are known.
        """
        try:
            return self._known[name]
        except KeyError:
            raise StrategyNotFoundError(
                f"no strategy {name!r} is registered here; known are {', '.join(sorted(self))}. "
                f"Import the module that registers it with --app MODULE (or BATCHLLM_APP)."
            ) from None

    @contextlib.contextmanager
    def replaced(self, registration: Registration) -> Iterator[None]:
        """Another registration under a known name, inside the block: for tests."""
        known = self.lookup(registration.name)
        self._known[registration.name] = registration
        try:
            yield
        finally:
            self._known[registration.name] = known

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._known))

    def __contains__(self, name: object) -> bool:
        return name in self._known


def _same_code(one: Factory, other: Factory) -> bool:
    # `python app.py` and an import of `app` are the same source under two module names.
    return (
        one.__qualname__ == other.__qualname__
        and inspect.getmodule(one) is not None
        and _file(one) == _file(other)
    )


def _file(factory: Factory) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:
        return None


catalog = StrategyCatalog(builtins="batchllm_celery.providers")


class _Register(Protocol):
    """What `strategy(...)` returns. A class stays what it is: it may be subclassed."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a class is a callable too: it comes first
        self, factory: Class, /
    ) -> Class: ...
    @overload
    def __call__(
        self, factory: Callable[P, LLMCallStrategy[TOutput]], /
    ) -> RegisteredStrategy[P, TOutput]: ...


def strategy(name: str, *, quota: str | None = None) -> _Register:
    """Register a factory (a function or a strategy class) under a name that items can carry.

        @strategy("summarise", quota="gemini")
        def summarise(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
            return GeminiStrategy(model=model)

    A function becomes a `RegisteredStrategy`, which calls it as before, and to which work can be
    sent: `summarise.submit(texts)`. A class stays as it is.

    Args:
        name: what `submit(strategy=...)` and `--strategy` say. Workers import the same module.
        quota: the quota its calls draw on; None: PROVIDER:MODEL of the strategy.

    Raises:
        UsageError: for a name or a quota that can't be one, if another factory has the name, for
            what is no factory, or if the class has an `execute` that is not async.
    """
    check_label(name, "strategy name")
    if name == "run_items":
        raise UsageError("a strategy can't be called run_items: a task of ours has that name")
    if quota is not None:
        check_label(quota, "quota name")

    def register(factory: Any) -> Any:
        _check_factory(name, factory)
        catalog.register(Registration(name, factory, quota))
        return factory if inspect.isclass(factory) else RegisteredStrategy(name, factory)

    return register


def _check_factory(name: str, factory: Any) -> None:
    if isinstance(factory, LLMCallStrategy):
        raise UsageError(
            f"strategy {name!r}: register what builds it, a function or a class, not an instance: "
            f"each worker process builds its own"
        )
    if not callable(factory):
        raise UsageError(f"strategy {name!r}: a {type(factory).__name__} is no factory")
    if inspect.isclass(factory):
        _check_async(name, factory)
    elif inspect.iscoroutinefunction(factory) or inspect.isasyncgenfunction(factory):
        raise UsageError(
            f"strategy {name!r}: its factory must be a plain `def` that returns a strategy; "
            f"what has to be awaited belongs into the strategy's prepare()"
        )


@dataclass(slots=True)
class _Held:
    """An instance with its preparation. Holding the reference keeps its `id` unique."""

    strategy: LLMCallStrategy[Any]
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    begun: bool = False
    prepared: bool = False
    users: int = 0


class _Using:
    """A class, not a generator: thousands are entered at once, and each generator takes 0.5 kB."""

    __slots__ = ("_held",)

    def __init__(self, held: _Held) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held.users += 1

    def __exit__(self, *_: object) -> None:
        self._held.users -= 1


class Registry:
    """The strategies of one process.

    Not thread-safe: all calls come from the process's one event loop.

    Args:
        resources: handed to every strategy before its `prepare`.
        catalog: the names it knows.
        most_kept: instances built from names that stay open; see `close_surplus`.
    """

    def __init__(
        self,
        resources: ProcessResources,
        catalog: StrategyCatalog = catalog,
        *,
        most_kept: int = MOST_KEPT,
    ) -> None:
        self._resources = resources
        self._catalog = catalog
        self._most_kept = most_kept
        self._by_spec: OrderedDict[str, LLMCallStrategy[Any]] = OrderedDict()
        self._held: dict[int, _Held] = {}

    async def get(self, spec: StrategySpec) -> LLMCallStrategy[Any]:
        """The process's one instance of `spec`, built at the first call, not yet prepared.

        Raises:
            StrategyNotFoundError: for a name that is not registered.
            UsageError: for parameters that the factory refuses.
        """
        key = spec.key
        found = self._by_spec.get(key)
        if found is None:
            registration = self._catalog.lookup(spec.name)
            found = registration.build(spec)
            named = registration.quota or found.quota
            if named is None:
                found.quota = as_label(found.model_name or spec.name)
            else:
                found.quota = check_label(named, "quota name")
            self._by_spec[key] = found
        self._by_spec.move_to_end(key)
        return found

    def names(self) -> list[str]:
        """The registered names."""
        return list(self._catalog)

    def prepared(self) -> list[str]:
        """Keys (`StrategySpec.key`) of the strategies that are prepared; safe from any thread."""
        kept = ((key, self._held.get(id(one))) for key, one in list(self._by_spec.items()))
        return [key for key, held in kept if held is not None and held.prepared]

    def using(self, strategy: LLMCallStrategy[Any]) -> AbstractContextManager[None]:
        """Keep `strategy` open inside the block. Enter it without an `await` after `get`."""
        return _Using(self._hold(strategy))

    async def close_surplus(self) -> None:
        """Close instances built from names, the longest unused first, down to `most_kept`; those in
        use stay. A closed one is built and prepared again when an item needs it."""
        surplus = len(self._by_spec) - self._most_kept
        if surplus <= 0:
            return
        idle = (key for key, one in self._by_spec.items() if not self._hold(one).users)
        for key in list(islice(idle, surplus)):
            await self._close(self._held.pop(id(self._by_spec.pop(key))))

    async def prepare(self, strategy: LLMCallStrategy[Any]) -> None:
        """Return once `strategy` is prepared; its `prepare` runs once however many call this.

        Different instances prepare in parallel. After a failure the next caller tries again.

        Raises:
            Exception: what `strategy.prepare()` raised for this caller.
        """
        held = self._hold(strategy)
        if held.prepared:
            return
        async with held.lock:
            if not held.prepared:
                await self._prepare(held)

    def _hold(self, strategy: LLMCallStrategy[Any]) -> _Held:
        held = self._held.get(id(strategy))
        if held is None:
            held = self._held[id(strategy)] = _Held(strategy)
        return held

    async def _prepare(self, held: _Held) -> None:
        started = time.monotonic()
        held.strategy.resources = self._resources
        held.begun = True
        await held.strategy.prepare()
        held.prepared = True
        seconds = time.monotonic() - started
        self._resources.events.emit(StrategyPrepared(type(held.strategy).__name__, seconds))

    async def close(self) -> None:
        """Close all in reverse order of first use, then what they share. A failing `close` is
        logged and does not stop the others. Repeating it is harmless."""
        held, self._held = list(self._held.values()), {}
        self._by_spec.clear()
        for one in reversed(held):
            await self._close(one)
        await self._resources.close()

    async def _close(self, held: _Held) -> None:
        if held.begun:
            await close_quietly(type(held.strategy).__name__, held.strategy.close)
