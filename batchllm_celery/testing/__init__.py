"""Your strategies under test: no provider, no key, no cost.

    assert run_item("summarise", "A long text.").success     # one item, as a worker runs it

    with answers("summarise", lambda prompt: prompt[:10]) as prompts, pipeline() as producer:
        batch = producer.submit(["A long text."], strategy="summarise")

The fixtures of the pytest plugin, `llm_answers` and `llm_pipeline`, do the same. Stand-ins for LLMs
are `mock_strategy` and `MockAgent`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm_celery.testing.kit import AT_ONCE, answers, arun_item, pipeline, run_item
    from batchllm_celery.testing.mocks import (
        MockAgent,
        MockResult,
        MockStrategy,
        MockUsage,
        mock_strategy,
    )

__all__ = [
    "AT_ONCE",
    "MockAgent",
    "MockResult",
    "MockStrategy",
    "MockUsage",
    "answers",
    "arun_item",
    "mock_strategy",
    "pipeline",
    "run_item",
]


def __getattr__(name: str) -> Any:
    # Lazily: the pytest plugin is imported in every project that has the package.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "mocks" if name.lower().startswith("mock") else "kit"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
