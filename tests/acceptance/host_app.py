"""An app with a task of its own on kombu's own transport, whose workers run batches too."""

from __future__ import annotations

import os

import redis
from celery import Celery

from batchllm_celery import install
from batchllm_celery.connection import broker_url
from tests.integration import worker_app  # noqa: F401 - registers its strategy

URL, NAMESPACE = os.environ["BATCHLLM_REDIS_URL"], os.environ["BATCHLLM_NAMESPACE"]

app = Celery("host", set_as_current=False)
app.conf.update(
    broker_url=broker_url(URL),
    broker_transport_options={
        "global_keyprefix": f"{NAMESPACE}:celery:",
        "priority_steps": [0, 3, 6, 9],
        "queue_order_strategy": "priority",
    },
    broker_connection_retry_on_startup=True,
    task_default_queue="default",
    task_ignore_result=True,
    task_acks_late=True,
)
install(app)


@app.task(name="note")
def note(number: int) -> None:
    with redis.Redis.from_url(URL) as client:
        client.sadd(f"{NAMESPACE}:celery:noted", number)
