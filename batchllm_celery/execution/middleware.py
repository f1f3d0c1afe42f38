"""A documented path; the code is in `compat.middleware`."""

from batchllm_celery.compat.middleware import BaseMiddleware, Middleware, MiddlewareChain

__all__ = ["BaseMiddleware", "Middleware", "MiddlewareChain"]
