"""The pytest plugin: loaded by itself where the package is installed; its fixtures cost nothing
until one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from batchllm_celery.producer import Producer


@pytest.fixture
def llm_answers() -> Iterator[Callable[[Any, Callable[[str], Any]], list[str]]]:
    """Makes a strategy answer by a function, till the test's end, and returns its prompts.

    See `batchllm_celery.testing.answers`.
    """
    from batchllm_celery.testing import answers

    with ExitStack() as stack:

        def replace(strategy: Any, function: Callable[[str], Any]) -> list[str]:
            return stack.enter_context(answers(strategy, function))

        yield replace


@pytest.fixture
def llm_pipeline() -> Iterator[Producer]:
    """A fleet in memory, and its producer. See `batchllm_celery.testing.pipeline`."""
    from batchllm_celery.testing import pipeline

    with pipeline() as producer:
        yield producer
