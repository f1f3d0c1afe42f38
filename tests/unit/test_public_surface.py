"""What people have typed and imported stays: names, paths, options, variables may only be added.

Moving code about must not break a line in somebody's program, shell script or Celery configuration.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import batchllm_celery
from batchllm_celery.cli import cli
from batchllm_celery.settings import Settings

ROOT = Path(__file__).parents[2]

NAMES = """
    LLMWorkItem WorkItemResult BatchResult TokenUsage strategy LLMCallStrategy Completion RetryState
    GeminiStrategy GeminiCachedStrategy OpenAICompatibleStrategy PydanticAIStrategy CallableStrategy
    EscalatingStrategy Producer Batch install Settings ParallelBatchProcessor MetricsObserver
    ProcessorConfig RetryConfig RateLimitConfig RateLimitStrategy ExponentialBackoffStrategy
    FixedDelayStrategy Quota QuotaLimits BatchLLMError UsageError ProviderError Failure FailureKind
    FrameworkTimeoutError __version__ Request NativeRequest current_item
"""

#: Dotted paths outside the front door that documents, examples and configurations name.
PATHS = """
    batchllm_celery:app
    batchllm_celery.errors:ERROR_MESSAGE_MAX_LENGTH
    batchllm_celery.errors:describe
    batchllm_celery.errors:UsageError
    batchllm_celery.execution.middleware:BaseMiddleware
    batchllm_celery.execution.middleware:Middleware
    batchllm_celery.files:PromptTemplate
    batchllm_celery.files:ResultFile
    batchllm_celery.files:Rows
    batchllm_celery.limiter:ExponentialBackoffStrategy
    batchllm_celery.limiter:FixedDelayStrategy
    batchllm_celery.limiter:policy_from
    batchllm_celery.models:BatchResult
    batchllm_celery.models:TokenUsage
    batchllm_celery.observability:BaseObserver
    batchllm_celery.observability:MetricsObserver
    batchllm_celery.observability:ProcessingEvent
    batchllm_celery.progress:RichProgressBar
    batchllm_celery.settings:Settings
    batchllm_celery.simulation:SimulatedProvider
    batchllm_celery.strategies:GeminiCachedStrategy
    batchllm_celery.strategies:ProcessResources
    batchllm_celery.strategies:Registry
    batchllm_celery.strategies.failures:extract_token_usage
    batchllm_celery.strategies.gemini_cache:display_name_of
    batchllm_celery.strategies.gemini_cache:fingerprint_of
    batchllm_celery.strategies.gemini_cache:has_tags
    batchllm_celery.strategies.simulated:open_simulated_client
    batchllm_celery.testing:mock_strategy
    batchllm_celery.worker.broker:Amqp
    batchllm_celery.worker.pool:AsyncioPool
"""

OPTIONS = {
    "run": """
        --after-429 --app --attempt-timeout --base-url --batch-id --deadline --dry-run
        --fail-fast --format --input-tpm --item-timeout --items-per-task --json
        --max-attempts --max-concurrency --max-cost --max-output-tokens --model --namespace
        --ordered --out --output-tpm --overwrite --params --priority --prompt --queue
        --quiet --quota --quota-update --redis-url --rpd --rpm --schema --simulation --slots
        --state-dir --strategy --strict --system --temperature --token-budget --tpm
        --verbose --workers
    """,
    "submit": """
        --after-429 --app --attempt-timeout --batch-id --deadline --dry-run --fail-fast
        --format --input-tpm --item-timeout --items-per-task --max-attempts
        --max-concurrency --max-cost --max-output-tokens --model --namespace --output-tpm
        --params --priority --prompt --queue --quiet --quota --quota-update --redis-url
        --rpd --rpm --schema --state-dir --strategy --strict --system --temperature
        --token-budget --tpm --verbose
    """,
    "worker": """
        --app --base-url --drain-seconds --heartbeat-file --loglevel --namespace --processes
        --queue --redis-url --slots --state-dir
    """,
    "status": """
        --json --namespace --redis-url --state-dir --watch
    """,
    "results": """
        --follow --namespace --ordered --out --overwrite --quiet --redis-url --state-dir
    """,
    "cancel": """
        --namespace --redis-url --state-dir
    """,
    "pause": """
        --namespace --redis-url --state-dir
    """,
    "resume": """
        --namespace --redis-url --state-dir
    """,
    "retry-failed": """
        --namespace --redis-url --state-dir
    """,
    "estimate": """
        --app --cached-tokens --format --input-tpm --json --max-concurrency
        --max-output-tokens --model --output-tokens --output-tpm --params --price-model
        --prompt --rpd --rpm --schema --seconds-per-call --slots --strategy --system
        --temperature --tpm --workers
    """,
    "simulate": """
        --api-key --bad-output-rate --billing-exhausted --block-rate --bucket-seconds
        --day-seconds --drop-rate --error-rate --error-statuses --host --input-tpm --jitter
        --keep-calls --latency --latency-tail --log-file --max-concurrency
        --min-cache-tokens --missing-cache-status --models --output-tokens --output-tpm
        --port --retry-hint --rpd --rpm --seed --thoughts-tokens --tpm --truncated-rate
        --window --window-seconds
    """,
    "doctor": """
        --app --json --namespace --redis-url --state-dir
    """,
    "quota": "",
    "quota set": """
        --after-429 --day-exhausted --input-tpm --max-concurrency --namespace --output-tpm
        --redis-url --rpd --rpm --state-dir --tpm
    """,
    "quota show": """
        --json --namespace --redis-url --state-dir
    """,
    "flower": """
        --address --basic-auth --namespace --port --redis-url --state-dir
    """,
}

SETTINGS = """
    app drain_seconds heartbeat_file heartbeat_seconds lease_seconds max_deliveries max_outstanding
    max_payload_bytes namespace offer_seconds openai_base_url prices_file queue redis_url
    result_ttl_seconds simulated_url slots state_dir
