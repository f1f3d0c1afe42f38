"""Options of `run`, `submit` and `estimate` as models, checked before anything is enqueued."""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchllm_celery.cli.inputs import STDIN, Rows
from batchllm_celery.cli.template import PromptTemplate
from batchllm_celery.errors import FailureKind, StrategyNotFoundError, UsageError
from batchllm_celery.models import (
    BatchSpec,
    CooldownPolicy,
    ProcessorConfig,
    Quota,
    QuotaLimits,
    RateLimitConfig,
    RetryConfig,
    StrategySpec,
)
from batchllm_celery.models.base import MOST_DOLLARS
from batchllm_celery.models.names import as_label, check_batch_id, check_label
from batchllm_celery.settings import Settings

Options = Mapping[str, Any]

#: Providers that `--model` reaches -> the environment variables that may hold their key.
PROVIDER_KEYS: dict[str, tuple[str, ...]] = {
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "openai": ("OPENAI_API_KEY",),
    "simulated": (),
}
_KEY_PAGES = {
    "gemini": "https://aistudio.google.com/apikey",
    "openai": "https://platform.openai.com/api-keys",
}
#: A dry run's id begins so: it never meets a real batch.
REHEARSAL = "dry-"
_MODEL_PARAMS = ("system", "temperature", "max_output_tokens")
SIMULATED_MODEL = "simulated-1"


def settings_of(options: Options) -> Settings:
    """This process' settings: the environment's, overridden by what options say."""
    named = {
        name: options.get(name)
        for name in ("redis_url", "namespace", "state_dir", "app", "slots", "queue")
    }
    if options.get("base_url"):
        named["openai_base_url"] = options["base_url"]
    return Settings(**{name: value for name, value in named.items() if value is not None})


# -- what runs


def strategy_of(options: Options) -> StrategySpec:
    """What `--model`, or `--strategy` with `--params`, asks for.

    Raises:
        UsageError: naming the option that is wrong or missing.
    """
    model, name = options.get("model"), options.get("strategy")
    if model and name:
        raise UsageError("--model and --strategy exclude each other; give one of them")
    if name:
        check_label(name, "--strategy")
        return StrategySpec(name=name, params=_params(options) | _strategy_extras(options))
    if not model:
        raise UsageError("say what answers: --model PROVIDER:NAME, or --strategy NAME --app MODULE")
    provider, _, model_name = model.partition(":")
    if provider not in PROVIDER_KEYS:
        known = ", ".join(f"{name}:NAME" for name in PROVIDER_KEYS if name != "simulated")
        raise UsageError(
            f"--model {model!r}: unknown provider {provider!r}; use {known} or simulated"
        )
    if not model_name and provider != "simulated":
        raise UsageError(f"--model {model!r} names no model; write {provider}:NAME")
    if options.get("base_url") and provider != "openai":
        raise UsageError("--base-url goes with --model openai:NAME only")
    params = {"model": model_name or SIMULATED_MODEL} | _params(options) | _strategy_extras(options)
    return StrategySpec(name=provider, params=params)


def _strategy_extras(options: Options) -> dict[str, Any]:
    extras = {name: options.get(name) for name in _MODEL_PARAMS}
    extras["schema"] = read_schema(options.get("schema"))
    return {name: value for name, value in extras.items() if value is not None}


def _params(options: Options) -> dict[str, Any]:
    text = options.get("params")
    if not text:
        return {}
    try:
        params = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--params is not JSON: {error}") from None
    if not isinstance(params, dict):
        raise UsageError('--params must be a JSON object, as in {"model": "gemini-2.5-flash"}')
    return params


def read_schema(file: str | None) -> dict[str, Any] | None:
    """The JSON Schema in a file.

    Raises:
        UsageError: if it can't be read, is no object, or no schema that can be checked against.
    """
    if file is None:
        return None
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--schema {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--schema {file} is not JSON: {error}") from None
    except RecursionError:
        raise UsageError(f"--schema {file} is nested too deep") from None
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {file} must hold a JSON Schema object")
    from batchllm_celery.strategies.structured import OutputSchema

    try:
        OutputSchema(schema)
    except UsageError as error:
        raise UsageError(f"--schema {file}: {error}") from None
    return schema


def import_apps(settings: Settings) -> None:
    """Import the modules of `--app`, so that their strategies are registered here.

    Raises:
        UsageError: naming the module that can't be imported.
    """
    for module in filter(None, ((settings.app or "").replace(" ", "")).split(",")):
        _import_app(module)


def _import_app(module: str) -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"--app {module}: {error}") from error
    except Exception as error:
        raise UsageError(f"--app {module} failed: {type(error).__name__}: {error}") from error


