"""Requests of any form on their way: submitted, kept in Redis, sent as given, answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis

pytest.importorskip("openai", reason="the openai extra is not installed")

from batchllm_celery import LLMWorkItem, NativeRequest, Request, current_item
from batchllm_celery.errors import FailureKind, InputError
from batchllm_celery.keys import Keys
from batchllm_celery.models import StrategySpec, WorkItemResult
from batchllm_celery.producer import Producer
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider
from batchllm_celery.strategies import CallableStrategy, strategy
from batchllm_celery.worker.process import Runtime
from tests.unit.dialects.files import b64, data_url, pdf, png

LONG = "The handbook says. " * 400
MODELS = pytest.mark.parametrize("name", ["simulated", "openai"])


def chat(data: bytes | None = None, question: str = "What is this?", **changes: Any) -> Request:
    parts: list[Any] = [{"type": "text", "text": question}]
    parts += [] if data is None else [{"type": "image", "data": data}]
    messages = [
        {"role": "system", "content": LONG},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": parts},
    ]
    parameters = {"temperature": 0.5, "max_output_tokens": 500}
    return Request.of({"messages": messages, "parameters": parameters, **changes})


class Fleet:
    """A producer and one worker process, without Celery between the two."""

    def __init__(self, producer: Producer, provider: SimulatedProvider, settings: Settings) -> None:
        self.producer = producer
        self.provider = provider
        self.settings = settings
        self.url = settings.redis_url or ""

    async def submit(self, rows: list[Any], name: str = "simulated", **options: Any) -> Any:
        spec = StrategySpec(name=name, params={"model": "m"} if name in BUILT_IN else {})
        return await asyncio.to_thread(lambda: self.producer.submit(rows, strategy=spec, **options))

    async def run(self, batch: Any, rows: int) -> list[WorkItemResult[Any, Any]]:
        runtime = Runtime(self.settings, self.url, lambda *_: None, slots=20)
        await runtime.open()
        try:
            async with asyncio.timeout(20):
                await runtime.run_items(batch.id, range(rows))
        finally:
            await runtime.close()
        found = await asyncio.to_thread(lambda: list(batch.results(follow=False)))
        return sorted(found, key=lambda result: result.index)

    async def answered(self, rows: list[Any], name: str = "simulated") -> list[Any]:
        results = await self.run(await self.submit(rows, name), len(rows))
        assert [result.error for result in results] == [None] * len(rows)
        return results

    @property
    def bodies(self) -> list[Any]:
        return [call.body for call in self.provider.calls]

    def stored(self, batch: Any, name: str) -> dict[bytes, bytes]:
        """A hash of the batch."""
        key = getattr(Keys(self.settings.namespace).batch(batch.id), name)
        with redis.Redis.from_url(self.url) as client:
            found: Any = client.hgetall(key)
        return dict(found)


BUILT_IN = ("simulated", "openai", "gemini")


@pytest.fixture
async def fleet(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Fleet]:
    async with SimulatedProvider(keep_bodies=True) as provider:
        monkeypatch.setenv("OPENAI_API_KEY", "test-key")
        monkeypatch.setenv("GEMINI_API_KEY", "test-key")
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", provider.url)
        settings = Settings(
            redis_url=redis_url,
            namespace=namespace,
            simulated_url=provider.url,
            openai_base_url=provider.openai_url,
        )
        with Producer(redis_url=redis_url, namespace=namespace) as producer:
            yield Fleet(producer, provider, settings)


# -- sent as given


@MODELS
async def test_a_request_arrives_in_the_provider_s_own_form(fleet: Fleet, name: str) -> None:
    """System, turns, an image, parameters; the same for both, and answered as a text is."""
    image = png()
    [result] = await fleet.answered([chat(image)], name)
    [body] = fleet.bodies
    if name == "simulated":
        assert body == {
            "systemInstruction": {"parts": [{"text": LONG}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Hello"}]},
                {"role": "model", "parts": [{"text": "Good day."}]},
                {
                    "role": "user",
                    "parts": [
                        {"text": "What is this?"},
                        {"inlineData": {"mimeType": "image/png", "data": b64(image)}},
                    ],
                },
            ],
            "generationConfig": {"temperature": 0.5, "maxOutputTokens": 500},
        }
    else:
        url = {"url": data_url(image, "image/png")}
        assert body == {
            "model": "m",
            "messages": [
                {"role": "system", "content": LONG},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Good day."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": url},
                    ],
                },
            ],
            "temperature": 0.5,
            "max_tokens": 500,
        }
    assert result.output
    assert result.token_usage.input_tokens > 0


ODD = {"unheard_of": {"a": None, "b": 12345678901234567890, "C_d": [1.0, "ü \\ud83d"]}}


@pytest.mark.parametrize(
    ("name", "dialect", "body"),
    [
        (
            "simulated",
            "gemini",
            {
                "contents": [{"parts": [{"text": "x"}]}],
                "generation_config": {"topK": 3, "stopSequences": []},
                "cached_content": None,
            },
        ),
        (
            "openai",
            "openai",
            {"model": "m", "messages": [{"role": "user", "content": LONG}], "logit_bias": {"5": 1}},
        ),
    ],
)
async def test_a_native_body_is_sent_as_it_is(
    fleet: Fleet, name: str, dialect: str, body: dict[str, Any]
) -> None:
    """Nulls, spellings and fields that nobody here knows; also what was lifted out on the way."""
    fleet.provider.change(strict=False)
    await fleet.answered([NativeRequest.of({"dialect": dialect, "body": {**body, **ODD}})], name)
    assert fleet.bodies == [{**body, **ODD}]


@pytest.mark.parametrize("name", ["gemini", "openai"])
async def test_a_body_of_another_provider_is_translated_or_refused_by_field(
    fleet: Fleet, name: str
) -> None:
    """What has no counterpart is named before anything is enqueued."""
    gemini = {"contents": [{"role": "user", "parts": [{"text": "Good day"}]}]}
    openai = {"model": "m", "messages": [{"role": "user", "content": "Good day"}]}
    dialect, body = ("openai", openai) if name == "gemini" else ("gemini", gemini)
    await fleet.answered([NativeRequest.of({"dialect": dialect, "body": body})], name)
    assert fleet.bodies == [gemini if name == "gemini" else openai]
    odd = {**body, "logit_bias": {"1": 2}, "cachedContent": "c"}
    with pytest.raises(InputError, match=r"item 0 \(0\): body\.(logit_?[bB]ias|cached)"):
        await fleet.submit([NativeRequest.of({"dialect": dialect, "body": odd})], name)


async def test_options_of_the_strategy_are_defaults_that_the_request_beats(fleet: Fleet) -> None:
    """Its own system text, its own temperature; what it does not say comes from the strategy."""
    params = {"model": "m", "system": "Default.", "temperature": 0.1, "max_output_tokens": 77}
    spec = StrategySpec(name="simulated", params=params)
    rows: list[Any] = [
        chat(),
        Request.of({"messages": [{"role": "user", "content": "Hi"}]}),
        "A text",
    ]
    batch = await asyncio.to_thread(fleet.producer.submit, rows, strategy=spec)
    await fleet.run(batch, 3)
    by_text = {str(body["contents"][-1]["parts"][0]["text"]): body for body in fleet.bodies}
    own, bare, text = by_text["What is this?"], by_text["Hi"], by_text["A text"]
    assert own["systemInstruction"]["parts"] == [{"text": LONG}]
    assert own["generationConfig"] == {"temperature": 0.5, "maxOutputTokens": 500}
    for body in (bare, text):
        assert body["systemInstruction"]["parts"] == [{"text": "Default."}]
        assert body["generationConfig"] == {"temperature": 0.1, "maxOutputTokens": 77}


async def test_a_request_s_own_schema_is_checked_and_fed_back(fleet: Fleet) -> None:
    """As a strategy's is."""
    fleet.provider.change(bad_output_rate=0.5)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    rows = [chat(question=f"Question {n}", schema=schema) for n in range(8)]
    results = await fleet.answered(rows)
    assert all(isinstance(result.output["a"], int) for result in results)
    last = [body["contents"][-1]["parts"][0]["text"] for body in fleet.bodies]
    assert any("Your previous answer was rejected" in text for text in last)


