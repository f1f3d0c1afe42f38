"""Where a command takes results from: a file, or a batch whose results Redis keeps."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from batchllm_celery.cli.request import CommandRequest, settings_of
from batchllm_celery.errors import UsageError
from batchllm_celery.files.tables import Lines, read_results


@contextlib.contextmanager
def results_of(source: str, request: CommandRequest) -> Iterator[Lines]:
    """All results of OUT or BATCH, as often as they are asked for.

    Raises:
        UsageError: it is neither.
    """
    path = Path(source)
    if path.is_file():
        beside = path.with_name(path.name + ".jsonl")  # of which a table was written
        yield read_results(str(beside if beside.is_file() else path))
        return
    if path.suffix or "/" in source:
        raise UsageError(f"{source}: there is no such result file")
    from batchllm_celery.producer import Producer

    with (
        Producer(settings_of(request)) as producer,
        tempfile.TemporaryDirectory(prefix="batchllm-") as folder,
    ):
        producer.check()
        batch = producer.attach(source)
        progress = batch.progress()
        if progress.unread == 0 and progress.finished and not batch.spec.keep_results:
            raise UsageError(
                f"the results of batch {source} are in the file that `run` wrote: name that file"
            )
        copy = Path(folder) / "results.jsonl"
        after = "0"
        with copy.open("w", encoding="utf-8") as file:
            while taken := batch.read(after):
                for one in taken:
                    file.write(json.dumps(one.line) + "\n")
                after = taken[-1].receipt
        yield read_results(str(copy))
