"""The ledger: what Redis knows of every item, so that nothing is lost or paid for twice."""

from batchllm_celery.ledger.batches import Reopened
from batchllm_celery.ledger.codec import Known, Outcome, Payload
from batchllm_celery.ledger.feeding import Created, Row
from batchllm_celery.ledger.heartbeat import Beat, Heartbeat
from batchllm_celery.ledger.holding import Claim, ClaimReply
from batchllm_celery.ledger.ledger import Ledger
from batchllm_celery.ledger.locks import BatchLock, new_process_id
from batchllm_celery.ledger.workers import WorkerInfo, list_workers

__all__ = [
    "BatchLock",
    "Beat",
    "Claim",
    "ClaimReply",
    "Created",
    "Heartbeat",
    "Known",
    "Ledger",
    "Outcome",
    "Payload",
    "Reopened",
    "Row",
    "WorkerInfo",
    "list_workers",
    "new_process_id",
]
