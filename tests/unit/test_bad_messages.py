"""What a message may say of how our task is run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kombu import Message

from batchllm_celery.queue import RUN_ITEMS
from batchllm_celery.worker.pool.bad_messages import BadMessageError, check


def message(task: str = RUN_ITEMS, **headers: Any) -> Message:
    body = json.dumps([["b-1", [0, 1]], {}, {"callbacks": None}])
    return Message(
        body=body,
        headers={"id": "1", "task": task, **headers},
        properties={"delivery_info": {}, "correlation_id": "1"},
        content_type="application/json",
        content_encoding="utf-8",
    )


@pytest.mark.parametrize("limits", [[2, 1], [0.5, None], [None, 0.001], [10**8, 10**8], None])
def test_a_message_s_own_time_limit_cuts_off_none_of_our_calls(limits: Any) -> None:
    """A limit of the host's, of `send_task(time_limit=2)` or of a stranger."""
    received = message(timelimit=limits)
    check(received)
    headers: dict[str, Any] = received.headers
    assert headers["timelimit"] == [None, None]  # Celery then asks the task's own


@pytest.mark.parametrize("limits", [[2, 1], [None, 60.0]])
def test_the_time_limits_of_other_tasks_stay(limits: Any) -> None:
    """They are the host's own."""
    received = message("host.task", timelimit=limits)
    check(received)
    assert received.headers["timelimit"] == limits


@pytest.mark.parametrize("limits", [[0, 1], [-1, None], [float("nan"), 1], [1], "2", [1, 2, 3]])
def test_what_is_no_time_limit_is_no_message(limits: Any) -> None:
    """Celery would fail at it."""
    with pytest.raises(BadMessageError, match="timelimit"):
        check(message(timelimit=limits))
