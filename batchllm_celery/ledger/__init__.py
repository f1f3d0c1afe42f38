"""The ledger: what Redis knows of every item, so that nothing is lost or paid for twice."""

from batchllm_celery.ledger.batches import Reopened
from batchllm_celery.ledger.codec import Payload
from batchllm_celery.ledger.feeding import Created, Row
from batchllm_celery.ledger.heartbeat import Beat, Heartbeat
from batchllm_celery.ledger.holding import Claim, ClaimReply
from batchllm_celery.ledger.locks import Lock, new_process_id
from batchllm_celery.ledger.recovery import Ledger
from batchllm_celery.ledger.results import Outcome
from batchllm_celery.ledger.workers import WorkerInfo, list_workers

__all__ = [
    "Beat",
    "Claim",
    "ClaimReply",
    "Created",
    "Heartbeat",
    "Ledger",
    "Lock",
    "Outcome",
    "Payload",
    "Reopened",
    "Row",
    "WorkerInfo",
    "list_workers",
    "new_process_id",
]
