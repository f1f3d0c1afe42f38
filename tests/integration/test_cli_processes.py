"""Worker processes that `run` and `worker` start and keep alive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchllm_celery.cli.processes import Fleet, FleetError
from tests.support import wait_until


def test_workers_that_never_get_ready_are_given_up(tmp_path: Path) -> None:
    """A set-up that can't work ends after a few tries, with the last line of the worker's log."""
    bad = dict(os.environ) | {"BATCHLLM_SLOTS": "none at all"}
    fleet = Fleet(2, lambda _: bad, log_dir=tmp_path / "logs")
    try:
        fleet.start()
        with pytest.raises(FleetError, match=r"worker-\d.log"):
            wait_until(fleet.poll, timeout=60)
    finally:
        fleet.kill()
    assert fleet.ended()