"""


def _command(path: str) -> click.Command:
    command: click.Command = cli
    for name in path.split():
        assert isinstance(command, click.Group), path
        found = command.get_command(click.Context(command), name)
        assert found is not None, path
        command = found
    return command


@pytest.mark.parametrize("name", NAMES.split())
def test_a_public_name_stays(name: str) -> None:
    """Each name of the front door is in `__all__` and can be imported."""
    assert name in batchllm_celery.__all__
    assert getattr(batchllm_celery, name) is not None


@pytest.mark.parametrize("path", PATHS.split())
def test_a_documented_path_stays(path: str) -> None:
    """A path in somebody's configuration is a string that no type checker follows."""
    module, _, name = path.partition(":")
    if name == "app":  # looked for, not opened: it would connect
        assert "app" in Path(str(batchllm_celery.__file__)).read_text()
        return
    assert hasattr(importlib.import_module(module), name)


def test_every_path_in_documents_is_one_that_imports() -> None:
    """README, docs and deployment files name modules and names that exist."""
    pages = [ROOT / "README.md", ROOT / "docker-compose.yml", *(ROOT / "docs").rglob("*.md")]
    pages += [p for p in (ROOT / "deploy").rglob("*") if p.suffix in {".md", ".yaml", ".yml"}]
    pattern = re.compile(r"\bbatchllm_celery((?:\.[A-Za-z_][\w]*)+)(?::([A-Za-z_]\w*))?")
    missing = [
        f"{page.relative_to(ROOT)}: {match[0]}"
        for page in pages
        for match in pattern.finditer(page.read_text(encoding="utf-8"))
        if not _resolves("batchllm_celery" + match[1], match[2])
    ]
    assert missing == []


def _resolves(dotted: str, name: str | None) -> bool:
    if dotted.endswith((".py", ".lua")):
        return True  # the name of a file
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in [*parts[cut:], *([name] if name else [])]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("path", OPTIONS)
def test_an_option_stays(path: str) -> None:
    """A command keeps each option that a script may pass."""
    offered = {word for param in _command(path).params for word in param.opts}
    offered |= {word for param in _command(path).params for word in param.secondary_opts}
    assert set(OPTIONS[path].split()) <= offered


@pytest.mark.parametrize("name", SETTINGS.split())
def test_a_setting_and_its_variable_stay(name: str) -> None:
    """BATCHLLM_NAME in an environment goes on to mean what it meant."""
    assert name in Settings.model_fields
    assert Settings.model_config.get("env_prefix") == "BATCHLLM_"


def test_the_task_name_stays() -> None:
    """Messages of the version before are run by workers of this one."""
    from batchllm_celery.queue import DEFAULT_QUEUE, RUN_ITEMS

    assert (RUN_ITEMS, DEFAULT_QUEUE) == ("batchllm.run_items", "default")


def test_the_front_door_is_light() -> None:
    """`import batchllm_celery` loads no Celery, no provider's SDK, no server."""
    code = (
        "import sys, batchllm_celery\n"
        "print([m for m in ('celery', 'kombu', 'redis', 'google.genai', 'openai', 'pydantic')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
