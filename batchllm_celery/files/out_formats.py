"""Result files in the formats of the providers' batch APIs, made of our own at the end of a run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from batchllm_celery.dialects.rows import RowOutcome, write_row
from batchllm_celery.errors import FailureKind, InputError
from batchllm_celery.models import Completion, TokenUsage
from batchllm_celery.models.request import DialectName

OutFormat: TypeAlias = Literal["openai", "gemini", "anthropic"]
OUT_FORMATS: tuple[OutFormat, ...] = get_args(OutFormat)

#: Dialects whose kept bodies a file of each format can hold as they are.
_DIALECTS: dict[OutFormat, tuple[DialectName, ...]] = {
    "openai": ("openai", "responses", "embeddings"),
    "gemini": ("gemini",),
    "anthropic": ("anthropic",),
}


def paths_of(out: str, out_format: OutFormat) -> tuple[Path, Path]:
    """Where results and failures go: `OUT.openai.jsonl`, `OUT.openai.errors.jsonl`."""
    stem = out.removesuffix(".jsonl")
    return Path(f"{stem}.{out_format}.jsonl"), Path(f"{stem}.{out_format}.errors.jsonl")


def write_out_format(out: str, out_format: OutFormat, batch_id: str) -> list[Path]:
    """Write the results of `out` once more, in a provider's format.

    The files appear whole or not at all. Only OpenAI's format has a file of failures beside the
    results; it is there if anything has failed.

    Returns:
        The files that were written.

    Raises:
        InputError: `out` can't be read, or the files can't be written.
    """
    results, errors = paths_of(out, out_format)
    try:
        good, bad = _Replaced(results), _Replaced(errors)
        try:
            for line in _lines(out):
                text, failed = write_row(out_format, outcome_of(line, out_format, batch_id))
                (bad if failed else good).write(text)
            written = [good.finish()]
            if bad.lines:
                written.append(bad.finish())
            else:
                errors.unlink(missing_ok=True)  # of an earlier run
        finally:
            good.discard()
            bad.discard()
    except OSError as error:
        raise InputError(f"{results} can't be written: {error.strerror}") from None
    return written


def _lines(out: str) -> Iterator[dict[str, Any]]:
    with open(out, "rb") as file:
        for line in file:
            yield json.loads(line)


def outcome_of(line: dict[str, Any], out_format: OutFormat, batch_id: str) -> RowOutcome:
    """A line of our own result file as the outcome that a provider's file tells."""
    metadata = line.get("metadata") or {}
    error = line.get("error")
    raw = metadata.get("raw") if metadata.get("dialect") in _DIALECTS[out_format] else None
    usage = TokenUsage.of(line.get("token_usage"))
    completion = None if error else Completion(line.get("output"), usage, metadata)
    dialect: Any = metadata.get("dialect")
    return RowOutcome(
        key=str(line["item_id"]),
        batch_id=batch_id,
        completion=completion,
        kind=FailureKind.read(error["kind"]) if error else None,
        message=str(error["message"]) if error else "",
        status=metadata.get("status"),
        request_id=metadata.get("request_id"),
        raw=raw,
        model=str(metadata.get("priced_as") or metadata.get("model") or ""),
        dialect=dialect if dialect in _DIALECTS[out_format] else _DIALECTS[out_format][0],
    )


class _Replaced:
    """A file that takes the place of another one when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        handle, self._temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        self._file = os.fdopen(handle, "w", encoding="utf-8", newline="\n")

    def write(self, line: str) -> None:
        self._file.write(line + "\n")
        self.lines += 1

    def finish(self) -> Path:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self._temporary, 0o666 & ~umask)
        os.replace(self._temporary, self.path)
        return self.path

    def discard(self) -> None:
        """Remove what was not finished."""
        self._file.close()
        Path(self._temporary).unlink(missing_ok=True)
