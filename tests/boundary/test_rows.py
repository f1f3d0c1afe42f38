"""Whatever a file or a program holds: each row ends once, called once at most, and comes back."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery import FailureKind, LLMCallStrategy, strategy
from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.files import Rows
from batchllm_celery.models import BadRow, StrategySpec, WorkItemResult
from tests.boundary import row_cases as made
from tests.boundary.harness import (
    SEED,
    Bench,
    Violation,
    all_logs,
    check_logs,
    check_texts,
    chosen,
    count,
    replay,
    require,
)

CHUNK = 250
SPEC = StrategySpec(name="boundary-echo")


@strategy("boundary-echo", quota="wide")
def echo() -> LLMCallStrategy[str]:
    return made.Echo()


@pytest.fixture
def bench(redis_url: str, namespace: str) -> Iterator[Bench]:
    with Bench(redis_url, namespace, real_limiter=True) as opened:
        yield opened


def _read(bench: Bench, path: Path) -> tuple[list[Any], list[WorkItemResult[Any, Any]]]:
    rows = list(Rows(str(path), SPEC))
    made.calls.clear()
    with all_logs() as logged:
        results = bench.run(rows, "boundary-echo")
    check_logs(logged, ["echo row"])
    require(
        sorted(result.index for result in results) == list(range(len(rows))),
        f"{len(results)} results of {len(rows)} rows",
    )
    prompts = Counter(row.prompt for row in rows if not isinstance(row, BadRow))
    require(made.calls <= prompts, f"called more than once: {list(made.calls - prompts)[:5]}")
    return rows, sorted(results, key=lambda result: result.index)


def _jsonl(bench: Bench, tmp_path: Path, numbers: list[int]) -> None:
    numbers = chosen("rows", numbers)
    if not numbers:
        return
    lines = [made.jsonl(number, SEED) for number in numbers]
    end = b"\r\n" if numbers[0] % 2 else b"\n"
    data = end.join([b'{"prompt": "the first"}', *(line.data for line in lines)])
    path = tmp_path / "rows.jsonl"
    if numbers[0] % 3 == 0:
        path, data = tmp_path / "rows.jsonl.gz", gzip.compress(data)
    path.write_bytes(data)
    rows, results = _read(bench, path)
    require(len(rows) == 1 + len(lines), f"{len(rows) - 1} rows of {len(lines)} lines")
    wrong = []
    for number, line, result in zip(numbers, lines, results[1:], strict=True):
        try:
            _check(line, result)
        except Violation as problem:
            wrong.append(f"{replay('rows', number)}\n  {line.data[:200]!r}\n  {problem}")
    assert not wrong, f"{len(wrong)} violations:\n" + "\n".join(wrong[:20])


def _check(line: made.Line, result: WorkItemResult[Any, Any]) -> None:
    check_texts(result, [])
    if line.good is not None:
        require(result.success is line.good, f"success {result.success}: {result.error}")
    if not result.success:
        require(result.error_kind is FailureKind.INVALID_INPUT, f"{result.error_kind}")
        require(bool(result.error), "a failure without a word")
        require(result.attempts == 0, "a bad row is called")
    elif line.prompt is not None:
        require(result.output == f"echo {line.prompt}", f"another prompt: {result.output!r}")
        require(result.context == line.context, f"another context: {result.context!r}"[:300])


def _csv(bench: Bench, tmp_path: Path, first: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(made.csv_file(first, 50, SEED))
    rows, results = _read(bench, path)
    for row, result in zip(rows, results, strict=True):
        check_texts(result, [])
        if isinstance(row, BadRow):
            require(result.error_kind is FailureKind.INVALID_INPUT, f"{result.error_kind}")
        else:
            require(result.output == f"echo {row.prompt}", f"{result.output!r} of {row.prompt!r}")
            require(result.context == row.context, f"{result.context!r} of {row.context!r}")


def _objects(bench: Bench, numbers: list[int]) -> None:
    """Refused by name, nothing of the batch running on; or run, once."""
    wrong = []
    for number in chosen("objects", numbers):
        made.calls.clear()
        try:
            results = bench.run(
                ["before", made.program_row(number, SEED), "after"], "boundary-echo"
            )
            require(sorted(result.index for result in results) == [0, 1, 2], "not one each")
            require(max(made.calls.values()) <= 2, f"calls {made.calls}")
            for result in results:
                check_texts(result, [])
                if not result.success:
                    require(result.error_kind is FailureKind.INVALID_INPUT, f"{result.error}")
        except (UsageError, InputError) as refusal:
            words = str(refusal)
            if "item 1" not in words and "0:" not in words:
                wrong.append(f"{replay('objects', number)}\n  names no row: {words[:200]}")
        except Violation as problem:
            wrong.append(f"{replay('objects', number)}\n  {problem}")
        except SystemExit:  # the program's own object, in the program's own process
            pass
        except Exception as error:
            wrong.append(f"{replay('objects', number)}\n  {type(error).__name__}: {error}"[:300])
    assert not wrong, f"{len(wrong)} violations:\n" + "\n".join(wrong[:20])
    assert not [one for one in bench.producer.batches() if not _over(one)]


def _over(progress: Any) -> bool:
    return bool(progress.is_over or progress.state.stopped)


def test_each_row_of_a_file_ends_once(bench: Bench, tmp_path: Path) -> None:
    """The short form: the same cases each time."""
    _jsonl(bench, tmp_path, list(range(250)))
    _csv(bench, tmp_path, 0)
    _objects(bench, list(range(40)))


@pytest.mark.boundary
@pytest.mark.parametrize("first", range(0, count(2500), CHUNK))
def test_each_row_of_a_file_ends_once_long(bench: Bench, tmp_path: Path, first: int) -> None:
    _jsonl(bench, tmp_path, list(range(1000 + first, 1000 + first + CHUNK)))
    for part in range(5):
        _csv(bench, tmp_path, 1000 + first + part * 50)
    _objects(bench, list(range(1000 + first, 1000 + first + 50)))
