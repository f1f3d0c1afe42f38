"""One instance per name and parameters, prepared once, closed once."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from batchllm_celery.errors import StrategyNotFoundError, UsageError
from batchllm_celery.events import Event, Events, StrategyPrepared
from batchllm_celery.models import RetryState, StrategySpec
from batchllm_celery.strategies import (
    LLMCallStrategy,
    ProcessResources,
    Registration,
    Registry,
    StrategyCatalog,
    base,
    catalog,
    strategy,
)
from batchllm_celery.strategies.base import Opened


class Counting(LLMCallStrategy[str]):
    """Counts its hooks; can be slow and can fail."""

    def __init__(self, model: str = "m", delay: float = 0.0, failures: int = 0) -> None:
        self.model_name = f"fake:{model}"
        self.delay = delay
        self.failures = failures
        self.prepared = 0
        self.closed = 0
        self.log: list[str] = []

    async def prepare(self) -> None:
        self.prepared += 1
        await asyncio.sleep(self.delay)
        if self.prepared <= self.failures:
            raise RuntimeError(f"prepare {self.prepared} failed")

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        return prompt, {}

    async def close(self) -> None:
        self.closed += 1
        self.log.append(self.model_name or "")


@pytest.fixture
def names() -> StrategyCatalog:
    known = StrategyCatalog()
    known.register(Registration("counting", Counting))
    known.register(Registration("shared", Counting, quota="team"))
    return known


async def test_a_spec_is_one_instance_whatever_the_order_of_its_parameters(
    names: StrategyCatalog,
) -> None:
    """The same name and parameters give the same object; others another."""
    registry = Registry(ProcessResources(), names)
    one = await registry.get(StrategySpec(name="counting", params={"model": "a", "delay": 0}))
    same = await registry.get(StrategySpec(name="counting", params={"delay": 0, "model": "a"}))
    other = await registry.get(StrategySpec(name="counting", params={"model": "b", "delay": 0}))
    assert one is same
    assert other is not one
    assert vars(one)["prepared"] == 0  # built, not prepared


async def test_the_quota_is_the_registration_s_else_the_model_s(names: StrategyCatalog) -> None:
    """`@strategy(quota=...)` outranks PROVIDER:MODEL."""
    registry = Registry(ProcessResources(), names)
    assert (await registry.get(StrategySpec(name="counting"))).quota == "fake:m"
    assert (await registry.get(StrategySpec(name="shared"))).quota == "team"


async def test_a_million_parameter_sets_don_t_stay_open(names: StrategyCatalog) -> None:
    """Beyond `most_kept`, the longest unused are closed; one in use never is, and one that comes
    back is built and prepared anew."""
    registry = Registry(ProcessResources(), names, most_kept=3)

    async def use(model: str) -> Counting:
        one = await registry.get(StrategySpec(name="counting", params={"model": model}))
        assert isinstance(one, Counting)
        with registry.using(one):
            await registry.prepare(one)
        await registry.close_surplus()
        return one

    busy = await registry.get(StrategySpec(name="counting", params={"model": "busy"}))
    assert isinstance(busy, Counting)
    with registry.using(busy):
        await registry.prepare(busy)
        first, *others = [await use(f"m{n}") for n in range(100)]
        assert busy.closed == 0
    assert [one.closed for one in (first, *others)] == [1] * 98 + [0] * 2
    again = await use("m0")
    assert again is not first
    assert (again.prepared, again.closed) == (1, 0)
    await registry.close()
    assert [one.closed for one in (busy, first, again, *others)] == [1] * 102


async def test_an_unknown_name_or_parameter_is_named(names: StrategyCatalog) -> None:
    """Both messages list what there is."""
    registry = Registry(ProcessResources(), names)
    with pytest.raises(StrategyNotFoundError, match=r"'nope'.*counting, shared"):
        await registry.get(StrategySpec(name="nope"))
    with pytest.raises(UsageError, match=r"'x'; it takes model, delay, failures"):
        await registry.get(StrategySpec(name="counting", params={"x": 1}))


def test_threads_that_use_the_catalog_first_all_see_the_built_in_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread is still adding them while another one looks up, lists, asks and registers."""
    entered, release = threading.Event(), threading.Event()

    def builtin_registrations() -> tuple[Registration, ...]:
        if not entered.is_set():
            entered.set()
            assert release.wait(30)
        return (Registration("built-in", Counting),)

    builtins = ModuleType("slow_builtins")
    builtins.builtin_registrations = builtin_registrations  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slow_builtins", builtins)
    names = StrategyCatalog(builtins="slow_builtins")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(names.lookup, "built-in")
        try:
            assert entered.wait(30)
            assert names.lookup("built-in").factory is Counting
            assert set(names) == {"built-in"}
            assert "built-in" in names
            names.register(Registration("own", Counting))
            with pytest.raises(UsageError, match="already registered"):
                names.register(Registration("built-in", lambda: Counting()))
        finally:
            release.set()
        assert first.result(30).factory is Counting
    assert set(names) == {"built-in", "own"}


