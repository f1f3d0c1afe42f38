"""A host's own Celery app whose time limits reach our task by an annotation."""

from __future__ import annotations

import os

from celery import Celery

from batchllm_celery.worker import install
from tests.integration import worker_app  # noqa: F401 - registers its strategy

app = Celery("limited", broker=os.environ["LIMITED_BROKER"])
app.conf.task_annotations = {"*": {"time_limit": 3, "soft_time_limit": 2}}
app.conf.broker_transport_options = {"visibility_timeout": 3600}
install(app)
