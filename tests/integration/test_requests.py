"""Requests of any form on their way: submitted, kept in Redis, sent as given, answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai extra is not installed")

from batchllm_celery import LLMWorkItem, NativeRequest, Request, current_item
from batchllm_celery.connection import Connection
from batchllm_celery.dialects.blobs import lift_request, restore
from batchllm_celery.errors import FailureKind, InputError
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Ledger, Payload
from batchllm_celery.ledger.codec import StoredRequest
from batchllm_celery.models import BatchSpec, StrategySpec, WorkItemResult
from batchllm_celery.models.request import FilePart, TextPart, UserMessage
from batchllm_celery.producer import Producer
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider
from batchllm_celery.strategies import CallableStrategy, catalog, strategy
from batchllm_celery.worker.process import Runtime
from batchllm_celery.worker.prompts import Prompts
from tests.unit.dialects.files import PNG, pdf

LONG = "The handbook says. " * 400  # over what a payload holds itself


def chat(data: bytes = PNG, question: str = "What is this?") -> Request:
    return Request.of(
        {
            "messages": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Good day."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": question},
                        {"type": "image", "data": data},
                    ],
                },
            ],
            "parameters": {"temperature": 0.5, "max_output_tokens": 500},
        }
    )
