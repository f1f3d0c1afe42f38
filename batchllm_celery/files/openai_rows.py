"""Rows of an OpenAI batch file: `{"custom_id", "method", "url", "body": {"messages", ...}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchllm_celery.models import StrategySpec

_INSTRUCTIONS = ("system", "developer")


@dataclass(frozen=True, slots=True)
class OpenAIRow:
    """The request of a row: prompt, system instruction and parameters of the strategy."""

    prompt: str
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)

    def apply(self, strategy: StrategySpec, *, tunable: bool) -> tuple[StrategySpec, str]:
        """The strategy and the prompt of this row.

        The row's own model is not used: the quota is that of the strategy's model. If the strategy
        is not `tunable`, the system instruction is put before the prompt.
        """
        if not tunable:
            return strategy, "\n\n".join(part for part in (self.system, self.prompt) if part)
        own = self.params | ({"system": self.system} if self.system else {})
        if not own:
            return strategy, self.prompt
        return StrategySpec(name=strategy.name, params=strategy.params | own), self.prompt


def is_openai_row(fields: Mapping[str, Any]) -> bool:
    """Whether this is a row of an OpenAI batch file."""
    return isinstance(fields.get("body"), Mapping) and "prompt" not in fields


def read_openai_row(fields: Mapping[str, Any]) -> OpenAIRow:
    """Read one row.

    Raises:
        ValueError: saying what is not supported.
    """
    body = fields.get("body")
    if not isinstance(body, Mapping):
        raise ValueError("it has no body")
    url = fields.get("url")
    if isinstance(url, str) and not url.endswith("/chat/completions"):
        raise ValueError(f"url {url[:60]!r} is not supported, only /v1/chat/completions")
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("its body has no messages")
    turns = [(_role(message), _content(message)) for message in messages]
    system = "\n\n".join(text for role, text in turns if role in _INSTRUCTIONS)
    return OpenAIRow(
        prompt=_conversation([turn for turn in turns if turn[0] not in _INSTRUCTIONS]),
        system=system or None,
        params=_params(body),
    )


def _role(message: Any) -> str:
    if not isinstance(message, Mapping):
        raise ValueError("a message of its body is not an object")
    return str(message.get("role", "user"))


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(map(_is_text, content)):
        raise ValueError("a message of its body is not text")
    return "".join(str(part.get("text", "")) for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"


def _conversation(turns: list[tuple[str, str]]) -> str:
    """The text of a single message; a transcript of several, because a prompt is one text."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def _params(body: Mapping[str, Any]) -> dict[str, Any]:
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    answer_format = body.get("response_format")
    schema = answer_format.get("json_schema") if isinstance(answer_format, Mapping) else None
    wanted = {
        "temperature": body.get("temperature"),
        "max_output_tokens": limit,
        "schema": schema.get("schema") if isinstance(schema, Mapping) else None,
    }
    return {name: value for name, value in wanted.items() if value is not None}
