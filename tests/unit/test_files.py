"""Every form of input becomes the same rows; a bad row never hides a good one."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.files import readers
from batchllm_celery.files.item_ids import SeenIds
from batchllm_celery.files.native import NativeRows
from batchllm_celery.files.prompt_template import MissingFieldError, PromptTemplate
from batchllm_celery.files.rows import Rows, check_all, spooled
from batchllm_celery.models import BadRow, LLMWorkItem, NativeRequest, StrategySpec
from tests.unit.dialects.files import png

SPEC = StrategySpec(name="gemini", params={"model": "m"})
TEMPLATE = "Say {text}, please"


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BufferedReader(io.BytesIO(content))


AnyRow = LLMWorkItem[Any, Any, Any] | BadRow


def read(source: str, **options: Any) -> list[AnyRow]:
    return list(Rows(source, SPEC, **options))


def good(rows: list[AnyRow]) -> list[tuple[str, str, Any]]:
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [(row.item_id, row.prompt, row.context) for row in rows if isinstance(row, LLMWorkItem)]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


JSONL = '{"item_id": "a", "prompt": "one", "context": {"k": [1]}}\n{"prompt": "zwei ä"}\n'
OBJECTS = '{"item_id": "a", "text": "one", "n": 1}\n{"text": "two", "context": 7}\n'
OPENAI = json.dumps(
    {
        "custom_id": "r1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "gpt-x", "messages": [{"role": "user", "content": "one"}]},
    }
)
CHAT = NativeRequest(dialect="openai", body=json.loads(OPENAI)["body"])
AB = [("a", "one", {"k": [1]}), ("1", "zwei ä", None)]
SAID = [("a", "Say one, please", {"text": "one", "n": 1}), ("1", "Say two, please", 7)]
CSV = 'item_id,prompt,colour\na,one,red\n,"two, with ""quotes""\nand a line",blue\n'
CSV_ROWS = [
    ("a", "one", {"colour": "red"}),
    ("1", 'two, with "quotes"\nand a line', {"colour": "blue"}),
]


@pytest.mark.parametrize(
    ("name", "content", "template", "expected"),
    [
        pytest.param("a.jsonl", JSONL, None, AB, id="JSONL"),
        pytest.param("a.ndjson", JSONL.rstrip("\n"), None, AB, id="no line end at the end"),
        pytest.param("rows", JSONL, None, AB, id="JSONL known by its first line"),
        pytest.param("a.jsonl", "\ufeff" + JSONL, None, AB, id="a byte order mark"),
        pytest.param("a.jsonl", JSONL.replace("\n", "\r\n\r\n"), None, AB, id="CRLF, blank lines"),
        pytest.param("a.jsonl.gz", gzip.compress(JSONL.encode()), None, AB, id="gzip"),
        pytest.param("a.jsonl", OBJECTS, TEMPLATE, SAID, id="objects and --prompt"),
        pytest.param("a.jsonl", '{"item_id": 7, "prompt": "x"}', None, [("7", "x", None)], id="id"),
        pytest.param("a.jsonl", '{"prompt": "x", "n": 3}', None, [("0", "x", {"n": 3})], id="rest"),
        pytest.param("a.csv", CSV, None, CSV_ROWS, id="CSV"),
        pytest.param("rows", CSV, None, CSV_ROWS, id="CSV known by its header"),
        pytest.param("a.tsv", "item_id\tprompt\na\tone\n", None, [("a", "one", None)], id="TSV"),
        pytest.param(
            "a.csv", "text,n\none,1\n", TEMPLATE,
            [("0", "Say one, please", {"text": "one", "n": "1"})], id="CSV and --prompt",
        ),
        pytest.param(
            "a.txt", "one\r\n\n  two \n", None, [("0", "one", None), ("1", "  two ", None)],
            id="text",
        ),
        pytest.param("rows", "one\n", TEMPLATE, [("0", "Say one, please", None)], id="a"),
        pytest.param("batch.jsonl", OPENAI, None, [("r1", CHAT, None)], id="OpenAI batch file"),
    ],
)  # fmt: skip
def test_every_form_of_input_becomes_items(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str | bytes,
    template: str | None,
    expected: list[tuple[str, str, Any]],
) -> None:
    """Ids, prompts and contexts arrive whole, from a file and from standard input."""
    made = PromptTemplate(template) if template else None
    assert good(read(write(tmp_path, name, content), template=made)) == expected
    raw = content if isinstance(content, bytes) else content.encode()
    if name.endswith(".tsv"):
        return  # nothing but its name says what a tab means
    monkeypatch.setattr(sys, "stdin", Stdin(raw))
    assert good(read("-", template=made)) == expected


def test_parquet_rows_are_rows(tmp_path: Path) -> None:
    """Parquet goes by its columns; dates become text."""
    import datetime

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    day = datetime.date(2025, 1, 2)
    parquet.write_table(
        pyarrow.table({"item_id": ["a", None], "prompt": ["one", "two"], "day": [day, day]}), path
    )
    assert good(read(str(path))) == [
        ("a", "one", {"day": "2025-01-02"}),
        ("1", "two", {"day": "2025-01-02"}),
    ]


def test_parquet_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra is one clear line."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"batchllm-celery\[parquet\]"):
        read(write(tmp_path, "rows.parquet", b"PAR1"))


@pytest.mark.parametrize(
    ("name", "bad", "problem"),
    [
        ("a.jsonl", b"not json", "not JSON"),
        ("a.jsonl", b"[1, 2]", "not a JSON object but a list"),
        ("a.jsonl", b'{"item_id": "x"}', "no prompt"),
        ("a.jsonl", b'{"prompt": ""}', "no prompt"),
        ("a.jsonl", b'{"prompt": " "}', "blank"),
        ("a.jsonl", b'{"prompt": ["a"]}', "must be a text, not a list"),
        ("a.jsonl", b'{"item_id": "first", "prompt": "x"}', "'first' has been used"),
        ("a.jsonl", b'{"item_id": "0", "prompt": "x"}', None),
        ("a.jsonl", b'{"item_id": "", "prompt": "x"}', "item_id must be"),
        ("a.jsonl", b'{"item_id": true, "prompt": "x"}', "item_id must be"),
        ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "surrogate"),
        ("a.jsonl", b'{"prompt": "x", "context": NaN}', "NaN is not JSON"),
        ("a.jsonl", b'{"prompt": "x", "context": 1e400}', "1e400 is out of range"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"custom_id": "c", "body": {}}', "body.messages: is missing"),
        (
            "a.jsonl",
            b'{"custom_id": "c", "url": "/v1/embeddings", "body": {}}',
            "body.input: is missing",
        ),
        (
            "a.jsonl",
            b'{"body": {"messages": [{"content": [{"type": "image_url"}]}]}}',
            "no prompt",
        ),
        ("a.csv", b"only one", "1 fields, but the header has 2"),
        ("a.csv", b'x,"a" b', "not CSV"),
        ("a.csv", b"x,\xff", "not UTF-8"),
        ("a.csv", b"first,again", "'first' has been used"),
        ("a.txt", b"\xff", "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_stops_nothing(
    tmp_path: Path, name: str, bad: bytes, problem: str | None
) -> None:
    """The rows around a bad one are good, and its message says which line it is and why."""
    first, last = {
        "a.jsonl": (b'{"item_id": "first", "prompt": "1"}', b'{"item_id": "last", "prompt": "2"}'),
        "a.csv": (b"item_id,prompt\nfirst,1", b"last,2"),
        "a.txt": (b"1", b"2"),
    }[name]
    rows = read(write(tmp_path, name, b"\n".join([first, bad, last]) + b"\n"))
    assert len(rows) == 3
    assert isinstance(rows[0], LLMWorkItem)
    assert isinstance(rows[2], LLMWorkItem)
    assert [rows[0].prompt, rows[2].prompt] == ["1", "2"]
    if problem is None:
        assert isinstance(rows[1], LLMWorkItem)
        return
    assert isinstance(rows[1], BadRow)
    line = 3 if name == "a.csv" else 2
    assert rows[1].message.startswith(f"line {line}: ")
    assert problem in rows[1].message
    assert rows[1].item_id in (f"line-{line}", "x", "c", "1")


def test_a_huge_line_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that no provider would take is skipped without being held."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    rows = read(write(tmp_path, "a.txt", "one\n" + "x" * 5000 + "\nthree\n"))
    assert [type(row) for row in rows] == [LLMWorkItem, BadRow, LLMWorkItem]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "prompt\n", "has no rows"),
        ("a.txt", "\n \n", "has no rows"),
        ("a.json", '{"data": [{"prompt": "x"}],\n "n": 1}', r"jq -c '\.\"data\"\[\]'"),
        ("a.txt", "x".encode("utf-16"), "UTF-16"),
        ("a.csv", "text\nx\n", "no column 'prompt'"),
        ("a.csv", "prompt,prompt\nx,y\n", "stands twice"),
        ("a.parquet", "PAR1", "is not Parquet that can be read"),
        (None, None, "no such file"),
    ],
)
def test_an_input_that_cant_be_used_is_one_clear_line(
    tmp_path: Path, name: str | None, content: str | bytes | None, problem: str
) -> None:
    """An InputError names the file and what to do."""
    source = write(tmp_path, name, content or b"") if name else str(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match=problem) as caught:
        read(source)
    assert Path(source).name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strict_names_the_first_bad_rows_and_counts_all(tmp_path: Path) -> None:
    """--strict reads everything before it says what is wrong."""
    path = write(tmp_path, "a.jsonl", '{"prompt": "x"}\n' + "bad\n" * 7)
    with pytest.raises(InputError, match=r"7 of 8 rows .* line 2: .* and 2 more"):
        check_all(Rows(path, SPEC))


def test_strict_keeps_standard_input_to_read_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came by a pipe can be read twice."""
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo\n"))
    path = spooled("-")
    try:
        assert check_all(Rows(path, SPEC)) == 2
        assert len(read(path)) == 2
    finally:
        Path(path).unlink()


