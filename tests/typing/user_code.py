"""What a user writes, for type checkers only: mypy --strict and pyright read it, nobody runs it.

A line with an `ignore` must be refused: an `ignore` that is not needed is an error itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypedDict, assert_type

from pydantic import BaseModel

from batchllm_celery import (
    AsyncBatch,
    AsyncProducer,
    Batch,
    BatchProgress,
    BatchResult,
    CallableStrategy,
    GeminiStrategy,
    LLMCallStrategy,
    LLMWorkItem,
    OpenAICompatibleStrategy,
    Producer,
    RegisteredStrategy,
    TypedStrategy,
    WorkItemResult,
    quota,
    strategy,
)
from batchllm_celery.testing import run_item


class Person(BaseModel):
    name: str


class Ticket(TypedDict):
    number: int


@strategy("typed-person", quota="gemini")
def person(model: str = "gemini-2.5-flash", *, temperature: float = 0.0) -> LLMCallStrategy[Person]:
    return GeminiStrategy(model=model, schema=Person, temperature=temperature)


@strategy("typed-text")
def text() -> LLMCallStrategy[str]:
    return OpenAICompatibleStrategy("gpt-5-mini")


@strategy("typed-class")
class Shout(LLMCallStrategy[str]):
    async def execute(
        self, prompt: object, attempt: int, timeout: float, state: object = None
    ) -> tuple[str, dict[str, int]]:
        return str(prompt).upper(), {"input_tokens": 1}


@strategy("typed-wrong")
def wrong() -> LLMCallStrategy[str]:
    return GeminiStrategy("gemini-2.5-flash", schema=Person)  # type: ignore[arg-type]  # pyright: ignore[reportReturnType]


# Factories keep their parameters and their output.
assert_type(person(model="gemini-2.5-pro"), LLMCallStrategy[Person])
assert_type(person.bind(temperature=0.2), TypedStrategy[Person])
assert_type(text, RegisteredStrategy[[], str])
assert_type(Shout(), Shout)
person(modle="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
person.bind(temperature="hot")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
text("gpt")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

# A schema is the output's type, and a parser's answer is.
assert_type(GeminiStrategy("gemini-2.5-flash", schema=Person), GeminiStrategy[Person])


def parsed(response: object) -> int:
    return len(str(response))


assert_type(GeminiStrategy("m", response_parser=parsed), GeminiStrategy[int])


async def ask(prompt: str) -> str:
    return prompt


shouting: LLMCallStrategy[str] = CallableStrategy(ask)


def batches(producer: Producer) -> None:
    batch = producer.submit(["Ann", "Bob"], strategy=person, priority=3)
    assert_type(batch.progress(), BatchProgress)
    assert_type(batch.wait(timeout=3.0), BatchProgress)
    for result in batch.results():
        assert_type(result.output, Person)
        print(result.output.name)
        result.output.nmae()  # type: ignore[attr-defined]  # pyright: ignore
    for result in producer.stream(["Ann"], strategy=person.bind(model="m")):
        print(result.output.name)
    ticket: Ticket = {"number": 7}
    items = [LLMWorkItem(item_id="a", strategy="typed-person", prompt="Ann", context=ticket)]
    whole = producer.submit(items, strategy=person)
    assert_type(whole, Batch[Person, Ticket])
    found = whole.collect(timeout=10)
    assert_type(found, BatchResult[Person, Ticket])
    print(found.results[0].context["number"], found.results[0].output.name)
    print(found.results[0].context["numbr"])  # type: ignore[typeddict-item]  # pyright: ignore
    assert_type(producer.attach(batch.id, person).collect().results, list[WorkItemResult[Person]])
    producer.submit(["Ann"], strategy=person, prioritty=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    producer.submit([1, 2], strategy=person)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    batch.wait(timeout="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(person.submit(["Ann"], queue="express").collect().results[0].output, Person)


def single_items(producer: Producer) -> None:
    assert_type(person.delay("Ann", model="m").get(), Person)
    assert_type(person.bind(model="m").delay("Ann").get(), Person)
    assert_type(producer.ask("Ann", strategy=person).output, Person)
    assert_type(producer.enqueue("Ann", strategy=text).result(timeout=3.0).output, str)
    assert_type(producer.item("batch:7", person).result().output, Person)
    assert_type(run_item(person, "Ann").output, Person)
    with quota("openai:gpt-5-mini", tokens=1200) as permit:
        permit.refused(retry_after=2.0)
    person.delay("Ann", modle="m")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    person.delay(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    producer.ask("Ann", strategy=person, prioritty=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    with quota("q", token=1):  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        pass


async def from_a_loop(texts: AsyncIterator[str]) -> None:
    async with AsyncProducer() as producer:
        batch = await producer.submit(texts, strategy=text)
        async for result in batch.results():
            assert_type(result.output, str)
        assert_type(await batch.progress(), BatchProgress)
        assert_type(await producer.attach("b"), AsyncBatch)
        assert_type((await producer.ask("Ann", strategy=person)).output, Person)
        async with quota("openai:gpt-5-mini", tokens=1200) as permit:
            permit.used({"input_tokens": 7})
        print(batch.progress().finished)  # type: ignore[attr-defined]  # pyright: ignore
        list(batch.results())  # type: ignore[call-overload]  # pyright: ignore
