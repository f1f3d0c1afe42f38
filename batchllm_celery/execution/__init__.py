"""One item from its payload to its one outcome. Knows neither Celery nor the ledger."""

from batchllm_celery.execution.item_runner import ItemRunner
from batchllm_celery.execution.job import Gate, ItemJob, OpenGate, Stopped, Unrunnable
from batchllm_celery.execution.pricing import Prices

__all__ = ["Gate", "ItemJob", "ItemRunner", "OpenGate", "Prices", "Stopped", "Unrunnable"]
