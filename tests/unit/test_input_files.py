"""Files as people have them: each format, encoding and delimiter, and broken ones of each.
Right rows become right items, or one line names the file, the place and what to do."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.files.prompt_template import PromptTemplate
from batchllm_celery.files.rows import Rows
from batchllm_celery.models import BadRow, LLMWorkItem, StrategySpec

SPEC = StrategySpec(name="gemini", params={"model": "m"})
TEXTS = ['Grüße; "quoted", aus Köln', "naïve café\tor two | three", "plain, with a comma"]
NAMES = ("id", "text", "n")
RECORDS = [dict(zip(NAMES, (f"r{i}", text, i), strict=True)) for i, text in enumerate(TEXTS)]
TEMPLATE = PromptTemplate("Say {text}")
EXPECTED = [(f"r{i}", f"Say {text}") for i, text in enumerate(TEXTS)]

Content = Callable[[], bytes]


def csv_of(delimiter: str, encoding: str = "utf-8", first: str = "") -> bytes:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerow(NAMES)
    writer.writerows(record.values() for record in RECORDS)
    return (first + table.getvalue()).encode(encoding)


def jsonl(encoding: str = "utf-8") -> bytes:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    return "".join(lines).encode(encoding)


def array(indent: int | None = None) -> bytes:
    return json.dumps(RECORDS, indent=indent, ensure_ascii=False).encode()


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), buffer)
    return buffer.getvalue()


def excel() -> bytes:
    pytest.importorskip("python_calamine")
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(NAMES)
    for record in RECORDS:
        book.active.append(list(record.values()))
    book.create_sheet("other").append(["no"])
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    import zstandard

    compressor = zstandard.ZstdCompressor()
    half = len(content) // 2  # two frames, as `zstd` writes them for parts
    return compressor.compress(content[:half]) + compressor.compress(content[half:])


GOOD: list[tuple[str, Content, dict[str, Any], str]] = [
    ("rows.jsonl", jsonl, {}, "JSONL"),
    ("rows.ndjson", jsonl, {}, "JSONL"),
    ("rows", jsonl, {}, "JSONL"),
    ("rows.jsonl", lambda: b"\xef\xbb\xbf" + jsonl(), {}, "JSONL"),
    ("rows.jsonl", lambda: jsonl().replace(b"\n", b"\r\n"), {}, "JSONL"),
    ("rows.jsonl.gz", lambda: gzip.compress(jsonl()), {}, "JSONL, gzip"),
    ("rows.jsonl.zst", lambda: zstd(jsonl()), {}, "JSONL, zstd"),
    ("rows.jsonl", lambda: zstd(jsonl()), {}, "JSONL, zstd"),
    ("rows.jsonl", lambda: jsonl("cp1252"), {"encoding": "cp1252"}, "JSONL"),
    ("rows.json", jsonl, {}, "JSONL"),
    ("rows.json", array, {}, "a JSON array"),
    ("rows.json", lambda: array(2), {}, "a JSON array"),
    ("rows.json", lambda: b"\xef\xbb\xbf" + array(2), {}, "a JSON array"),
    ("rows.json.gz", lambda: gzip.compress(array()), {}, "a JSON array, gzip"),
    ("rows", array, {"format": "json"}, "a JSON array"),
    ("rows.csv", lambda: csv_of(","), {}, "CSV, separated by commas, 3 columns"),
    ("rows.csv", lambda: csv_of(";"), {}, "CSV, separated by semicolons, 3 columns"),
    ("rows.csv", lambda: csv_of("\t"), {}, "CSV, separated by tabs, 3 columns"),
    ("rows.csv", lambda: csv_of("|"), {}, "CSV, separated by bars, 3 columns"),
    ("rows.csv", lambda: csv_of("~"), {"delimiter": "~"}, "CSV, separated by '~', 3 columns"),
    ("rows.csv", lambda: csv_of(";", first="sep=;\r\n"), {}, "CSV, separated by semicolons"),
    ("rows.tsv", lambda: csv_of("\t"), {}, "CSV, separated by tabs"),
    ("rows", lambda: csv_of(";"), {}, "CSV, separated by semicolons"),
    ("rows.csv", lambda: csv_of(",", "utf-8-sig"), {}, "CSV, separated by commas"),
    ("rows.csv", lambda: csv_of(";", "cp1252"), {"encoding": "cp1252"}, "CSV, separated by semi"),
    ("rows.csv", lambda: csv_of(",", "utf-16"), {"encoding": "utf-16"}, "CSV, separated by commas"),
    ("rows.csv.gz", lambda: gzip.compress(csv_of(",")), {}, "CSV, separated by commas"),
    ("rows.csv.zst", lambda: zstd(csv_of(",")), {}, "CSV, separated by commas"),
    ("rows.parquet", parquet, {}, "Parquet"),
    ("rows", parquet, {}, "Parquet"),
    ("rows.xlsx", excel, {}, "Excel, its first sheet"),
]


@pytest.mark.parametrize(("name", "content", "options", "words"), GOOD)
def test_every_file_gives_the_same_items(
    tmp_path: Path, name: str, content: Content, options: dict[str, Any], words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    rows = Rows(str(path), SPEC, template=TEMPLATE, id_column="id", **options)
    items = list(rows)
    assert [(item.item_id, getattr(item, "prompt", item)) for item in items] == EXPECTED
    assert words in rows.words
    assert [item.item_id for item in rows.again()] == [item.item_id for item in items]


BROKEN: list[tuple[str, Content, dict[str, Any], str]] = [
    ("rows.jsonl.bz2", lambda: b"BZh91AY&SY", {}, "bunzip2 -k"),
    ("rows.csv.xz", lambda: b"\xfd7zXZ\x00\x00", {}, "unxz -k"),
    ("rows.xls", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1", {}, "soffice --convert-to xlsx"),
    ("rows.zip", lambda: b"PK\x03\x04rows.csv", {}, "unzip"),
    ("rows.pdf", lambda: b"%PDF-1.7", {}, "pdftotext"),
    ("rows.db", lambda: b"SQLite format 3\x00", {}, "sqlite3 -csv"),
    ("rows.feather", lambda: b"ARROW1\x00\x00", {}, "to_parquet"),
    ("page.html", lambda: b"<!DOCTYPE html><p>x</p>", {}, "is an HTML page"),
    ("README.md", lambda: b"# Title\n\ntext\n", {}, "--format text"),
    ("rows.bin", lambda: bytes(range(256)), {}, "null bytes"),
    ("rows.csv", lambda: csv_of(",", "utf-16-le"), {}, "--encoding utf-16-le"),
    ("rows.csv", lambda: csv_of(",", "utf-16"), {}, "--encoding utf-16"),
    ("rows.csv", lambda: csv_of(","), {"encoding": "klingon"}, "--encoding 'klingon' is not known"),
    ("rows.csv", lambda: csv_of(","), {"id_column": "no"}, "no column 'no'"),
    ("rows.csv", lambda: csv_of(","), {"delimiter": ";"}, "no column"),
    ("rows.parquet", lambda: parquet()[:200], {}, "is not Parquet that can be read"),
    ("rows.xlsx", lambda: b"PK\x03\x04nonsense", {}, "is no Excel file that can be read"),
    ("rows.jsonl.gz", lambda: gzip.compress(jsonl())[:30], {}, "can't be read to its end"),
    ("rows.jsonl.zst", lambda: zstd(jsonl())[:40], {}, "rows.jsonl.zst"),
    ("rows.json", lambda: array()[:-5], {}, "is not JSON|has no end"),
    ("rows.json", lambda: json.dumps({"data": RECORDS}, indent=1).encode(), {}, "jq -c"),
    ("rows.jsonl", jsonl, {"id_column": None, "template": None}, "--prompt 'Summarise: {text}'"),
    ("rows.csv", lambda: csv_of(";"), {"template": None}, "--prompt 'Summarise: {text}'"),
    ("rows.parquet", parquet, {"template": None}, "--prompt 'Summarise: {text}'"),
    ("rows.jsonl", jsonl, {"template": PromptTemplate("{body}")}, "no field 'body'"),
    ("rows.jsonl", jsonl, {"template": None, "text_column": "x"}, "no (field|column) 'x'"),
]


@pytest.mark.parametrize(("name", "content", "options", "words"), BROKEN)
def test_what_cant_be_read_is_one_line_with_a_remedy(
    tmp_path: Path, name: str, content: Content, options: dict[str, Any], words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    options = {"template": TEMPLATE, "id_column": "id", **options}
    with pytest.raises(InputError, match=words) as caught:
        list(Rows(str(path), SPEC, **options))
    if "klingon" not in words:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_another_encoding_say_what_to_give(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(csv_of(",", "cp1252"))
    rows = list(Rows(str(path), SPEC, template=TEMPLATE, id_column="id"))
    assert [type(row) for row in rows] == [BadRow, BadRow, LLMWorkItem]
    assert isinstance(rows[0], BadRow)
    assert "--encoding, as cp1252" in rows[0].message


def test_a_row_that_only_python_reads_keeps_its_id(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"item_id": "a", "prompt": "x", "n": NaN}\n{"item_id": "b", "prompt": "\\ud800"}\n'
        '{"item_id": "a", "prompt": "y"}\n{"prompt": "z"}\n'
    )
    rows = list(Rows(str(path), SPEC))
    assert [row.item_id for row in rows] == ["a", "b", "line-3", "3"]
    assert "'a' has been used" in str(rows[2])


def test_dates_that_python_cant_hold_fail_their_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    days = pyarrow.array([0, 10**9, 1], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.table({"text": ["a", "b", "c"], "day": days})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = list(Rows(str(tmp_path / "rows.parquet"), SPEC, template=TEMPLATE))
    assert [type(row) for row in rows] == [LLMWorkItem, BadRow, LLMWorkItem]
    assert isinstance(rows[1], BadRow)
    assert rows[1].message.startswith("row 2: ")


def test_dates_in_excel_are_text(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        [None, None],
        ["text", "when"],
        ["x", datetime.datetime(2025, 1, 2, 3, 4)],
        [],
        ["y"],
    ):
        book.active.append(row)
    book.save(tmp_path / "rows.xlsx")
    rows = list(Rows(str(tmp_path / "rows.xlsx"), SPEC, text_column="text"))
    contexts = [(row.prompt, row.context) for row in rows if isinstance(row, LLMWorkItem)]
    assert contexts == [
        ("x", {"text": "x", "when": "2025-01-02T03:04:00"}),
        ("y", {"text": "y", "when": None}),
    ]


# -- several inputs, folders, selection


def test_a_folder_is_one_item_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo")
    (folder / "sub" / "b.md").write_text("# three")
    (folder / "c.png").write_bytes(b"\x89PNG")
    (folder / "d.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / ".hidden").write_text("no")
    rows = list(Rows(str(folder), SPEC))
    assert [(row.item_id, getattr(row, "prompt", None)) for row in rows] == [
        ("a.txt", "one\ntwo"), ("c.png", None), ("d.txt", None), ("sub/b.md", "# three")
    ]  # fmt: skip
    told = list(Rows(str(folder), SPEC, template=PromptTemplate("{file}: {text}")))
    assert getattr(told[0], "prompt", None) == "a.txt: one\ntwo"


def test_several_inputs_are_read_one_after_the_other(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.jsonl"
    first.write_bytes(csv_of(";"))
    second.write_text('{"id": "r0", "text": "again"}\n{"id": "new", "text": "x"}\n')
    rows = list(Rows([str(first), str(second)], SPEC, template=TEMPLATE, id_column="id"))
    assert [row.item_id for row in rows] == ["r0", "r1", "r2", "line-1", "new"]
    assert isinstance(rows[3], BadRow)
    assert rows[3].message.startswith(f"{second}: line 1: item_id 'r0' has been used")


def test_limit_and_sample_select(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"row {i}\n" for i in range(200)))

    def prompts(**options: Any) -> list[str]:
        return [getattr(row, "prompt", "") for row in Rows(str(path), SPEC, **options)]

    assert prompts(limit=3) == ["row 0", "row 1", "row 2"]
    chosen = prompts(sample=20, seed=1)
    assert chosen == prompts(sample=20, seed=1) != prompts(sample=20, seed=2)
    assert len(set(chosen)) == 20
    assert chosen == sorted(chosen, key=lambda text: int(text.split()[1]))
    assert prompts(sample=500) == prompts()


def test_a_pipe_is_read_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(gzip.compress(csv_of(";")))
    with os.fdopen(read_end, "rb") as stdin:
        monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": stdin}))
        rows = list(Rows("-", SPEC, template=TEMPLATE, id_column="id"))
    assert [(row.item_id, getattr(row, "prompt", None)) for row in rows] == EXPECTED


# -- templates


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("{a.b}", {"a": {"b": "x"}}, "x"),
        ("{a.b}", {"a.b": "flat", "a": {"b": "x"}}, "flat"),
        ("{a.1.b}", {"a": [0, {"b": "x"}]}, "x"),
        ("{a.b}", {"a": {"b": {"c": 1}}}, '{"c": 1}'),
        ("{{a.b}} {a}", {"a": "x"}, "{a.b} x"),
    ],
)
def test_fields_inside_objects(template: str, row: dict[str, Any], expected: str) -> None:
    assert PromptTemplate(template).fill(row) == expected


def test_options_that_exclude_each_other() -> None:
    from batchllm_celery.cli.request import CommandRequest, rows_of, text_of

    with pytest.raises(UsageError, match="--text-column"):
        rows_of(CommandRequest(prompt="{a}", text_column="a"), ["x"], SPEC)
    with pytest.raises(UsageError, match="--sample"):
        rows_of(CommandRequest(limit=1, sample=1), ["x"], SPEC)
    with pytest.raises(UsageError, match="--prompt @nowhere"):
        text_of("@nowhere", "--prompt")