def test_builtins_that_can_t_be_imported_say_so_each_time() -> None:
    """A second look does not find an empty catalog."""
    names = StrategyCatalog(builtins="no_such_builtins")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_builtins"):
            names.lookup("gemini")


async def test_a_factory_must_give_a_strategy() -> None:
    """Anything else is refused in one line."""
    names = StrategyCatalog()
    wrong: Any = lambda: "text"  # noqa: E731 - a factory that is none
    names.register(Registration("wrong", wrong))
    with pytest.raises(UsageError, match="returned str, not an LLMCallStrategy"):
        await Registry(ProcessResources(), names).get(StrategySpec(name="wrong"))


async def test_a_factory_that_fails_is_a_usage_error() -> None:
    """A missing setting, say: the item fails with it, and is not tried without end."""
    names = StrategyCatalog()

    def failing() -> LLMCallStrategy[Any]:
        raise KeyError("MY_SETTING")

    names.register(Registration("failing", failing))
    with pytest.raises(UsageError, match="its factory failed: KeyError: 'MY_SETTING'"):
        await Registry(ProcessResources(), names).get(StrategySpec(name="failing"))


def test_two_factories_can_t_have_one_name() -> None:
    """A second registration of the same code replaces it, other code is refused."""
    names = StrategyCatalog()
    names.register(Registration("x", Counting))
    names.register(Registration("x", Counting))
    with pytest.raises(UsageError, match="already registered"):
        names.register(Registration("x", lambda: Counting()))


def test_the_decorator_registers_under_a_name() -> None:
    """`@strategy(name)` leaves the factory usable as it is."""

    @strategy("test-decorated", quota="q")
    def decorated() -> LLMCallStrategy[str]:
        return Counting()

    found = catalog.lookup("test-decorated")
    assert (found.factory, found.quota) == (inspect.unwrap(decorated), "q")
    assert isinstance(decorated(), Counting)
    assert {"gemini", "gemini-cached", "openai", "pydantic-ai", "simulated"} <= set(catalog)


def loaded_by(code: str) -> set[str]:
    """The package's modules that a fresh process has imported after `code`."""
    show = "\nimport sys; print(*[m for m in sys.modules if m.startswith('batchllm_celery')])"
    done = subprocess.run(
        [sys.executable, "-c", code + show], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("gemini", "gemini", {"openai", "pydantic_ai", "simulated"}),
        ("gemini-cached", "gemini", {"openai", "pydantic_ai", "simulated"}),
        ("openai", "openai", {"gemini", "pydantic_ai", "simulated"}),
        ("simulated", "simulated", {"openai", "pydantic_ai"}),
    ],
)
def test_only_the_provider_that_is_built_is_imported(name: str, own: str, others: set[str]) -> None:
    """Built-in names are known without a provider's import."""
    loaded = loaded_by(
        "from batchllm_celery.models import StrategySpec\n"
        "from batchllm_celery.strategies import catalog\n"
        f"assert {name!r} in catalog\n"
        f"catalog.lookup({name!r}).build(StrategySpec(name={name!r}, params={{'model': 'm'}}))"
    )
    package = "batchllm_celery.providers"
    assert f"{package}.{own}" in loaded
    assert not {f"{package}.{other}" for other in others} & loaded