def check_strategy(spec: StrategySpec, settings: Settings) -> Any:
    """Build the strategy once, here, so that a wrong name or parameter costs no item; its instance.

    Raises:
        UsageError: from the registry, or saying what the factory did not like.
    """
    from batchllm_celery.strategies import catalog

    import_apps(settings)
    try:
        return catalog.lookup(spec.name).build(spec)
    except (UsageError, StrategyNotFoundError):
        raise
    except ImportError as error:
        raise UsageError(f"strategy {spec.name!r} needs a package: {error}") from error
    except Exception as error:
        raise UsageError(f"strategy {spec.name!r}: {type(error).__name__}: {error}") from error


def check_key(spec: StrategySpec, settings: Settings) -> None:
    """Whether the provider's key is here, for providers that need one.

    Raises:
        UsageError: naming the variable to set and where to get a key.
    """
    names = PROVIDER_KEYS.get(spec.name, ())
    if not names or any(os.environ.get(name) for name in names):
        return
    if spec.name == "openai" and settings.openai_base_url:
        return  # a server of your own may want none
    if spec.name == "gemini" and os.environ.get("GOOGLE_GENAI_USE_VERTEXAI", "").lower() in (
        "1",
        "true",
    ):
        return
    page = _KEY_PAGES[spec.name]
    raise UsageError(f"no API key for {spec.name}: set {names[0]} (get one at {page})")


# -- under which limits


def limits_of(options: Options) -> QuotaLimits:
    """The limits given by `--rpm` and its relatives."""
    return QuotaLimits(
        requests_per_minute=options.get("rpm"),
        tokens_per_minute=options.get("tpm"),
        input_tokens_per_minute=options.get("input_tpm"),
        output_tokens_per_minute=options.get("output_tpm"),
        requests_per_day=options.get("rpd"),
        max_concurrency=options.get("max_concurrency"),
    )


def policy_of(after_429: str | None) -> CooldownPolicy:
    """What `--after-429` asks for; batch-llm's own numbers for the slow start."""
    if after_429 != "slow-start":
        return CooldownPolicy()
    from batchllm_celery.limiter import policy_from

    return policy_from(RateLimitConfig())


def quota_of(options: Options, default_name: str) -> Quota | None:
    """The quota to configure; None where nothing is said about it: what is there, stays. A dry run
    touches none."""
    limits = limits_of(options)
    if options.get("dry_run"):
        return None
    if not limits.given() and not options.get("after_429"):
        return None
    name = _quota_name(options, default_name)
    return Quota(name=name, limits=limits, policy=policy_of(options.get("after_429")))


def _quota_name(options: Options, default: str) -> str:
    name = options.get("quota")
    return default if name is None else check_label(name, "--quota")


def default_quota_name(spec: StrategySpec) -> str:
    """PROVIDER:MODEL, or what the strategy was registered with, or its name."""
    from batchllm_celery.strategies import catalog

    known = catalog.lookup(spec.name).quota_for(spec) if spec.name in catalog else None
    return as_label(known or spec.name)


def model_name(spec: StrategySpec) -> str | None:
    """What prices are looked up under."""
    if spec.name in PROVIDER_KEYS and spec.params.get("model"):
        return f"{spec.name}:{spec.params['model']}"
    return None


def config_of(options: Options) -> ProcessorConfig:
    """Attempts and time limits."""
    retry = {"max_attempts": options["max_attempts"]} if options.get("max_attempts") else {}
    given = {
        "timeout_per_item": options.get("attempt_timeout"),
        "item_timeout": options.get("item_timeout"),
        "dry_run": options.get("dry_run"),
    }
    named = {name: value for name, value in given.items() if value}
    return ProcessorConfig(retry=RetryConfig(**retry), **named)


