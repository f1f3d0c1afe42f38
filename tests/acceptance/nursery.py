"""Runs programs in processes of their own that have the heavy imports behind them already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["batchllm_celery", "batchllm_celery.producer", __name__])


def play(
    program: Path, arguments: tuple[str, ...], environment: dict[str, str], timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """`python PROGRAM ARGUMENTS`, in the program's folder."""
    with tempfile.TemporaryDirectory(prefix="play-") as folder:
        process = _forkserver.Process(
            target=_main, args=(str(program), arguments, environment, folder)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(str(program), process.exitcode or 0, out, err)


def _main(
    program: str, arguments: tuple[str, ...], environment: dict[str, str], folder: str
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(Path(program).parent)
    sys.path[0] = str(Path(program).parent)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
