"""OpenAI, and servers that speak its chat completions, by the openai SDK."""

from batchllm_celery.providers.openai.strategy import OpenAICompatibleStrategy

__all__ = ["OpenAICompatibleStrategy"]
