"""A provider with a journal, and fleets of real processes around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery.simulation import SimulatedProvider, SimulationConfig
from tests.acceptance.fleet import Fleet, assert_nothing_left

StartProvider = Callable[..., Any]
StartFleet = Callable[..., Fleet]


@pytest.fixture
def provide() -> Iterator[StartProvider]:
    """Starts simulated providers; each remembers its calls."""
    running = []

    def start(**config: Any) -> Any:
        context = SimulatedProvider.in_thread(SimulationConfig(**config))
        provider = context.__enter__()
        running.append(context)
        return provider

    yield start
    for context in reversed(running):
        context.__exit__(None, None, None)


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str, namespace: str) -> Iterator[Fleet]:
    """Commands and workers that share the test's Valkey and namespace."""
    yield from _fleet(tmp_path, redis_url, namespace)


@pytest.fixture
def lone_fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Commands with no Redis configured: they use an embedded Valkey."""
    yield from _fleet(tmp_path, None, "batchllm")


def _fleet(folder: Path, redis_url: str | None, namespace: str) -> Iterator[Fleet]:
    fleet = Fleet(folder, redis_url, namespace)
    yield fleet
    fleet.stop()
    assert_nothing_left(folder, timeout=20)
