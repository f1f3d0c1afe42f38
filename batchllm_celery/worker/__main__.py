"""One worker process of `batchllm run` or `batchllm worker`.

    python -m batchllm_celery.worker NAME LOGLEVEL

It does what `celery -A batchllm_celery worker -n NAME@%h -l LOGLEVEL --without-mingle
--without-gossip` does. Celery's command line also imports every subcommand and every plugin,
Flower's among them, which takes longer than all the rest of a worker's start.
"""

from __future__ import annotations

import sys

from celery.utils.log import mlevel
from celery.utils.nodenames import default_nodename, host_format

from batchllm_celery.worker.tasks import worker_app


def main(name: str, loglevel: str) -> None:
    """Work until a signal ends it."""
    worker = worker_app().Worker(
        hostname=host_format(default_nodename(f"{name}@%h")),
        loglevel=mlevel(loglevel),
        without_mingle=True,
        without_gossip=True,
    )
    worker.start()
    sys.exit(worker.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