def test_a_row_of_a_batch_file_is_its_request_unchanged(tmp_path: Path) -> None:
    """Its own model has a strategy, and so a quota, of its own; no field is dropped."""
    body = {
        "model": "other",
        "messages": [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
        ],
        "temperature": 0,
        "logit_bias": {"5": 1},
    }
    path = write(tmp_path, "a.jsonl", json.dumps({"custom_id": "c", "body": body, "team": 7}))
    (own,) = list(Rows(path, None))
    assert isinstance(own, LLMWorkItem)
    assert own.prompt == NativeRequest(dialect="openai", body=body)
    assert own.strategy == StrategySpec(name="openai", params={"model": "other"})
    assert own.context == {"team": 7}
    (custom,) = list(Rows(path, StrategySpec(name="mine")))
    assert isinstance(custom, LLMWorkItem)
    assert custom.strategy == StrategySpec(name="mine")
    assert custom.prompt == own.prompt
    (refused,) = read(path)
    assert isinstance(refused, BadRow)
    assert "body.logit_bias: unsupported" in refused.message


def rows_naming(tmp_path: Path, *models: str) -> str:
    rows = [
        {"custom_id": f"c{n}", "body": {"model": model, "messages": [{"role": "user"}]}}
        for n, model in enumerate(models)
    ]
    return write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))


