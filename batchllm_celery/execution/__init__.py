"""One item from its payload to its one outcome. Knows neither Celery nor the ledger."""

from batchllm_celery.execution.item_runner import (
    Gate,
    ItemJob,
    ItemRunner,
    OpenGate,
    Stopped,
    Unrunnable,
)
from batchllm_celery.execution.pricing import Prices

__all__ = ["Gate", "ItemJob", "ItemRunner", "OpenGate", "Prices", "Stopped", "Unrunnable"]
