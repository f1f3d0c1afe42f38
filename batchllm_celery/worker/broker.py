"""The documented path of our transport: `amqp="batchllm_celery.worker.broker:Amqp"`."""

from batchllm_celery.worker.pool.transport import Amqp

__all__ = ["Amqp"]