def test_one_model_too_many_is_one_clear_error(tmp_path: Path) -> None:
    """Before anything is enqueued; a thousand models are not a thousand quotas."""
    source = rows_naming(tmp_path, *(f"m{n}" for n in range(1000)))
    with pytest.raises(InputError, match=r"line 33 names 'm32', the model number 33 .*at most 32"):
        Rows(source, None)
    assert len(list(Rows(source, None, native=NativeRows(most_models=1000)))) == 1000
    two = Rows(rows_naming(tmp_path, *["a", "b"] * 50), None)
    two.close()
    assert len(two.native.models) == 2


def test_a_model_too_many_far_down_ends_the_reading(tmp_path: Path) -> None:
    """It is no bad row: what follows would have the same fault."""
    source = rows_naming(tmp_path, *["a"] * 1500, "b")
    rows = Rows(source, None, native=NativeRows(most_models=1))
    with pytest.raises(InputError, match="line 1501"):
        list(rows)


@pytest.mark.parametrize(
    ("native", "words"),
    [
        (NativeRows(provider="openai", model="a"), r"line 2 names the model 'b', and --model"),
        (NativeRows(refused=["system"]), r"--system would not apply; --override system"),
    ],
)
def test_options_that_don_t_go_with_such_rows_are_refused_by_name(
    tmp_path: Path, native: NativeRows, words: str
) -> None:
    """As a whole, at the first look."""
    with pytest.raises(InputError, match=words):
        Rows(rows_naming(tmp_path, "a", "b"), None, native=native)