# -- refused by name


@MODELS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {"top_k": 3, "thinking_budget": 9}}, "parameters.(top_k|thinking_budget)"),
        ({"extra": {"contents": [], "messages": []}}, "extra.(contents|messages)"),
    ],
)
async def test_what_a_provider_has_no_word_for_is_refused_before_anything_is_enqueued(
    fleet: Fleet, name: str, change: dict[str, Any], words: str
) -> None:
    """By row and field."""
    if name == "simulated" and "parameters" in change:
        change = {"messages": [*chat().to_json()["messages"], {"role": "system", "content": "x"}]}
        words = r"messages\[4\]"
    with pytest.raises(InputError, match=rf"item 1 \(1\): {words}: "):
        await fleet.submit(["fine", chat(**change)], name, batch_id="refused")
    batch = await asyncio.to_thread(fleet.producer.attach, "refused")
    assert not fleet.stored(batch, "item")


async def test_what_may_be_dropped_is_dropped_and_said(fleet: Fleet) -> None:
    """By permission only."""
    params = {"model": "m", "allow_dropping": ["top_k"]}
    row = chat(parameters={"top_k": 3, "temperature": 0.5})
    batch = await asyncio.to_thread(
        fleet.producer.submit, [row], strategy=StrategySpec(name="openai", params=params)
    )
    [result] = await fleet.run(batch, 1)
    assert result.metadata["dropped_parameters"] == ["top_k"]
    assert "top_k" not in fleet.bodies[0]
    assert fleet.bodies[0]["temperature"] == 0.5


