"""`batchllm demo --kill`, in short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(120)
def test_the_three_books_agree_after_a_short_fire(tmp_path: Path) -> None:
    """A worker and Valkey are killed, and the picture of the last frame is drawn."""
    picture = tmp_path / "demo.svg"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchllm_celery.cli", "demo", "--kill", "--rows", "40"),
            *("--every", "1", "--seed", "1", "--svg", str(picture)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The three books agree." in done.stdout
    assert "(worker)" in done.stdout
    assert "three books" in picture.read_text().replace("&#160;", " ")
