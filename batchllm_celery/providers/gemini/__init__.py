"""Gemini by google-genai, with or without a context cache."""

from batchllm_celery.providers.gemini.cache import GeminiCachedStrategy
from batchllm_celery.providers.gemini.strategy import GeminiResponse, GeminiStrategy

__all__ = ["GeminiCachedStrategy", "GeminiResponse", "GeminiStrategy"]
