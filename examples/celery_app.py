"""An application's own Celery app, Django's included: its workers run batches too.

    celery -A celery_app worker                       # any pool will do
    celery -A celery_app beat                         # the schedule below
    python -c 'import celery_app; celery_app.digest.delay(["Some text."])'

In Django, these lines stand in `project/celery.py`, below the usual
`app.config_from_object("django.conf:settings", namespace="CELERY")`, and a view calls
`digest.delay(...)`, or `Producer(redis_url=..., app=app).submit(...)` itself. The broker is a Redis
(CELERY_BROKER_URL).
"""

from __future__ import annotations

import os

from celery import Celery
from celery.schedules import crontab

from batchllm_celery import GeminiStrategy, LLMCallStrategy, Producer, install, strategy

BROKER = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")

app = Celery("shop", broker=BROKER)
app.conf.beat_schedule = {
    "nightly-digest": {
        "task": "shop.nightly_digest",
        "schedule": crontab(hour="2", minute="30"),
    }
}
install(app)


@strategy("digest", quota="gemini")
def digest_strategy(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
    return GeminiStrategy(model, system="Answer with one sentence.")


@app.task(name="shop.digest")
def digest(texts: list[str]) -> str:
    """A Celery task that submits a batch. It must not wait for it: it would hold a place that the
    batch's own tasks need. Follow by the id, or look at `batchllm status`."""
    if not os.environ.get("GEMINI_API_KEY"):
        raise RuntimeError(
            "GEMINI_API_KEY is not set: get a key at https://aistudio.google.com/apikey"
        )
    with Producer(redis_url=BROKER, app=app) as producer:
        return producer.submit(texts, strategy="digest").id


@app.task(name="shop.nightly_digest")
def nightly_digest() -> str:
    """What the schedule starts."""
    return digest(reviews_of_the_day())


def reviews_of_the_day() -> list[str]:
    """Stands for a query to your database."""
    return ["Arrived broken, replaced within a day.", "Exactly as described."]
