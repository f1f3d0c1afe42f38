"""A provider to practise on: Gemini's and OpenAI's wire formats, quotas, latency and errors."""

from batchllm_celery.simulation.answers import answer_to, digest_of, json_answer_to
from batchllm_celery.simulation.client import SimulationClient, spawn
from batchllm_celery.simulation.config import RetryHint, SimulationConfig, Window
from batchllm_celery.simulation.journal import Call
from batchllm_celery.simulation.provider import Stats
from batchllm_celery.simulation.server import SimulatedProvider, serve

__all__ = [
    "Call",
    "RetryHint",
    "SimulatedProvider",
    "SimulationClient",
    "SimulationConfig",
    "Stats",
    "Window",
    "answer_to",
    "digest_of",
    "json_answer_to",
    "serve",
    "spawn",
]
