"""`@strategy` keeps what a factory takes and answers; results come back as its type."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from celery import Signature, Task
from celery.result import AsyncResult
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import ParamSpec, Unpack

import batchllm_celery
from batchllm_celery import CallableStrategy, FailureKind, LLMCallStrategy, UsageError, strategy
from batchllm_celery.errors import StrategyParametersError
from batchllm_celery.ledger.codec import encode_result
from batchllm_celery.models import WorkItemResult
from batchllm_celery.producer.outputs import Outputs
from batchllm_celery.strategies import RegisteredStrategy, TypedStrategy, catalog

ROOT = Path(__file__).parents[2]


class Person(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    born: datetime.date = datetime.date(2000, 1, 1)
    tags: frozenset[str] = frozenset()
    full_name: str = Field(default="", alias="fullName")


@dataclasses.dataclass
class Point:
    x: int
    y: tuple[int, int] = (0, 0)


async def answer(prompt: str) -> str:
    return prompt


@strategy("typed-unit-person")
def person(model: str = "small", *, temperature: float = 0.0) -> LLMCallStrategy[Person]:
    """Finds people."""
    return CallableStrategy(answer, model_name=model)


def test_a_registered_function_is_still_the_function() -> None:
    """It is called as before, with its name and its help."""
    assert isinstance(person, RegisteredStrategy)
    assert person(model="large").model_name == "large"
    assert (vars(person)["__name__"], person.__doc__) == ("person", "Finds people.")
    assert catalog.lookup("typed-unit-person").factory is person.__wrapped__  # type: ignore[attr-defined]
    assert str(inspect.signature(person)).startswith("(model: 'str' = 'small'")


def test_parameters_are_bound_by_name() -> None:
    """Positional ones too; what the factory does not take is refused with what it takes."""
    assert person.bind("large", temperature=0.5).spec.params == {
        "model": "large",
        "temperature": 0.5,
    }
    assert person.bind().spec == person.spec
    with pytest.raises(StrategyParametersError, match="it takes model, temperature"):
        person.bind(modle="x")  # type: ignore[call-arg]
    assert "large" not in repr(person.bind("large"))


def test_parameters_without_a_name_are_refused() -> None:
    """A message carries names only."""

    @strategy("typed-unit-star")
    def star(*parts: str, **more: int) -> LLMCallStrategy[str]:
        return CallableStrategy(answer)

    assert star.bind(a=1).spec.params == {"a": 1}
    with pytest.raises(StrategyParametersError, match="'parts' has no name"):
        star.bind("a")


def test_a_class_stays_a_class() -> None:
    """It can be subclassed, and built by its name."""

    @strategy("typed-unit-class")
    class Shout(LLMCallStrategy[str]):
        async def execute(
            self, prompt: Any, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            return prompt.upper(), None

    class Louder(Shout):
        pass

    assert inspect.isclass(Shout)
    assert isinstance(Louder(), Shout)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (CallableStrategy(answer), "not an instance"),
        ("summarise", "str is no factory"),
        (answer, "plain `def`"),
    ],
    ids=["an instance", "a text", "a coroutine function"],
)
def test_what_is_no_factory_is_refused_at_registration(factory: Any, words: str) -> None:
    """With what to do, before the first item fails for it."""
    with pytest.raises(UsageError, match=words):
        strategy("typed-unit-none")(factory)
    assert "typed-unit-none" not in catalog


def _result(output: Any, **more: Any) -> bytes:
    return encode_result(WorkItemResult(item_id="a", success=True, output=output, **more))


def test_outputs_come_back_as_the_annotation_says() -> None:
    """Dates, sets and aliases of a strict model included: they have no form in JSON."""
    one = Person(
        name="Ann",
        born=datetime.date(1999, 2, 3),
        tags=frozenset({"a"}),
        fullName="Ann B",
    )
    assert Outputs(person.output_type).read(_result(one)).output == one
    assert Outputs(Point).read(_result(Point(1, (2, 3)))).output == Point(1, (2, 3))
    assert Outputs(list[Person]).read(_result([one])).output == [one]


def test_an_output_of_another_version_is_a_failure_here() -> None:
    """Never a success whose output is of another type; its JSON is kept, and not quoted."""
    read = Outputs(Person).read(_result({"nom": "secret"}, metadata={"model": "m"}))
    assert (read.success, read.output, read.error_kind) == (False, None, FailureKind.VALIDATION)
    assert read.error is not None
    assert "no Person of this process (name: missing)" in read.error
    assert "secret" not in read.error
    assert read.metadata == {"model": "m", "output": {"nom": "secret"}}


def test_what_has_no_type_stays_json() -> None:
    """Without an annotation, of a failure, and in a rehearsal, nothing is validated."""
    assert Outputs().read(_result({"name": "Ann"})).output == {"name": "Ann"}
    failed = WorkItemResult(item_id="a", success=False, error="E: e")
    assert Outputs(Person).read(encode_result(failed)).error == "E: e"
    mock = _result("[DRY-RUN]", metadata={"dry_run": True})
    assert Outputs(Person).read(mock).output == "[DRY-RUN]"


@pytest.mark.parametrize(
    ("annotation", "found"),
    [
        (LLMCallStrategy[Person], Person),
        (CallableStrategy[list[Person]], list[Person]),
        (LLMCallStrategy[str], Any),
        (LLMCallStrategy[Any], Any),
        (LLMCallStrategy, Any),
        ("NoSuchName", Any),
        (None, Any),
    ],
)
def test_the_type_is_read_from_the_annotation(annotation: Any, found: Any) -> None:
    def factory() -> Any:
        return CallableStrategy(answer)

    factory.__annotations__["return"] = annotation
    assert RegisteredStrategy("x", factory).output_type == found


def test_all_that_stands_in_a_public_signature_is_exported() -> None:
    """A name in an annotation is one that a user can import from the front door."""
    exported = batchllm_celery.__all__
    missing = set()
    for name in ("Producer", "AsyncProducer", "Batch", "AsyncBatch", "RegisteredStrategy"):
        cls = getattr(batchllm_celery, name)
        for method in [m for n, m in inspect.getmembers(cls, callable) if not n.startswith("_")]:
            for used in _classes(inspect.unwrap(method)):
                own = used.__module__.startswith("batchllm_celery")
                if own and used.__name__.partition("[")[0] not in exported:
                    missing.add(f"{name}.{method.__name__}: {used.__name__}")
    assert missing == set()


def _classes(method: Any) -> set[Any]:
    module = sys.modules[method.__module__]
    names = {**vars(importlib.import_module("batchllm_celery.producer")), **vars(module)}
    names |= {"TypedStrategy": TypedStrategy, "Unpack": Unpack, "P": ParamSpec("P")}
    names |= {"AsyncResult": AsyncResult, "Task": Task, "Signature": Signature}
    hints = typing.get_type_hints(method, globalns=names, include_extras=True)
    found, left = set(), list(hints.values())
    while left:
        one = left.pop()
        left.extend(typing.get_args(one))
        if inspect.isclass(one) and not typing.get_args(one):
            found.add(one)
        elif inspect.isclass(typing.get_origin(one)):
            found.add(typing.get_origin(one))
    return found


def test_pyright_reads_a_users_file_as_mypy_does() -> None:
    """Each line that must fail does, and no other (`make check` runs mypy --strict over it)."""
    pytest.importorskip("basedpyright", reason="the dev extra is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "tests/typing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = [
        f"{one['range']['start']['line'] + 1}: {one['message']}"
        for one in json.loads(done.stdout)["generalDiagnostics"]
    ]
    assert found == []
    source = (ROOT / "tests/typing/user_code.py").read_text()
    assert len(re.findall(r"# type: ignore\[[\w-]+\]  # pyright: ignore", source)) >= 10