def test_an_override_writes_options_into_the_bodies(tmp_path: Path) -> None:
    """In the body's own field."""
    native = NativeRows(
        provider="openai", model="mine", options={"model": "openai:mine", "temperature": 0.5}
    )
    for row in Rows(rows_naming(tmp_path, "a", "b"), None, native=native):
        assert isinstance(row, LLMWorkItem)
        assert row.prompt.body["model"] == "mine"
        assert row.prompt.body["temperature"] == 0.5
        assert row.strategy.params == {"model": "mine"}


def test_a_row_may_hold_a_chat_in_no_provider_s_format(tmp_path: Path) -> None:
    """With images and files of the input's folder, and of no other."""
    (tmp_path / "dot.png").write_bytes(png())
    (tmp_path / "outside").mkdir()
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "What?"}], "team": 1}
    rows = [
        {**chat, "system": "Be brief.", "images": ["dot.png"], "parameters": {"seed": 7}},
        {**chat, "images": ["../secret.png"]},
        {**chat, "files": ["/etc/passwd"]},
        {**chat, "images": ["link.png"]},
        {**chat, "parameters": {"sede": 7}},
    ]
    os.symlink("/etc/hostname", tmp_path / "link.png")
    found = read(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    good_row, *bad = found
    assert isinstance(good_row, LLMWorkItem)
    assert [message.role for message in good_row.prompt.messages] == ["system", "user"]
    assert [part.data for _, part in good_row.prompt.media()] == [png()]
    assert good_row.context == {"team": 1}
    messages = [row.message for row in bad if isinstance(row, BadRow)]
    assert all("outside of the folder" in message for message in messages[:3])
    assert "parameters.sede: is unknown" in messages[3]


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("{a} and {b}", {"a": "x{b}", "b": 2}, "x{b} and 2"),
        ('{a}: {"k": {"v": 1}}', {"a": "x"}, 'x: {"k": {"v": 1}}'),
        ("{{a}} is {a}", {"a": "x"}, "{a} is x"),
        ("{a.__class__}", {"a.__class__": "plain"}, "plain"),
        ("{a}", {"a": ["ä"]}, '["ä"]'),
        ("{first name}", {"first name": "Ada"}, "Ada"),
    ],
)
def test_a_template_takes_fields_and_nothing_else(
    template: str, row: dict[str, Any], expected: str
) -> None:
    """Braces in values and in JSON are text; a name is never looked up inside a value."""
    assert PromptTemplate(template).fill(row) == expected


def test_a_missing_field_is_named() -> None:
    """Neither an attribute nor a missing or null field fills a template."""
    for row in ({}, {"a": None}, {"a": "x"}):
        with pytest.raises(MissingFieldError, match=r"'a\.b'"):
            PromptTemplate("{a.b}").fill(row)


def test_a_template_without_fields_is_refused() -> None:
    """The same prompt for all rows is a slip."""
    with pytest.raises(UsageError, match="names no field"):
        PromptTemplate("Hello")


@settings(max_examples=50)
@given(
    st.lists(
        st.one_of(st.none(), st.integers(0, 60).map(str), st.text("a0é", max_size=3)), max_size=30
    )
)
def test_seen_ids_are_a_set(ids: list[str | None]) -> None:
    """Given ids and row numbers are told apart exactly as a set would."""
    seen, expected = SeenIds(), set[str]()
    for index, item_id in enumerate(ids):
        name = str(index) if item_id is None else item_id
        taken = seen.add_index(index) if item_id is None else seen.add(item_id)
        assert taken == (name not in expected)
        expected.add(name)


def test_seen_ids_take_few_bytes() -> None:
    """200,000 ids take at most 32 bytes each."""
    seen = SeenIds()
    assert all(seen.add(f"id-{number}") for number in range(200_000))
    assert not any(seen.add(f"id-{number}") for number in range(0, 200_000, 7))
    assert seen._slots.itemsize * len(seen._slots) <= 32 * 200_000 * 1.4


def test_the_share_of_the_input_that_was_read_is_known(tmp_path: Path) -> None:
    """A file's size gives an estimate of the total; a pipe gives none."""
    rows = Rows(write(tmp_path, "a.txt", "one\n" * 100_000), SPEC)
    assert rows.fraction_read is not None
    assert rows.fraction_read < 0.5
    assert len(list(rows)) == 100_000
    assert rows.fraction_read == 1.0
