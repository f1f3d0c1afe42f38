"""Requests of rows, made ready to be enqueued: files are read, what can't be sent is refused."""

from __future__ import annotations

import logging
from typing import Any

from batchllm_celery.files.parts import PartError, PartReader
from batchllm_celery.models import NativeRequest, Prompt, Request, StrategySpec
from batchllm_celery.strategies.base import LLMCallStrategy

logger = logging.getLogger("batchllm_celery")


class RequestError(ValueError):
    """A request can't be sent as it is; the text names each field, never its content."""


class Requests:
    """Prepares the requests of one input.

    Args:
        parts: reads the files that parts name.
    """

    def __init__(self, parts: PartReader | None = None) -> None:
        self._parts = parts or PartReader()
        self._strategies: dict[str, LLMCallStrategy[Any] | None] = {}

    def prepared(self, prompt: Prompt, spec: StrategySpec) -> Prompt:
        """The prompt with its files read.

        Raises:
            RequestError: a file can't be used, or the strategy can't send the request, where it is
                registered in this process.
        """
        if isinstance(prompt, str):
            return prompt
        try:
            if isinstance(prompt, Request):
                prompt = self._parts.read(prompt)
        except PartError as problem:
            raise RequestError(str(problem)) from None
        strategy = self._strategy(spec)
        if strategy is None:
            return prompt
        if isinstance(prompt, NativeRequest) and NativeRequest not in strategy.accepts:
            prompt = _plain_text(prompt) or prompt
        why = strategy.refusal(prompt)
        if why is not None:
            raise RequestError(why)
        return prompt

    def _strategy(self, spec: StrategySpec) -> LLMCallStrategy[Any] | None:
        """An instance that is asked, never called; None where this process can't build one."""
        if spec.key not in self._strategies:
            from batchllm_celery.strategies import catalog  # late: most inputs need none

            built = None
            if spec.name in catalog:
                try:
                    built = catalog.lookup(spec.name).build(spec)
                except Exception as error:  # a worker may have what is missing here
                    logger.debug("submit.unchecked error=%s", type(error).__name__)
            self._strategies[spec.key] = built
        return self._strategies[spec.key]


def _plain_text(native: NativeRequest) -> str | None:
    """The text of a chat that is nothing but a text: one user message, after a system message at
    most, and no further field. A strategy that takes texts only can be asked that."""
    body, messages = native.body, native.body.get("messages")
    if native.dialect != "openai" or body.keys() - {"model", "messages"}:
        return None
    if not isinstance(messages, list) or not 1 <= len(messages) <= 2:
        return None
    texts: list[str] = []
    for message, roles in zip(
        reversed(messages), ({"user"}, {"system", "developer"}), strict=False
    ):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return None
        if message["role"] not in roles or not isinstance(message["content"], str):
            return None
        texts.insert(0, message["content"])
    return "\n\n".join(texts)


# -- rows that hold a chat

#: Fields of a row that are its request's own.
REQUEST_FIELDS = ("messages", "parameters", "tools", "tool_choice", "schema", "extra")
#: Fields beside them that are written into it.
ROW_FIELDS = (*REQUEST_FIELDS, "system", "images", "files", "model")


def is_chat(fields: dict[str, Any]) -> bool:
    """Whether a row holds a chat in no provider's format: `{"messages": [...]}`."""
    return "prompt" not in fields and isinstance(fields.get("messages"), list)


def read_chat(fields: dict[str, Any]) -> Request:
    """The request of such a row. `system` comes first, `images` and `files` (paths or URLs) go with
    the last user message.

    Raises:
        ValueError: naming each field that is wrong.
    """
    request = {name: fields[name] for name in REQUEST_FIELDS if fields.get(name) is not None}
    messages = list(request["messages"])
    parts = [_part("image", value) for value in _listed(fields, "images")]
    parts += [_part("file", value) for value in _listed(fields, "files")]
    if parts:
        last = messages[-1] if messages else None
        if not isinstance(last, dict) or last.get("role") != "user":
            raise ValueError("images and files need a user's message at the end of messages")
        content = last.get("content")
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        messages[-1] = {**last, "content": [*texts, *parts]}
    system = fields.get("system")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Request.of({**request, "messages": messages})


def _listed(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name} must be a list of paths or URLs")
    return value


def _part(kind: str, value: str) -> dict[str, Any]:
    link = value.startswith(("http://", "https://", "gs://", "data:"))
    return {"type": kind, "url" if link else "path": value}
