"""Submit batches to a fleet, follow and steer them."""

from batchllm_celery.ledger import WorkerInfo
from batchllm_celery.producer.batch import Batch, Delivered, Results
from batchllm_celery.producer.producer import Producer, new_batch_id

__all__ = ["Batch", "Delivered", "Producer", "Results", "WorkerInfo", "new_batch_id"]
