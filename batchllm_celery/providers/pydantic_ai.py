"""PydanticAI agents as strategies."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import Completion, Failure, RetryState, TokenUsage, TOutput
from batchllm_celery.providers.gemini import client as gemini_client
from batchllm_celery.providers.openai import client as openai_client
from batchllm_celery.providers.strategy import ProviderStrategy
from batchllm_celery.strategies.base import Answer, LLMCallStrategy, ProcessResources
from batchllm_celery.strategies.failures import charged, classify
from batchllm_celery.strategies.structured import remember_feedback, with_feedback
from batchllm_celery.strategies.usage import read_usage

# Importing pydantic_ai takes a second, and it may not be installed: type checkers alone see it.
if TYPE_CHECKING:
    from pydantic_ai import Agent
else:
    Agent = Any


class PydanticAIStrategy(LLMCallStrategy[TOutput]):
    """Runs an agent: one `agent.run(prompt)` is one attempt, with all requests the agent makes.

        PydanticAIStrategy(Agent("openai:gpt-4.1-mini", output_type=Person, retries=0))

    Args:
        agent: a PydanticAI agent. Its model's client keeps its own retries; the registered
            `pydantic-ai` strategy builds one without.
        model_name: `PROVIDER:MODEL`, for prices and the default quota; None: the agent's.
    """

    _run_options: Mapping[str, Any] = {}

    def __init__(self, agent: Agent[Any, TOutput], model_name: str | None = None) -> None:
        self.agent = agent
        self.model_name = model_name or _model_name(agent)

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One run of the agent.

        Raises:
            ProviderError: where the model's last answer did not come to a good end.
            Exception: PydanticAI's, carrying the tokens that the run has spent.
        """
        library = importlib.import_module("pydantic_ai")
        spent = importlib.import_module("pydantic_ai.usage").RunUsage()
        with library.capture_run_messages() as messages:
            try:
                result = await self.agent.run(
                    with_feedback(prompt, state), usage=spent, **self._run_options
                )
            except Exception as error:
                with charged(read_usage(spent)):
                    _check_end(messages, error)
                    raise
            # Test doubles report their tokens in the result only.
            usage = read_usage(getattr(result, "usage", None)) or read_usage(spent)
            with charged(usage):
                finish = _check_end(messages)
        return Completion(result.output, usage, {"finish_reason": finish})

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next attempt's prompt."""
        if not _arose_in_model(exception):
            remember_feedback(exception, state)

    async def dry_run(self, prompt: str) -> Answer[Any]:
        """An empty instance of the agent's output type, where that is a pydantic model."""
        output_type = getattr(self.agent, "output_type", None)
        if isinstance(output_type, type) and issubclass(output_type, BaseModel):
            usage = TokenUsage(input_tokens=100, output_tokens=50, total_tokens=150)
            return output_type.model_construct(), usage
        return await super().dry_run(prompt)

    def classify(self, exception: BaseException) -> Failure | None:
        """By the provider's own error beneath PydanticAI's, which has the Retry-After.

        An error while an answer is read is the provider's fault, whatever its type in Python.
        """
        cause = exception.__cause__
        if cause is not None:
            translated = gemini_client.translate(cause) or openai_client.translate(cause)
            if translated is not None:
                return classify(translated)
        failure = classify(exception)
        if failure.kind in _OURS and _arose_in_model(exception):
            return replace(failure, kind=FailureKind.UNKNOWN)
        return None