@strategy("texts-only")
def _texts_only() -> Any:
    async def ask(prompt: str) -> str:
        return prompt.upper()

    return CallableStrategy(ask)


@strategy("asks-who")
def _asks_who() -> Any:
    async def ask(prompt: Any) -> Any:
        item = await asyncio.to_thread(current_item)
        assert item is not None
        return {"id": item.item_id, "index": item.index, "attempt": item.attempt} | item.context

    return CallableStrategy(ask, accepts=(str, Request))


async def test_a_strategy_for_texts_is_never_handed_anything_else(fleet: Fleet) -> None:
    """Where its registration is known, the submission is refused; a worker refuses, too."""
    with pytest.raises(InputError, match=r"item 1 \(1\): unsupported: Callable"):
        await fleet.submit(["x", chat()], "texts-only")
    [shouted] = await fleet.answered(["still works"], "texts-only")
    assert shouted.output == "STILL WORKS"


async def test_a_worker_refuses_what_a_producer_could_not_know(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web application may only know the strategy's name. No call, no attempt."""
    monkeypatch.setattr("batchllm_celery.producer.requests.Requests._strategy", lambda *_: None)
    [result] = await fleet.run(await fleet.submit([chat()], "texts-only"), 1)
    assert (result.error_kind, result.attempts) == (FailureKind.INVALID_INPUT, 0)
    assert "takes texts" in (result.error or "")


async def test_a_strategy_can_ask_whom_it_works_for(fleet: Fleet) -> None:
    """Each call its own item, in threads too; outside of a call there is none."""
    rows = [LLMWorkItem(f"id-{n}", "asks-who", "x", {"n": n}) for n in range(5)]
    results = await fleet.answered(rows, "asks-who")
    assert [result.output for result in results] == [
        {"id": f"id-{n}", "index": n, "attempt": 1, "n": n} for n in range(5)
    ]
    assert current_item() is None


# -- files


async def test_a_file_is_read_when_its_row_is_submitted(fleet: Fleet, tmp_path: Path) -> None:
    """Once for all rows that name it; workers never see the path."""
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdf(3))
    part = {"type": "file", "path": str(path)}
    row = {"messages": [{"role": "user", "content": [part]}]}
    batch = await fleet.submit([Request.of(row)] * 5)
    path.unlink()
    assert list(fleet.stored(batch, "blob").values()) == [pdf(3)]
    assert all(b"paper" not in data or b"path" not in data for data in fleet.stored(batch, "item"))
    await fleet.run(batch, 5)
    [inline] = {str(body["contents"][0]["parts"][0]) for body in fleet.bodies}
    assert b64(pdf(3)) in inline
    assert "application/pdf" in inline


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "the file can't be read: No such file"),
        (lambda path: path.mkdir(), "it is no regular file"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(pdf()), "is no image, but application/pdf"),
        (lambda path: path.write_bytes(b"\x00" * (51 * 2**20)), "at most 52,428,800 are taken"),
        (lambda path: path.write_bytes(png() + b"\x00" * (21 * 2**20)), "larger than the 20 MB"),
        (lambda path: path.write_bytes(b"\x01\x02\x03"), "the content does not tell"),
    ],
)
async def test_a_file_that_can_t_be_sent_is_named_by_row_and_nothing_is_enqueued(
    fleet: Fleet, tmp_path: Path, make: Any, words: str
) -> None:
    """Missing, no file, empty, of a wrong type, too large for us, too large for the provider."""
    path = tmp_path / "image"
    make(path)
    part = {"type": "image", "path": str(path)}
    row = Request.of({"messages": [{"role": "user", "content": [part]}]})
    with pytest.raises(InputError, match=rf"item 1 \(1\): messages\[0\]\.content\[0\].*{words}"):
        await fleet.submit(["fine", row])


