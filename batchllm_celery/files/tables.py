"""Results as tables: CSV, Parquet, compressed JSONL, and DataFrames.

A table is written from a result file, in two passes: the first one finds the columns and their
types, so that memory holds a few thousand rows, however many there are.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from batchllm_celery.errors import UsageError
from batchllm_celery.files.readers import plain
from batchllm_celery.files.result_file import OutputError

Line = Mapping[str, Any]
Lines = Callable[[], Iterable[Line]]

#: Rows that are written to Parquet at once.
_GROUP = 5000
_COMPRESSIONS = (".gz", ".zst")
#: What is not written -> what to write instead.
_NOT_WRITTEN = {".xlsx": ".csv", ".xls": ".csv", ".ods": ".csv", ".feather": ".parquet"}
#: Columns before and after those of the source row and of the output.
_FIRST = ("item_id", "index")
_LAST = (
    "success", "error_kind", "error", "attempts", "input_tokens", "output_tokens",
    "cached_input_tokens", "total_tokens", "cost", "seconds", "finish_reason", "version",
)  # fmt: skip


def table_suffix(out: str) -> str | None:
    """The suffix that makes OUT a table, as `.csv` or `.jsonl.gz`; None for plain JSONL.

    Raises:
        UsageError: for a format that is not written, with what to write instead.
    """
    suffixes = [suffix.lower() for suffix in Path(out).suffixes]
    compression = suffixes[-1] if suffixes[-1:] and suffixes[-1] in _COMPRESSIONS else ""
    if compression:
        suffixes = suffixes[:-1]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _NOT_WRITTEN or suffix in (".bz2", ".xz", ".zip"):
        instead = _NOT_WRITTEN.get(suffix, ".gz")
        raise UsageError(
            f"-o {out}: {suffix} is not written; use {instead} "
            "(written are .jsonl, .csv and .parquet, each also as .gz or .zst)"
        )
    if suffix == ".parquet":
        if compression:
            raise UsageError(f"-o {out}: Parquet is compressed already; leave {compression} out")
        _pyarrow()
        return suffix
    if suffix in (".csv", ".tsv"):
        return suffix + compression
    return (suffix or ".jsonl") + compression if compression else None


def write_table(
    lines: Lines, out: str, columns: Sequence[str] | None = None, *, suffix: str | None = None
) -> int:
    """Write results to OUT in the format that its name says, at once: by a temporary file.

    Args:
        lines: gives all result lines, each time it is called.
        out: path of the table.
        columns: which, in this order. Default: id, the source row's own, output and its fields,
            then success, error, tokens, cost and time.
        suffix: in place of that of `out`.

    Returns:
        rows written.

    Raises:
        OutputError: it can't be written.
        UsageError: a column that the results don't have.
    """
    suffix = suffix or table_suffix(out) or ".jsonl"
    path = Path(out)
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            written = _write(lines, file, columns, suffix)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{out} can't be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _write(lines: Lines, file: IO[bytes], columns: Sequence[str] | None, suffix: str) -> int:
    if suffix == ".parquet":
        return _write_parquet(lines, file, columns)
    with ExitStack() as stack:
        if suffix.endswith(".gz"):
            file = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb")))
        elif suffix.endswith(".zst"):
            import zstandard

            writer = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
            file = cast(IO[bytes], stack.enter_context(writer))
        if suffix.startswith((".csv", ".tsv")):
            return _write_csv(lines, file, columns, "\t" if suffix.startswith(".tsv") else ",")
        return _write_jsonl(lines, file, columns)


def _write_jsonl(lines: Lines, file: IO[bytes], columns: Sequence[str] | None) -> int:
    number = 0
    names = tuple(_columns(lines, columns)) if columns else ()
    for line in lines():
        number += 1
        row = {name: flat(line).get(name) for name in names} if names else line
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    return number


def _write_csv(lines: Lines, file: IO[bytes], columns: Sequence[str] | None, delimiter: str) -> int:
    names = tuple(_columns(lines, columns))
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    number = 0
    for line in lines():
        number += 1
        row = flat(line)
        writer.writerow([_cell(row.get(name)) for name in names])
    text.flush()
    text.detach()
    return number


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if value is None or isinstance(value, str | int | float) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_parquet(lines: Lines, file: IO[bytes], columns: Sequence[str] | None) -> int:
    pyarrow, parquet = _pyarrow()
    kinds = _columns(lines, columns)
    types = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    text = pyarrow.string()
    schema = pyarrow.schema([(name, types.get(kind, text)) for name, kind in kinds.items()])
    number = 0
    with parquet.ParquetWriter(file, schema) as writer:
        rows = iter(lines())
        while group := list(islice(rows, _GROUP)):
            flattened = [flat(line) for line in group]
            arrays = [
                pyarrow.array([_typed(row.get(name), kind) for row in flattened], field.type)
                for (name, kind), field in zip(kinds.items(), schema, strict=True)
            ]
            writer.write_table(pyarrow.table(arrays, schema=schema))
            number += len(group)
    return number


def _typed(value: Any, kind: type) -> Any:
    if value is None or kind in (int, bool):
        return value
    if kind is float:
        return float(value)
    return value if isinstance(value, str) else _json(value)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "Parquet needs the extra: pip install 'batchllm-celery[parquet]'"
        ) from None
    return pyarrow, parquet


# -- rows of a table


def flat(line: Line) -> dict[str, Any]:
    """A result line as one row: the source row's columns, the output and its fields beside each
    other."""
    usage, metadata = line.get("token_usage") or {}, line.get("metadata") or {}
    error, timing = line.get("error") or {}, line.get("timing") or {}
    row: dict[str, Any] = {"item_id": line["item_id"], "index": line["index"]}
    last = {
        "success": line["success"],
        "error_kind": error.get("kind"),
        "error": error.get("message"),
        "attempts": line.get("attempts"),
        "input_tokens": usage.get("input_tokens"),
        "output_tokens": usage.get("output_tokens"),
        "cached_input_tokens": usage.get("cached_input_tokens"),
        "total_tokens": usage.get("total_tokens"),
        "cost": line.get("cost"),
        "seconds": timing.get("total"),
        "finish_reason": metadata.get("finish_reason"),
        "version": metadata.get("version"),
    }
    context, output = line.get("context"), line.get("output")
    source = (
        context if isinstance(context, dict) else {} if context is None else {"context": context}
    )
    for name, value in source.items():
        taken = name in last or name in _FIRST or name == "output"
        row[f"context.{name}" if taken else name] = value
    row["output"] = output
    if isinstance(output, dict):
        row |= {f"output.{name}": value for name, value in output.items()}
    return row | last


def _columns(lines: Lines, wanted: Sequence[str] | None) -> dict[str, type]:
    """The columns in their order, each with the one type of its values (str for several)."""
    kinds: dict[str, type | None] = dict.fromkeys(_FIRST)
    fields: dict[str, type | None] = {}
    for line in lines():
        for name, value in flat(line).items():
            if value is None:
                fields.setdefault(name, None)
                continue
            kind: type = type(value) if isinstance(value, bool | int | float) else str
            if kind is int and abs(value) >= 2**63:
                kind = str
            known = fields.get(name)
            if known is not None and known is not kind:
                kind = float if {known, kind} == {int, float} else str
            fields[name] = kind
    outputs = sorted(name for name in fields if name == "output" or name.startswith("output."))
    own = [name for name in fields if name not in (*_FIRST, *_LAST, *outputs)]
    kinds |= {name: fields[name] for name in (*_FIRST, *own, *outputs, *_LAST) if name in fields}
    named = {name: kind or str for name, kind in kinds.items()}
    if not wanted:
        return named
    if missing := [name for name in wanted if name not in named]:
        raise UsageError(
            f"--columns: there is no {missing[0]!r} in these results; there are {', '.join(named)}"
        )
    return {name: named[name] for name in wanted}


# -- DataFrames


def to_pandas(lines: Iterable[Line]) -> Any:
    """Results as a pandas DataFrame, one row each."""
    import pandas

    return pandas.DataFrame.from_records(_records(lines))


def to_polars(lines: Iterable[Line]) -> Any:
    """Results as a polars DataFrame, one row each."""
    import polars

    given = list(lines)
    kinds = _columns(lambda: given, None)
    types = {int: polars.Int64, float: polars.Float64, bool: polars.Boolean}
    rows = [{n: _typed(row.get(n), kind) for n, kind in kinds.items()} for row in map(flat, given)]
    return polars.DataFrame(rows, schema={n: types.get(k, polars.String) for n, k in kinds.items()})


def to_arrow(lines: Iterable[Line]) -> Any:
    """Results as an Arrow table, one row each."""
    given = list(lines)
    pyarrow, parquet = _pyarrow()
    buffer = io.BytesIO()
    _write_parquet(lambda: given, buffer, None)
    return parquet.read_table(pyarrow.BufferReader(buffer.getvalue()))


def _records(lines: Iterable[Line]) -> list[dict[str, Any]]:
    given = list(lines)
    names = tuple(_columns(lambda: given, None))
    return [{name: row.get(name) for name in names} for row in map(flat, given)]


def table_rows(
    table: Any,
    *,
    prompt: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a table, to submit: of a DataFrame (pandas, polars), an Arrow table, a Hugging
    Face dataset.

        producer.submit(table_rows(reviews, prompt="Summarise: {text}", id_column="id"), ...)

    Args:
        table: whose rows are prompts.
        prompt: template with the columns in braces.
        text_column: the column that is the prompt, in place of `prompt`.
        id_column: the column of ids. Default: the rows' places.
    """
    from batchllm_celery.files.prompt_template import PromptTemplate

    if (prompt is None) == (text_column is None):
        raise UsageError("give one of prompt= and text_column=")
    template = PromptTemplate(prompt) if prompt is not None else None
    for row in _dicts(table):
        values = plain(row)
        text = values[text_column] if template is None else template.fill(values)
        own = {} if id_column is None else {"item_id": str(values[id_column])}
        yield {**own, "prompt": text, "context": values}


def _dicts(table: Any) -> Iterable[dict[str, Any]]:
    if hasattr(table, "iter_rows"):  # polars
        return cast(Iterable[dict[str, Any]], table.iter_rows(named=True))
    if hasattr(table, "to_batches"):  # Arrow
        return (row for batch in table.to_batches() for row in batch.to_pylist())
    if hasattr(table, "iloc"):  # pandas
        return cast(Iterable[dict[str, Any]], table.to_dict("records"))
    return cast(Iterable[dict[str, Any]], table)


# -- result files to read


def read_results(path: str) -> Lines:
    """The lines of a result file, also of a compressed one.

    Raises:
        OutputError: a line is no result.
    """

    def lines() -> Iterator[Line]:
        from batchllm_celery.files import readers

        with readers.open_source(path) as stream:
            reading = readers.read(stream, path, path, readers.ReadOptions("jsonl"))
            for row in reading.rows:
                if isinstance(row, readers.BadLine) or not {"item_id", "index", "success"} <= set(
                    row[1]
                ):
                    number = row.line if isinstance(row, readers.BadLine) else row[0]
                    raise OutputError(f"{path}: line {number} is not a result of batchllm")
                yield row[1]

    return lines