class PydanticAIModelStrategy(PydanticAIStrategy[Any], ProviderStrategy[Any]):
    """An agent built from names: what the registered `pydantic-ai` strategy is.

    Args:
        model: `gemini:NAME` or `openai:NAME`; called through our own clients, retries off.
        system: instructions.
        schema: JSON Schema of the output.
        temperature, max_output_tokens: model settings.
    """

    def __init__(
        self,
        model: str,
        *,
        system: str | None = None,
        schema: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_output_tokens: int | None = None,
    ) -> None:
        self.provider, _, self.model = model.partition(":")
        if self.provider not in ("gemini", "openai") or not self.model:
            raise UsageError(
                f"pydantic-ai model {model!r} must be gemini:NAME or openai:NAME "
                f"(as in pydantic-ai:gemini:gemini-2.5-flash)"
            )
        self.model_name = model
        self.max_output_tokens = max_output_tokens
        self._system = system
        self._schema = schema
        settings = {"temperature": temperature, "max_tokens": max_output_tokens}
        self._settings = {name: value for name, value in settings.items() if value is not None}

    async def prepare(self) -> None:
        """Open the client and build the agent.

        Raises:
            UsageError: where the `pydantic-ai` extra is not installed.
            ProviderError: of kind `authentication` where there is no API key.
        """
        pydantic_ai = await asyncio.to_thread(import_pydantic_ai)
        model = await self._build_model(self._resources())
        output_type = str if self._schema is None else pydantic_ai.StructuredDict(self._schema)
        self.agent = pydantic_ai.Agent(
            model,
            output_type=output_type,
            instructions=self._system,
            model_settings=self._settings or None,
            retries=0,
        )
        # It has no tools: one request is all that it needs.
        limits = importlib.import_module("pydantic_ai.usage").UsageLimits
        self._run_options = {"usage_limits": limits(request_limit=1)}

    async def _build_model(self, resources: ProcessResources) -> Any:
        if self.provider == "gemini":
            client = await gemini_client.open_client(resources)
            provider = importlib.import_module("pydantic_ai.providers.google").GoogleProvider
            models = importlib.import_module("pydantic_ai.models.google")
            return models.GoogleModel(self.model, provider=provider(client=client))
        client = await openai_client.open_client(resources)
        provider = importlib.import_module("pydantic_ai.providers.openai").OpenAIProvider
        models = importlib.import_module("pydantic_ai.models.openai")
        return models.OpenAIChatModel(self.model, provider=provider(openai_client=client))


#: Kinds that blame the model or the strategy: wrong for an error of PydanticAI's provider code.
_OURS = (FailureKind.VALIDATION, FailureKind.LOGIC_ERROR)

_BAD_ENDS = {"length": FailureKind.TRUNCATED, "content_filter": FailureKind.CONTENT_BLOCKED}


def _arose_in_model(exception: BaseException) -> bool:
    """Whether PydanticAI's code for a provider raised it, not an agent's tool or check."""
    step = exception.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__", "").startswith("pydantic_ai.models."):
            return True
        step = step.tb_next
    return False


def _check_end(messages: list[Any], error: Exception | None = None) -> str | None:
    """The finish reason of the last answer: the provider's own where PydanticAI kept it.

    Raises:
        ProviderError: it was empty, or did not come to a good end.
    """
    answers = [message for message in messages if getattr(message, "kind", None) == "response"]
    if not answers:
        return None
    last = answers[-1]
    finish, details = last.finish_reason, last.provider_details or {}
    reason = details.get("finish_reason") or finish
    if finish in ("stop", "tool_call") or (reason is None and last.parts):
        if not last.parts:
            raise ProviderError(f"the answer is empty ({reason})", error_type="EmptyAnswer")
        return None if reason is None else str(reason)
    raise ProviderError(
        f"the answer did not come to its end (finish_reason {str(reason)[:40]})",
        kind=_BAD_ENDS.get(finish, FailureKind.UNKNOWN),
        error_type="UnfinishedAnswer",
    ) from error


def import_pydantic_ai() -> Any:
    """The library.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        return importlib.import_module("pydantic_ai")
    except ImportError as error:
        raise UsageError(
            "pydantic-ai is not installed: pip install 'batchllm-celery[pydantic-ai]'"
        ) from error


def _model_name(agent: Any) -> str | None:
    model = getattr(agent, "model", None)
    if isinstance(model, str):
        return model
    system, name = getattr(model, "system", None), getattr(model, "model_name", None)
    if not isinstance(system, str) or not isinstance(name, str):
        return None
    ours = {"google": "gemini", "google-gla": "gemini", "google-vertex": "gemini"}
    return f"{ours.get(system, system)}:{name}"
