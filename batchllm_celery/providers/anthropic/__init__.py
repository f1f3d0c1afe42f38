"""Anthropic's Messages, by the anthropic SDK."""

from batchllm_celery.providers.anthropic.strategy import AnthropicStrategy

__all__ = ["AnthropicStrategy"]