def fail_fast_of(text: str | None) -> tuple[FailureKind, ...]:
    """The kinds of `--fail-fast KIND,...`.

    Raises:
        UsageError: naming the unknown kind and all known ones.
    """
    kinds = []
    for name in filter(None, (part.strip() for part in (text or "").split(","))):
        try:
            kinds.append(FailureKind(name))
        except ValueError:
            raise UsageError(
                f"--fail-fast: unknown kind {name!r}; known are {', '.join(FailureKind)}"
            ) from None
    return tuple(kinds)


def prices_of(options: Options, strategy: StrategySpec) -> dict[str, tuple[float, float]]:
    """Those of `--price`: of a model, or under "" of all that are not named.

    Raises:
        UsageError: for something that is no price.
    """
    prices = {}
    for text in options.get("price") or ():
        name, _, numbers = text.rpartition("=")
        if name and ":" not in name and strategy.name in PROVIDER_KEYS:
            name = f"{strategy.name}:{name}"
        try:
            read, written = (float(number) for number in numbers.split(","))
        except ValueError:
            read = written = -1.0
        if text.startswith("=") or not (0 <= read <= MOST_DOLLARS and 0 <= written <= MOST_DOLLARS):
            raise UsageError(
                f"--price {text!r}: write IN,OUT or MODEL=IN,OUT, as 0.3,2.5 "
                "(US dollars per million tokens)"
            )
        prices[name] = (read, written)
    return prices


def check_price(spec: BatchSpec, instance: Any, settings: Settings) -> None:
    """Whether `--max-cost` can bind: each model that the strategy may ask needs a price.

    Raises:
        UsageError: naming the one whose price nobody knows.
    """
    if spec.max_cost is None or "" in spec.prices:
        return
    from batchllm_celery.execution import Prices

    prices = Prices(settings.prices_file)
    models = instance.models() or (f"strategy {spec.strategy.name!r}",)
    for model in models:
        if model not in spec.prices and prices.of(model) is None:
            raise UsageError(
                f"--max-cost would never bind: no price is known for {model}; give it with "
                "--price IN,OUT (US dollars per million tokens), or use --token-budget"
            )


def batch_id_for(source: str) -> str:
    """A readable id of its own: `reviews-1122-2104-3f2a`."""
    stem = "batch" if source == STDIN else Path(source).stem
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:40] or "batch"
    return f"{clean}-{time.strftime('%m%d-%H%M')}-{secrets.token_hex(2)}"


def spec_of(
    options: Options, strategy: StrategySpec, *, source: str, queue: str | None, keep_results: bool
) -> BatchSpec:
    """The whole batch. `queue` None: the lane that the options name, else a private one.

    Raises:
        UsageError: (or pydantic's) for an id or a bound that can't be.
    """
    batch_id = options.get("batch_id")
    given = batch_id is not None
    batch_id = check_batch_id(batch_id, "--batch-id") if given else batch_id_for(source)
    if options.get("dry_run"):
        batch_id = REHEARSAL + batch_id.removeprefix(REHEARSAL)
    elif given and batch_id.startswith(REHEARSAL):
        raise UsageError(
            f"--batch-id {batch_id!r}: ids that begin with {REHEARSAL!r} are dry runs'"
        )
    return BatchSpec(
        batch_id=batch_id,
        strategy=strategy,
        quota=_quota_name(options, default_quota_name(strategy)),
        config=config_of(options),
        queue=options.get("queue") or queue or f"run.{batch_id}",
        priority=options.get("priority") or 0,
        items_per_task=options.get("items_per_task"),
        deadline=options.get("deadline"),
        max_cost=options.get("max_cost"),
        token_budget=options.get("token_budget"),
        fail_fast=fail_fast_of(options.get("fail_fast")),
        keep_results=keep_results,
        prices=prices_of(options, strategy),
        model=model_name(strategy),
    )


# -- over which rows


def rows_of(options: Options, source: str, strategy: StrategySpec) -> Rows:
    """The input, opened: an empty or unknown one is refused here."""
    template = options.get("prompt")
    return Rows(
        source,
        strategy,
        template=PromptTemplate(template) if template else None,
        format=options.get("format_") or "auto",
        tunable=strategy.name in PROVIDER_KEYS,
    )
