"""Requests of rows that a program submits: one that can't be sent ends the submission."""

from __future__ import annotations

from batchllm_celery.errors import InputError
from batchllm_celery.files.requests import RequestError, Requests
from batchllm_celery.ledger import Payload
from batchllm_celery.ledger.codec import StoredRequest
from batchllm_celery.models import StrategySpec


def prepare(requests: Requests, payload: Payload, index: int, default: StrategySpec) -> None:
    """Read the files of a row's request, and check that it can be sent.

    Raises:
        InputError: naming the row and the field.
    """
    if isinstance(payload.prompt, str | StoredRequest):
        return
    try:
        payload.prompt = requests.prepared(payload.prompt, payload.strategy or default)
    except RequestError as problem:
        raise InputError(f"item {index} ({payload.item_id}): {problem}") from None
