"""What a producer takes as rows, and what it refuses by name; on a real Valkey, no worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis

from batchllm_celery import LLMWorkItem, Producer
from batchllm_celery.errors import BatchConflictError, UsageError
from batchllm_celery.files import PromptTemplate, Rows
from batchllm_celery.keys import Keys
from batchllm_celery.models import ProcessorConfig, Quota, QuotaLimits, StrategySpec
from tests.support import ValkeyServer


@pytest.fixture
def producer(valkey: ValkeyServer, namespace: str) -> Iterator[Producer]:
    with Producer(redis_url=valkey.url, namespace=namespace) as opened:
        yield opened


class Table:
    """As pandas' DataFrame: iterating gives the column names."""

    columns = ("id", "text")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, form: str) -> list[dict[str, str]]:
        return [{"id": "1", "text": "x"}]


class PolarsTable(Table):
    def to_dicts(self) -> list[dict[str, str]]:
        return []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("hello", "wrap it in a list"),
        ({"prompt": "hello"}, "wrap it in a list"),
        (b"hello", "wrap it in a list"),
        (bytearray(b"hello"), "wrap it in a list"),
        (LLMWorkItem("a", "s", "hello"), "wrap it in a list"),
        (Path("rows.jsonl"), "read the file"),
        (Table(), r"to_dict\('records'\)"),
        (PolarsTable(), r"to_dicts\(\)"),
        (5, "must be an iterable"),
        (None, "must be an iterable"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_at_once(
    producer: Producer, rows: Any, words: str
) -> None:
    """Python would iterate over it: five items for "hello". No batch is made."""
    with pytest.raises(UsageError, match=words):
        producer.submit(rows, strategy="s")
    with pytest.raises(UsageError, match=words):
        next(producer.stream(rows, strategy="s"))
    assert producer.batches() == []


@pytest.mark.parametrize(
    "rows", [["a", "b"], ("a", "b"), iter(["a", "b"]), {"a": 1, "b": 2}.keys()]
)
def test_any_iterable_of_rows_is_taken(producer: Producer, rows: Any) -> None:
    """Lists, tuples, generators, views."""
    assert producer.submit(rows, strategy="s").progress().total == 2


class Unreadable(Mapping[str, Any]):
    """Fails where it is read, as a lazy one does whose file is gone."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, name: str) -> Any:
        raise self.error(name)

    def __iter__(self) -> Iterator[str]:
        raise self.error("names")

    def __len__(self) -> int:
        return 1


class Unnamed:
    def __str__(self) -> str:
        return str(1 // 0)


def circular() -> list[Any]:
    context: list[Any] = []
    context.append(context)
    return context


def row(**changes: Any) -> dict[str, Any]:
    return {"item_id": "odd", "prompt": "x", **changes}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (row(context=datetime(2026, 1, 1, tzinfo=UTC)), r"item 250 \(odd\): .*datetime"),
        (row(context={"price": Decimal(1)}), r"item 250 \(odd\): .*Decimal"),
        (row(context=circular()), r"item 250 \(odd\): .*JSON"),
        (row(context={(1, 2): "x"}), r"item 250 \(odd\): .*tuple"),
        # Without an id of its own, all that stands in it tells it from others.
        ({"prompt": "x", "context": circular()}, r"item 250 \(250\): .*JSON"),
        ({"prompt": "x", "context": {1: 2, "a": 3}}, r"item 250 \(250\): .*JSON"),
        (LLMWorkItem("odd", "s", "x", context={1, 2}), r"item 250 \(odd\): .*set"),
        (LLMWorkItem("odd", "s", ["x"]), r"item 250 \(odd\): its prompt is no text"),
        (row(temperature=0.5, model="m"), r"item 250: unknown key 'temperature', 'model'"),
        (row(Prompt="x"), r"item 250: unknown key 'Prompt'"),
        (row(item_id="id-3"), r"item 250: an earlier row has its item_id 'id-3'"),
        (row(item_id=" "), r"item 250: its item_id is empty"),
        (row(prompt=5), r"item 250: a row is a string"),
        (row(prompt="\ud83d"), r"item 250: half a surrogate pair"),
        ("a \udfff", r"item 250: half a surrogate pair"),
        (LLMWorkItem("odd", "s", "\ud800"), r"item 250: half a surrogate pair"),
        (Unreadable(RuntimeError), r"item 250 can't be read: RuntimeError"),
        (Unreadable(OSError), r"item 250 can't be read: OSError"),
        (row(item_id=Unnamed()), r"item 250 can't be read: ZeroDivisionError"),
        (5, r"item 250: a row is a string"),
    ],
)
def test_a_row_that_can_t_be_taken_is_named_and_nothing_runs_on(
    producer: Producer, odd: Any, words: str
) -> None:
    """The batch is cancelled and over: what was fed of it gets its outcome without a call."""
    rows = [{"item_id": f"id-{n}", "prompt": "x"} for n in range(250)]
    with pytest.raises(UsageError, match=words):
        producer.submit([*rows, odd, "y"], strategy="s", batch_id="half")
    progress = producer.attach("half").progress()
    assert progress.state == "cancelled"
    assert progress.fed < 251
    assert progress.total == progress.fed


def test_the_same_id_goes_on_with_what_was_given_up(producer: Producer) -> None:
    """Mending the row is all that is needed."""
    rows: list[Any] = [{"prompt": f"p{n}"} for n in range(250)]
    with pytest.raises(UsageError):
        producer.submit([*rows, {"text": "x"}], strategy="s", batch_id="half")
    batch = producer.submit([*rows, "mended"], strategy="s", batch_id="half")
    assert batch.progress().total == 251
    assert batch.progress().state == "running"


def test_a_generator_that_raises_gives_its_batch_up(producer: Producer) -> None:
    """Whatever ends the submission ends the batch."""

    def rows() -> Iterator[str]:
        yield from ("x" for _ in range(30))
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="gone"):
        producer.submit(rows(), strategy="s", batch_id="half")
    assert producer.attach("half").progress().state == "cancelled"


def test_ids_that_are_numbers_are_as_good_as_others(producer: Producer) -> None:
    """0 is one, and a row without an id may not take it again."""
    assert producer.submit([row(item_id=0), row(item_id=7)], strategy="s").progress().total == 2
    with pytest.raises(UsageError, match="item 1: an earlier row has its item_id '1'"):
        producer.submit([row(item_id=1), "x"], strategy="s")


REHEARSAL = ProcessorConfig(dry_run=True)


def test_a_rehearsal_never_takes_the_id_of_a_real_batch(producer: Producer) -> None:
    """Nor a real batch that of a rehearsal: paid answers and mock ones never mix."""
    producer.submit(["x"], strategy="s", batch_id="real")
    producer.submit(["x"], strategy="s", batch_id="mock", config=REHEARSAL)
    with pytest.raises(BatchConflictError, match="real batch"):
        producer.submit(["x"], strategy="s", batch_id="real", config=REHEARSAL)
    with pytest.raises(BatchConflictError, match="rehearsal"):
        producer.submit(["x"], strategy="s", batch_id="mock")
    with pytest.raises(BatchConflictError, match="real batch"):
        next(producer.stream(["x"], strategy="s", batch_id="real", config=REHEARSAL))
    assert not producer.attach("real").spec.config.dry_run


def test_a_rehearsal_is_kept_for_an_hour_and_changes_no_quota(
    producer: Producer, valkey: ValkeyServer, namespace: str
) -> None:
    """It is there to be looked at, not to stay."""
    quota = Quota(name="q", limits=QuotaLimits(requests_per_minute=5))
    batch = producer.submit(["x"], strategy="s", config=REHEARSAL, quota=quota)
    assert producer.quota("q") is None
    with redis.Redis.from_url(valkey.url) as client:
        assert 0 < client.ttl(Keys(namespace).batch(batch.id).meta) <= 3600


def test_rows_of_a_file_are_items(producer: Producer, tmp_path: Path) -> None:
    """Ids, prompts by a template, the rest as context; a bad row is a failure of its line."""
    path = tmp_path / "reviews.csv"
    path.write_text("item_id,text\na,first\nb\nc,third\n")
    rows = Rows(str(path), StrategySpec(name="s"), template=PromptTemplate("Say {text}"))
    batch = producer.submit(rows, strategy="s")
    progress = batch.progress()
    assert (progress.total, progress.failed) == (3, 1)
    (bad,) = batch.results(follow=False)
    assert "line 3" in str(bad.error)
