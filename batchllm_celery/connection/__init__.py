"""One process's way to Redis: a patient client, scripts, and many calls in one round trip."""

from batchllm_celery.connection.broken import BrokenEntries, BrokenEntry, is_broken, readable, why
from batchllm_celery.connection.redis_connection import Connection
from batchllm_celery.connection.reminder import Reminder
from batchllm_celery.connection.scripts import Script
from batchllm_celery.connection.urls import broker_tls, broker_url, client_url
from batchllm_celery.redaction import safe_url

__all__ = [
    "BrokenEntries",
    "BrokenEntry",
    "Connection",
    "Reminder",
    "Script",
    "broker_tls",
    "broker_url",
    "client_url",
    "is_broken",
    "readable",
    "safe_url",
    "why",
]
