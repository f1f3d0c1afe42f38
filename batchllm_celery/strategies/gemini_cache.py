"""A documented path; the code is in `providers.gemini.cache`."""

from batchllm_celery.providers.gemini.cache import (
    GeminiCachedStrategy,
    display_name_of,
    fingerprint_of,
    has_tags,
)

__all__ = ["GeminiCachedStrategy", "display_name_of", "fingerprint_of", "has_tags"]
