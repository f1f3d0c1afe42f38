"""Submit batches to a fleet, follow and steer them."""

from batchllm_celery.ledger import WorkerInfo
from batchllm_celery.producer.batch import AsyncBatch, Batch, Delivered, Results
from batchllm_celery.producer.continuing import Answered
from batchllm_celery.producer.item import AskOptions, AsyncItem, Item
from batchllm_celery.producer.producer import (
    AsyncProducer,
    Found,
    Producer,
    SubmitOptions,
    default_producer,
    new_batch_id,
)
from batchllm_celery.producer.rows import Row, RowWith
from batchllm_celery.producer.steps import BlockingCallWarning

__all__ = [
    "Answered",
    "AskOptions",
    "AsyncBatch",
    "AsyncItem",
    "AsyncProducer",
    "Batch",
    "BlockingCallWarning",
    "Delivered",
    "Found",
    "Item",
    "Producer",
    "Results",
    "Row",
    "RowWith",
    "SubmitOptions",
    "WorkerInfo",
    "default_producer",
    "new_batch_id",
]