# -- large values, once by content


async def test_rows_that_share_a_part_store_it_once_until_the_last_has_ended(fleet: Fleet) -> None:
    """Counted by item: an outcome uncounts it, a failure that may be retried keeps it."""
    image = png(200, 150)
    rows = [chat(image, f"Question {n}") for n in range(30)]
    batch = await fleet.submit(rows)
    assert sorted(fleet.stored(batch, "blob").values()) == sorted([image, LONG.encode()])
    assert set(fleet.stored(batch, "refs").values()) == {b"30"}
    assert all(len(data) < 1500 for data in fleet.stored(batch, "item").values())
    with redis.Redis.from_url(fleet.url) as client:
        assert client.ttl(Keys(fleet.settings.namespace).batch(batch.id).blob) > 0
    again = await fleet.submit(rows, batch_id=batch.id)
    assert set(fleet.stored(again, "refs").values()) == {b"30"}
    results = await fleet.run(batch, 30)
    assert all(result.success for result in results)
    assert (
        not fleet.stored(batch, "blob") | fleet.stored(batch, "uses") | fleet.stored(batch, "refs")
    )
    await fleet.submit(rows, batch_id=batch.id)
    assert not fleet.stored(batch, "blob")


async def test_a_failure_keeps_its_parts_for_a_retry(fleet: Fleet) -> None:
    """And a retry sends them again."""
    image = png(200, 150)
    fleet.provider.change(error_rate=1.0, error_statuses=(400,))
    batch = await fleet.submit([chat(image)])
    [failed] = await fleet.run(batch, 1)
    assert not failed.success
    assert image in fleet.stored(batch, "blob").values()
    fleet.provider.change(error_rate=0.0)
    await asyncio.to_thread(batch.retry_failed)
    found = await fleet.run(batch, 1)
    assert any(result.success for result in found)
    assert fleet.bodies[0] == fleet.bodies[-1]
    assert not fleet.stored(batch, "blob")


async def test_a_changed_row_gives_its_old_part_back(fleet: Fleet) -> None:
    """The part that both need stays; nothing is left at the end."""
    first, second, shared = png(seed=1), png(seed=2), png(seed=3)
    rows = [chat(first, "a"), chat(shared, "b")]
    batch = await fleet.submit(rows, batch_id="edited")
    again = [chat(second, "a"), chat(shared, "changed")]
    await fleet.submit(again, batch_id="edited")
    assert {first, second, shared} & set(fleet.stored(batch, "blob").values()) == {second, shared}
    await fleet.run(batch, 2)
    assert not fleet.stored(batch, "blob")


async def test_a_part_that_redis_has_lost_fails_its_row_alone(fleet: Fleet) -> None:
    """It says what to do."""
    batch = await fleet.submit([chat(png()), "a text"])
    with redis.Redis.from_url(fleet.url) as client:
        client.delete(Keys(fleet.settings.namespace).batch(batch.id).blob)
    lost, fine = await fleet.run(batch, 2)
    assert fine.success
    assert lost.error_kind is FailureKind.INVALID_INPUT
    assert "submit it again" in (lost.error or "")
