"""`python -m batchllm_celery.cli`."""

from batchllm_celery.cli import main

main()
