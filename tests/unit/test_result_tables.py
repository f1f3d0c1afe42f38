"""Results as tables and in groups: what stands in the columns, and what is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchllm_celery.cli import cli
from batchllm_celery.errors import FailureKind, UsageError
from batchllm_celery.files import table_rows, write_table
from batchllm_celery.files.failures import group_failures
from batchllm_celery.files.result_file import OutputError
from batchllm_celery.files.tables import read_results, table_suffix, to_arrow, to_pandas, to_polars
from batchllm_celery.models import TokenUsage, WorkItemResult


def result(index: int, output: Any = "yes", context: Any = None, **fields: Any) -> dict[str, Any]:
    return WorkItemResult(
        item_id=f"r{index}", index=index, success=output is not None, output=output,
        context=context, token_usage=TokenUsage(input_tokens=3, output_tokens=1), **fields,
    ).to_json()  # fmt: skip


def failed(index: int, kind: FailureKind, error: str) -> dict[str, Any]:
    return result(index, None, error=error, error_kind=kind)


LINES = [
    result(0, {"label": "good", "score": 1}, {"text": 'Grüße, "x"', "n": 1, "cost": 7}, cost=0.5),
    result(1, {"label": "bad", "tags": ["a"]}, {"text": "two\nlines", "n": 2.5}),
    failed(2, FailureKind.VALIDATION, "it failed"),
    result(3, "plain", ["a", "list"]),
]
COLUMNS = [
    "item_id", "index", "text", "n", "context.cost", "context", "output", "output.label",
    "output.score", "output.tags", "success", "error_kind", "error", "attempts", "input_tokens",
    "output_tokens", "cached_input_tokens", "total_tokens", "cost", "seconds",
]  # fmt: skip


def lines() -> Iterable[dict[str, Any]]:
    return iter(LINES)


def csv_rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_csv_holds_source_row_and_output_beside_each_other(tmp_path: Path) -> None:
    assert write_table(lines, str(tmp_path / "x.csv")) == 4
    rows = csv_rows((tmp_path / "x.csv").read_bytes())
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    assert rows[0]["text"] == 'Grüße, "x"'
    assert rows[1]["text"] == "two\nlines"
    assert (rows[0]["output.label"], rows[0]["output.score"]) == ("good", "1")
    assert (rows[0]["cost"], rows[0]["context.cost"]) == ("0.5", "7")
    assert json.loads(rows[1]["output.tags"]) == ["a"]
    assert (rows[2]["success"], rows[2]["error_kind"]) == ("false", "validation")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz", ".csv.zst", ".jsonl.zst"])
def test_compressed_tables_are_read_back(tmp_path: Path, suffix: str) -> None:
    out = str(tmp_path / f"x{suffix}")
    write_table(lines, out)
    data = Path(out).read_bytes()
    if suffix.endswith(".gz"):
        text = gzip.decompress(data)
    else:
        import zstandard

        text = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    if ".csv" in suffix:
        assert len(csv_rows(text)) == 4
    else:
        assert list(read_results(out)()) == LINES


def test_parquet_and_frames_have_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(lines, str(tmp_path / "x.parquet"))
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names[: len(COLUMNS)] == COLUMNS
    assert str(table.schema.field("n").type) == "double"
    assert str(table.schema.field("index").type) == "int64"
    assert table.column("output.label").to_pylist() == ["good", "bad", None, None]
    assert table.column("output").to_pylist()[3] == "plain"
    assert to_arrow(LINES).num_rows == 4
    pytest.importorskip("pandas")
    frame = to_pandas(LINES)
    assert list(frame["output.label"][:2]) == ["good", "bad"]
    assert list(frame.columns[: len(COLUMNS)]) == COLUMNS
    pytest.importorskip("polars")
    assert to_polars(LINES)["n"].to_list() == [1.0, 2.5, None, None]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    write_table(lines, str(tmp_path / "x.csv"), ["output.label", "item_id"])
    assert (tmp_path / "x.csv").read_text().splitlines()[:2] == ["output.label,item_id", "good,r0"]
    with pytest.raises(UsageError, match=r"no 'label'.*output\.label"):
        write_table(lines, str(tmp_path / "x.csv"), ["label"])


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.xlsx", r"use \.csv"),
        ("x.feather", r"use \.parquet"),
        ("x.jsonl.bz2", r"use \.gz"),
        ("x.parquet.gz", "leave .gz out"),
    ],
)
def test_what_is_not_written_is_refused(out: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        table_suffix(out)


def test_other_names_are_jsonl() -> None:
    assert [table_suffix(name) for name in ("x.jsonl", "x", "x.out", "a.csv.results")] == [None] * 4


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(OutputError, match="line 1 is not a result"):
        list(read_results(str(tmp_path / "x.jsonl"))())


def test_export_and_failures_as_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    command = ["export", "out.jsonl", "-o", "y.csv", "--columns", "item_id,cost"]
    assert CliRunner().invoke(cli, command, standalone_mode=False).exception is None
    assert Path("y.csv").read_text().splitlines()[1] == "r0,0.5"
    told = CliRunner().invoke(cli, ["failures", "out.jsonl"], standalone_mode=False)
    assert "1 of 4 results failed" in told.output
    assert "validation  it failed" in told.output
    assert "e.g. r2" in told.output


def test_failures_of_one_cause_are_one_group() -> None:
    many = [
        failed(n, FailureKind.OVERLOADED, f"call {n} of 'row {n}' took {n}.5 s (id 0af3{n:08x})")
        for n in range(10)
    ]
    odd = [failed(99, FailureKind.OVERLOADED, "another"), result(100)]
    total, groups = group_failures(many + odd)
    assert total == 12
    found = [(group.count, group.examples) for group in groups]
    assert found == [(10, ["r0", "r1", "r2"]), (1, ["r99"])]


def test_rows_of_any_table_can_be_submitted() -> None:
    rows = [{"id": 1, "text": "one", "n": float("nan")}, {"id": 2, "text": "two", "n": 2.0}]
    expected = [
        {"item_id": "1", "prompt": "Say one", "context": {"id": 1, "text": "one", "n": None}},
        {"item_id": "2", "prompt": "Say two", "context": {"id": 2, "text": "two", "n": 2.0}},
    ]
    frames = [pytest.importorskip(name).DataFrame(rows) for name in ("pandas", "polars")]
    arrow = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    tables: list[Any] = [rows, *frames, arrow]
    for table in tables:
        assert list(table_rows(table, prompt="Say {text}", id_column="id")) == expected
    assert [row["prompt"] for row in table_rows(rows, text_column="text")] == ["one", "two"]
    with pytest.raises(UsageError, match="one of"):
        list(table_rows(rows))