@pytest.mark.parametrize(
    "name", ["anthropic", "gemini", "gemini-cached", "openai", "pydantic-ai", "simulated"]
)
def test_a_built_in_takes_each_parameter_that_it_offers(name: str) -> None:
    """What the signature names reaches the class, a default of its own included."""
    values: dict[str, Any] = {
        "model": "openai:m" if name == "pydantic-ai" else "m",
        "schema": {"type": "object"},
        "cached_content": ["text"],
        "cache_ttl_seconds": 900,
        "cache_renewal_buffer_seconds": 60,
        "cache_tags": {"team": "a"},
        "extra": {"seed": 1},
        "allow_dropping": ["seed"],
        "api": "responses",
    }
    factory = catalog.lookup(name).factory
    offered = inspect.signature(factory).parameters
    assert not {"client", "base_url", "api_key", "config", "response_parser"} & set(offered)
    given = {option: values.get(option, 1) for option in offered}
    built = catalog.lookup(name).build(StrategySpec(name=name, params=given))
    assert built.max_output_tokens == 1
    required = [p.name for p in offered.values() if p.default is p.empty]
    assert required == ([] if name == "simulated" else ["model"])


def test_a_strategy_s_own_module_imports_no_provider() -> None:
    """The classes of `strategies` do without; a built-in's name is looked up when it is needed."""
    loaded = loaded_by("from batchllm_celery.strategies import CallableStrategy, Registry, catalog")
    assert not {module for module in loaded if module.startswith("batchllm_celery.providers")}


@pytest.mark.parametrize("name", ["gemini", "simulated"])
def test_a_built_in_name_is_taken_from_the_first_moment(name: str) -> None:
    """Also where the user's `@strategy` is the first that touches the catalog."""
    loaded_by(
        "from batchllm_celery import UsageError, strategy\n"
        "try:\n"
        f"    strategy({name!r})(lambda: None)\n"
        "except UsageError as error:\n"
        "    assert 'already registered' in str(error)\n"
        "else:\n"
        "    raise SystemExit('it was registered')"
    )


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("strategies:GeminiCachedStrategy", "providers.gemini"),
        ("strategies:OpenAICompatibleStrategy", "providers.openai"),
        ("strategies.gemini_cache:has_tags", "providers.gemini.cache"),
        ("strategies.simulated:SimulatedStrategy", "providers.simulated"),
        ("execution.middleware:Middleware", "compat.middleware"),
        ("observability:MetricsObserver", "compat.metrics"),
        ("progress:RichProgressBar", "compat.progress"),
        ("limiter:FixedDelayStrategy", "compat.rate_limits"),
    ],
)
def test_a_documented_path_names_the_same_object(path: str, home: str) -> None:
    """An `isinstance` by either path is the same question; an unknown name stays one."""
    module, _, name = path.partition(":")
    found = importlib.import_module(f"batchllm_celery.{module}")
    there = importlib.import_module(f"batchllm_celery.{home}")
    assert getattr(found, name) is getattr(there, name)
    assert not hasattr(found, "NoSuchStrategy")


async def test_a_thousand_callers_prepare_once() -> None:
    """However many items arrive together, `prepare` runs once, and all wait for it."""
    registry, one = Registry(ProcessResources()), Counting(delay=0.05)
    await asyncio.gather(*(registry.prepare(one) for _ in range(1000)))
    await registry.prepare(one)
    assert one.prepared == 1


async def test_different_strategies_prepare_in_parallel() -> None:
    """Ten strategies that take 0.1 s each are ready in under 0.5 s."""
    registry, many = Registry(ProcessResources()), [Counting(delay=0.1) for _ in range(10)]
    started = time.monotonic()
    await asyncio.gather(*(registry.prepare(one) for one in many for _ in range(5)))
    assert time.monotonic() - started < 0.5
    assert [one.prepared for one in many] == [1] * 10


async def test_a_failed_prepare_is_retried_by_the_next_caller() -> None:
    """The first caller gets the error, the second succeeds, nobody else prepares again."""
    registry, one = Registry(ProcessResources()), Counting(delay=0.01, failures=1)
    results = await asyncio.gather(
        *(registry.prepare(one) for _ in range(5)), return_exceptions=True
    )
    assert [str(result) for result in results if result] == ["prepare 1 failed"]
    assert one.prepared == 2


