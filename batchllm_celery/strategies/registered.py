"""What `@strategy` makes of a function: the factory itself, and a name that work can be sent to."""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

from batchllm_celery.errors import StrategyParametersError
from batchllm_celery.models import StrategySpec, TContext, TOutput
from batchllm_celery.strategies.base import LLMCallStrategy

if TYPE_CHECKING:
    from celery import Signature, Task
    from celery.result import AsyncResult
    from typing_extensions import Unpack

    from batchllm_celery.producer import Batch, RowWith, SubmitOptions

P = ParamSpec("P")

#: Output types of which the JSON form is the value itself: nothing is validated back.
_PLAIN = (str, int, float, bool, type(None), object, Any)


class TypedStrategy(Generic[TOutput]):
    """A strategy's name, parameters and type of output. What `RegisteredStrategy.bind` returns.

    Give it to `Producer.submit(items, strategy=...)`, and the results have outputs of that type.
    """

    def __init__(self, spec: StrategySpec, output_type: Any = Any) -> None:
        self.spec = spec
        self.output_type = output_type
        """Of the results' outputs, by the factory's annotation; `Any` where it says nothing."""

    @property
    def name(self) -> str:
        """What it is registered as."""
        return self.spec.name

    def submit(
        self, items: Iterable[RowWith[TContext]], **options: Unpack[SubmitOptions]
    ) -> Batch[TOutput, TContext]:
        """Submit a batch by the process's own `Producer`, whose settings are the environment's.

        Args:
            items: as for `Producer.submit`.
            options: as for `Producer.submit`.

        Raises:
            UsageError: as `Producer.submit`.
        """
        producer = importlib.import_module("batchllm_celery.producer").default_producer()
        batch: Batch[TOutput, TContext] = producer.submit(items, strategy=self, **options)
        return batch

    # -- one item, as Celery's tasks are called

    @property
    def task(self) -> Task[Any, TOutput]:
        """The Celery task: of the app that `install` was called with first, else of the fleet's.

        Raises:
            StrategyNotFoundError: the app has no task of this name.
        """
        tasks = importlib.import_module("batchllm_celery.worker.tasks")
        found: Task[Any, TOutput] = tasks.task_of(self.name)
        return found

    def delay(self, prompt: str, /) -> AsyncResult[TOutput]:
        """Send one item as a task. `.get()` is the output, or raises `ItemFailedError`."""
        return self.task.apply_async((prompt,), dict(self.spec.params))

    def apply_async(
        self, args: tuple[str] | list[str], kwargs: dict[str, Any] | None = None, **options: Any
    ) -> AsyncResult[TOutput]:
        """`delay` with Celery's options: `queue`, `priority` (0 to 9, urgent), `expires`,
        `countdown`, `eta`, `link`, `link_error`, `task_id`."""
        return self.task.apply_async(tuple(args), {**self.spec.params, **(kwargs or {})}, **options)

    def s(self, *prompt: str) -> Signature[TOutput]:
        """A signature for chains, groups, chords; in a chain the task before gives the prompt."""
        return self.task.signature(prompt, dict(self.spec.params))

    def si(self, prompt: str) -> Signature[TOutput]:
        """A signature that takes nothing from the task before it."""
        return self.task.signature((prompt,), dict(self.spec.params), immutable=True)

    def __repr__(self) -> str:
        # Parameters may hold what nobody should read.
        return f"<strategy {self.name!r}>"


class RegisteredStrategy(TypedStrategy[TOutput], Generic[P, TOutput]):
    """A registered factory. Calling it calls the factory.

    @strategy("summarise")
    def summarise(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]: ...

    summarise(model="gemini-2.5-pro")                       # a strategy object
    summarise.submit(["First text", "Second text"])         # a batch, with default parameters
    summarise.bind(model="gemini-2.5-pro").submit(texts)    # a batch, with these parameters
    """

    def __init__(self, name: str, factory: Callable[P, LLMCallStrategy[TOutput]]) -> None:
        super().__init__(StrategySpec(name=name))
        self._factory = factory
        functools.update_wrapper(self, factory)
        del self.output_type  # looked up when it is asked for

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> LLMCallStrategy[TOutput]:
        """Build a strategy object in this process."""
        return self._factory(*args, **kwargs)

    @functools.cached_property
    def output_type(self) -> Any:
        """Of the results' outputs, by the factory's annotation; `Any` where it says nothing."""
        return output_type_of(self._factory)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> TypedStrategy[TOutput]:
        """The strategy with these parameters, which must be JSON.

        Raises:
            StrategyParametersError: for parameters that the factory does not take.
        """
        return TypedStrategy(
            StrategySpec(name=self.name, params=named(self.name, self._factory, args, kwargs)),
            self.output_type,
        )

    def delay(self, prompt: str, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[TOutput]:
        """Send one item as a task, with parameters. `.get()` is the output, or raises
        `ItemFailedError`."""
        return self.bind(*args, **kwargs).task.apply_async(
            (prompt,), named(self.name, self._factory, args, kwargs)
        )


def named(
    name: str, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A factory's arguments by their names, as a message carries them.

    Raises:
        StrategyParametersError: it does not take them, or not by name.
    """
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise StrategyParametersError(
            f"strategy {name!r}: {error}; it takes {parameters_of(factory)}"
        ) from error
    found: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise StrategyParametersError(
                f"strategy {name!r}: its parameter {key!r} has no name that a message could carry"
            )
        else:
            found[key] = value
    return found


def parameters_of(factory: Callable[..., Any]) -> str:
    """The parameters' names, for a message."""
    names = ", ".join(inspect.signature(factory).parameters)
    return names or "no parameters"


def output_type_of(factory: Callable[..., Any]) -> Any:
    """`Person` of a factory that returns `LLMCallStrategy[Person]`; `Any` where nothing says it."""
    try:
        returned = typing.get_type_hints(factory).get("return")
    except Exception:  # a name that only type checkers know
        return Any
    found = _output_of(returned)
    return Any if found is None or found in _PLAIN or isinstance(found, typing.TypeVar) else found


def _output_of(returned: Any) -> Any:
    origin, arguments = typing.get_origin(returned), typing.get_args(returned)
    if inspect.isclass(origin) and issubclass(origin, LLMCallStrategy):
        return arguments[0] if len(arguments) == 1 else None
    for base in getattr(returned, "__orig_bases__", ()):
        found = _output_of(base)
        if found is not None:
            return found
    return None
