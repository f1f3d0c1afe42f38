"""A private Valkey for whoever has no Redis: started or attached to, stopped by its last user."""

from batchllm_celery.embedded.server import (
    EmbeddedServer,
    ensure_embedded,
    resolve_url,
    revive_when_lost,
)

__all__ = ["EmbeddedServer", "ensure_embedded", "resolve_url", "revive_when_lost"]