async def test_a_prepare_that_always_fails_fails_every_caller() -> None:
    """Five items: five prepares, five errors of their own."""
    registry, one = Registry(ProcessResources()), Counting(failures=99)
    results = await asyncio.gather(
        *(registry.prepare(one) for _ in range(5)), return_exceptions=True
    )
    assert sorted(map(str, results)) == [f"prepare {n} failed" for n in range(1, 6)]


async def test_a_cancelled_prepare_is_taken_over_by_the_next_caller() -> None:
    """The item that prepared may be cancelled; the others are not left waiting."""
    registry, one = Registry(ProcessResources()), Counting(delay=0.05)
    first = asyncio.create_task(registry.prepare(one))
    second = asyncio.create_task(registry.prepare(one))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait_for(second, 5)
    assert one.prepared == 2


async def test_fifty_fresh_instances_are_each_prepared() -> None:
    """An instance that is forgotten by its item does not lend its identity to the next."""
    registry, prepared = Registry(ProcessResources()), 0
    for _ in range(50):
        one = Counting()
        await registry.prepare(one)
        prepared += one.prepared
        del one
    assert prepared == 50


async def test_close_goes_in_reverse_and_survives_a_failing_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last prepared is closed first; shared objects come after all strategies; a second
    close does nothing."""
    log: list[str] = []

    class Failing(Counting):
        async def close(self) -> None:
            await super().close()
            raise RuntimeError("close failed")

    resources = ProcessResources()
    registry = Registry(resources)
    strategies = [Counting("a"), Failing("b", failures=1), Counting("c")]
    for one in strategies:
        one.log = log
    await registry.prepare(strategies[0])
    with pytest.raises(RuntimeError, match="prepare 1"):
        await registry.prepare(strategies[1])
    await registry.prepare(strategies[2])

    async def close_client() -> None:
        log.append("client")

    async def open_client() -> Opened[str]:
        return Opened("client", close_client)

    assert await resources.shared("client", open_client) == "client"
    await registry.close()
    await registry.close()
    assert log == ["fake:c", "fake:b", "fake:a", "client"]
    assert "close_failed name=Failing error=RuntimeError" in caplog.messages


@pytest.mark.parametrize("how", ["exit", "interrupt", "cancel", "hang"])
async def test_no_close_keeps_the_others_from_theirs(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, or if it never ends; a `sys.exit()` in it ended the loop."""
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.05)
    raised = {"exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "cancel": None}

    class Leaving(Counting):
        async def close(self) -> None:
            if how == "hang":
                await asyncio.Event().wait()
            raise raised[how] or asyncio.CancelledError()

    registry = Registry(ProcessResources())
    first, last = Counting("a"), Leaving("b")
    await registry.prepare(first)
    await registry.prepare(last)
    async with asyncio.timeout(20):
        await registry.close()
    assert first.closed == 1


async def test_shared_objects_are_opened_once_and_again_after_a_failure() -> None:
    """A thousand strategies share one client; a failed opening is not remembered."""
    opened = 0

    async def nothing() -> None: ...

    async def open_it() -> Opened[int]:
        nonlocal opened
        opened += 1
        await asyncio.sleep(0.01)
        if opened == 1:
            raise OSError("not yet")
        return Opened(opened, nothing)

    resources = ProcessResources()
    with pytest.raises(OSError, match="not yet"):
        await resources.shared("x", open_it)
    values = await asyncio.gather(*(resources.shared("x", open_it) for _ in range(1000)))
    assert set(values) == {2}
    await resources.close()


async def test_the_registry_hands_over_its_resources_and_tells() -> None:
    """A strategy finds `resources` before `prepare`; listeners hear how long it took."""
    heard: list[Event] = []
    resources = ProcessResources(events=Events(heard.append))
    one = Counting(delay=0.01)
    await Registry(resources).prepare(one)
    assert one.resources is resources
    [event] = heard
    assert isinstance(event, StrategyPrepared)
    assert (event.strategy, event.seconds >= 0.01) == ("Counting", True)
