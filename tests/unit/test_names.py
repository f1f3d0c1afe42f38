"""Names are single words: what is no name is refused wherever it comes in, and shown harmlessly."""

from __future__ import annotations

from typing import Any

import pytest

from batchllm_celery.errors import UsageError
from batchllm_celery.models import BatchSpec, Quota, StrategySpec
from batchllm_celery.models.names import as_label, check_batch_id, check_label, check_queue
from batchllm_celery.producer import Producer
from batchllm_celery.settings import Settings
from batchllm_celery.strategies.callable import CallableStrategy
from batchllm_celery.strategies.registry import Registration, StrategyCatalog

NO_NAMES: list[Any] = [
    "", " ", ".", "..", "...", "../other", "/etc", "a/b", "a\\b", "-x", "--help", ".hidden",
    "a\n", "\na", "a\nb", "a\0b", "a b", "a" * 10_000, "caf\u00e9", "\u202eabc", "\uff0e\uff0e",
    "a\u0000", "{a}", "a*", "~", "$HOME", "a;b", "\x1b[31m", "\ud800", None, 7, b"a",
]  # fmt: skip
NAMES = ["a", "0", "reviews-2026.11", "b_1", "_x", "A" * 100, "a..b"]


@pytest.mark.parametrize("value", NO_NAMES)
def test_what_is_no_batch_id_is_refused_and_shown_safely(value: Any) -> None:
    """The message is one short line of plain ASCII, whatever the value holds."""
    with pytest.raises(UsageError) as refused:
        check_batch_id(value)

    said = str(refused.value)
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 200


@pytest.mark.parametrize("name", NAMES)
def test_one_word_is_a_name(name: str) -> None:
    """Letters, digits, dots, underscores and dashes in all usual orders."""
    assert check_batch_id(name) == name
    assert Settings(namespace=name, queue=name).queues == [name]


def test_the_queue_of_the_longest_batch_id_is_a_queue() -> None:
    """`run` makes a private queue of a batch id."""
    assert check_queue("run." + "a" * 100)


@pytest.mark.parametrize("value", [bad for bad in NO_NAMES if bad not in ("a/b", b"a", None)])
def test_models_refuse_what_is_no_name(value: Any) -> None:
    """Batches, queues, quotas, strategies and namespaces alike, from Python too."""
    fine: dict[str, Any] = {"batch_id": "b", "strategy": {"name": "s"}}
    for field in ("batch_id", "queue", "quota"):
        with pytest.raises(ValueError):
            BatchSpec.model_validate(fine | {field: value})
    with pytest.raises(ValueError):
        StrategySpec(name=value)
    with pytest.raises(ValueError):
        Quota(name=value)
    with pytest.raises(ValueError):
        Settings(namespace=value)
    with pytest.raises(UsageError):
        StrategyCatalog().register(Registration(value, CallableStrategy))
    with pytest.raises(UsageError):
        StrategyCatalog().register(Registration("fine", CallableStrategy, quota=value))


@pytest.mark.parametrize("value", ["..", "-x", "a/b", "", "a\nb"])
def test_a_producer_refuses_before_it_connects(value: str) -> None:
    """To submit, to stream and to attach; there is no Redis at this address."""
    with Producer(redis_url="redis://127.0.0.1:1/0") as producer:
        with pytest.raises(UsageError, match="batch id"):
            producer.submit(["one"], strategy="simulated", batch_id=value)
        with pytest.raises(UsageError, match="batch id"):
            list(producer.stream(["one"], strategy="simulated", batch_id=value))
        with pytest.raises(UsageError, match="batch id"):
            producer.attach(value)


def test_queues_are_checked_one_by_one() -> None:
    """A list of queues is as good as its worst one."""
    assert Settings(queue="a, b").queues == ["a", "b"]
    with pytest.raises(ValueError, match=r"queue \'\.\./b\'"):
        Settings(queue="a,../b")


def test_a_models_name_becomes_a_quotas_name() -> None:
    """What providers call their models is kept where it can be, and escaped where not."""
    for plain in ("gemini:gemini-2.5-flash", "openai:meta-llama/Llama-3", "openai:ft:gpt:org::id"):
        assert as_label(plain) == plain
    for odd in ("openai:My Model", "openai:a{b}c", "\n", "-", "", "\ud800", "x" * 300, "é"):
        check_label(as_label(odd), "quota name")
