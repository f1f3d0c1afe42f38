"""The options of a command as one frozen object, and the models that they stand for.

Everything is checked here, before anything is enqueued.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchllm_celery.errors import FailureKind, InputError, StrategyNotFoundError, UsageError
from batchllm_celery.files.native import MOST_MODELS, NativeRows
from batchllm_celery.files.out_formats import OutFormat
from batchllm_celery.files.prompt_template import PromptTemplate
from batchllm_celery.files.readers import STDIN, Format
from batchllm_celery.files.rows import Rows, check_all, spooled
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
from batchllm_celery.redaction import safe_url, without_secrets
from batchllm_celery.settings import Settings

if TYPE_CHECKING:
    from batchllm_celery.producer import Producer

#: Providers that `--model` reaches -> the environment variables that may hold their key.
PROVIDER_KEYS: dict[str, tuple[str, ...]] = {
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "simulated": (),
}
_KEY_PAGES = {
    "gemini": "https://aistudio.google.com/apikey",
    "openai": "https://platform.openai.com/api-keys",
    "anthropic": "https://console.anthropic.com/settings/keys",
}
#: Prefix of the batch ids of dry runs, so that none is the id of a real batch.
DRY_RUN_PREFIX = "dry-"
SIMULATED_MODEL = "simulated-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRequest:
    """The options that several commands share, under their own names.

    A command fills the fields that it offers; the others keep their defaults. None and False mean
    that the option was not given.
    """

    # Where the fleet is.
    redis_url: str | None = None
    namespace: str | None = None
    state_dir: str | None = None
    # What answers.
    model: str | None = None
    strategy: str | None = None
    params: str | None = None
    app: str | None = None
    system: str | None = None
    schema: str | None = None
    temperature: float | None = None
    max_output_tokens: int | None = None
    base_url: str | None = None
    # The input.
    prompt: str | None = None
    format: Format = "auto"
    limit: int | None = None
    sample: int | None = None
    sample_seed: int = 0
    id_column: str | None = None
    text_column: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    strict: bool = False
    rerun: tuple[str, ...] = ()
    retry_failed: bool = False
    files_root: str | None = None
    override: str | None = None
    allow_dropping: str | None = None
    max_models: int | None = None
    # The quota. Infinity means unlimited.
    rpm: float | None = None
    tpm: float | None = None
    input_tpm: float | None = None
    output_tpm: float | None = None
    rpd: float | None = None
    max_concurrency: float | None = None
    quota: str | None = None
    quota_update: bool = False
    after_429: str | None = None
    adaptive_concurrency: bool | None = None
    # The batch and its bounds. Times are in seconds, costs in US dollars.
    batch_id: str | None = None
    items_per_task: int | None = None
    queue: str | None = None
    priority: int | None = None
    dry_run: bool = False
    max_attempts: int | None = None
    attempt_timeout: float | None = None
    item_timeout: float | None = None
    deadline: float | None = None
    max_cost: float | None = None
    price: tuple[str, ...] = ()
    token_budget: int | None = None
    fail_fast: str | None = None
    # Workers.
    slots: int | None = None
    # The output.
    out: str | None = None
    columns: str | None = None
    out_format: OutFormat | None = None
    keep_raw: bool = False
    ordered: bool = False
    overwrite: bool = False
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False


def settings_of(request: CommandRequest) -> Settings:
    """The settings of this process: those of the environment, overridden by the options."""
    given: dict[str, Any] = {
        "redis_url": request.redis_url,
        "namespace": request.namespace,
        "state_dir": request.state_dir,
        "app": request.app,
        "slots": request.slots,
        "queue": request.queue,
        "openai_base_url": request.base_url or None,
    }
    return Settings(**{name: value for name, value in given.items() if value is not None})


# -- what runs


def strategy_of(request: CommandRequest) -> StrategySpec:
    """What the options ask for.

    Raises:
        UsageError: naming the option that is wrong or missing.
    """
    given = given_strategy(request)
    if given is None:
        raise UsageError("say what answers: --model PROVIDER:NAME, or --strategy NAME --app MODULE")
    return given


def given_strategy(request: CommandRequest) -> StrategySpec | None:
    """What `--model`, or `--strategy` with `--params`, asks for; None where rows must say it.

    Raises:
        UsageError: naming the option that is wrong.
    """
    model, name = request.model, request.strategy
    if model and name:
        raise UsageError("--model and --strategy exclude each other; give one of them")
    if name:
        check_label(name, "--strategy")
        return StrategySpec(name=name, params=_params(request) | _strategy_extras(request))
    if not model:
        return None
    provider, _, model_name = model.partition(":")
    if provider not in PROVIDER_KEYS:
        known = ", ".join(f"{name}:NAME" for name in PROVIDER_KEYS if name != "simulated")
        raise UsageError(
            f"--model {model!r}: unknown provider {provider!r}; use {known} or simulated"
        )
    if not model_name and provider != "simulated":
        raise UsageError(f"--model {model!r} names no model; write {provider}:NAME")
    if request.base_url and provider != "openai":
        raise UsageError("--base-url goes with --model openai:NAME only")
    params = {"model": model_name or SIMULATED_MODEL} | _params(request) | _strategy_extras(request)
    if request.allow_dropping:
        params["allow_dropping"] = names_of(request.allow_dropping)
    return StrategySpec(name=provider, params=params)


def names_of(text: str | None) -> list[str]:
    """The names of an option as `--override NAME,...`."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


#: Options that would have to be written into a body that is sent as it is.
_BODY_OPTIONS = ("system", "temperature", "max_output_tokens", "schema")


def native_of(request: CommandRequest, strategy: StrategySpec | None) -> NativeRows:
    """How rows in the format of a provider's batch file are read.

    Raises:
        UsageError: for a name in `--override` that is no option, or one that was not given.
    """
    overrides = names_of(request.override)
    for name in overrides:
        if name not in ("model", *_BODY_OPTIONS):
            known = ", ".join(("model", *_BODY_OPTIONS))
            raise UsageError(f"--override {name!r}: it is one of {known}")
        if getattr(request, name) is None:
            raise UsageError(f"--override {name}: there is no --{name.replace('_', '-')}")
    if strategy is not None and strategy.name not in PROVIDER_KEYS:
        return NativeRows(strategy=strategy)
    given = [name for name in _BODY_OPTIONS if getattr(request, name) is not None]
    options = {name: getattr(request, name) for name in given if name in overrides}
    if "schema" in options:
        options["schema"] = read_schema(request.schema)
    if "model" in overrides:
        options["model"] = request.model
    params: dict[str, Any] = {}
    if request.allow_dropping:
        params["allow_dropping"] = names_of(request.allow_dropping)
    model = None if strategy is None else strategy.params.get("model")
    if request.model == "simulated" and "model" not in overrides:
        model = None  # it names a provider, and rows name their models
    return NativeRows(
        provider=None if strategy is None else strategy.name,
        model=model,
        options=options,
        refused=[name for name in given if name not in overrides],
        params=params,
        most_models=request.max_models or MOST_MODELS,
    )


def _strategy_extras(request: CommandRequest) -> dict[str, Any]:
    extras = {
        "system": text_of(request.system, "--system") if request.system else None,
        "temperature": request.temperature,
        "max_output_tokens": request.max_output_tokens,
        "schema": read_schema(request.schema),
    }
    return {name: value for name, value in extras.items() if value is not None}


def _params(request: CommandRequest) -> dict[str, Any]:
    text = request.params
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
    """Import the modules of `--app`, which register strategies.

    Raises:
        UsageError: naming the module that can't be imported.
    """
    for module in filter(None, ((settings.app or "").replace(" ", "")).split(",")):
        _import_app(module)


def _import_app(module: str) -> None:
    if not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(
            f"--app {module!r} is no module's name: write it as Python imports it (package.tasks, "
            "not package/tasks.py), and start the command in the folder that holds it"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"--app {module}: {error}") from error
    except Exception as error:
        raise UsageError(f"--app {module} failed: {type(error).__name__}: {error}") from error


def check_strategy(spec: StrategySpec, settings: Settings) -> Any:
    """Build the strategy once before any item, so that a wrong name or parameter costs none.

    Returns:
        The strategy's instance.

    Raises:
        UsageError: the registry or the strategy's factory refused.
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
    """Check that the API key is set, for providers that need one.

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


def limits_of(request: CommandRequest) -> QuotaLimits:
    """The limits that `--rpm` and the options like it give."""
    return QuotaLimits(
        requests_per_minute=request.rpm,
        tokens_per_minute=request.tpm,
        input_tokens_per_minute=request.input_tpm,
        output_tokens_per_minute=request.output_tpm,
        requests_per_day=request.rpd,
        max_concurrency=request.max_concurrency,
    )


def policy_of(after_429: str | None) -> CooldownPolicy:
    """The policy that `--after-429` names. The slow start has the numbers of batch-llm."""
    if after_429 != "slow-start":
        return CooldownPolicy()
    from batchllm_celery.compat.rate_limits import policy_from

    return policy_from(RateLimitConfig())


def quota_of(request: CommandRequest, default_name: str) -> Quota | None:
    """The quota to set. None leaves the fleet's quota as it is: no limit was given, or it is a dry
    run."""
    limits = limits_of(request)
    if request.dry_run:
        return None
    if not limits.given() and not request.after_429 and not request.adaptive_concurrency:
        return None
    return Quota(
        name=_quota_name(request, default_name),
        limits=limits,
        policy=policy_of(request.after_429),
        adaptive_concurrency=bool(request.adaptive_concurrency),
    )


def _quota_name(request: CommandRequest, default: str) -> str:
    name = request.quota
    return default if name is None else check_label(name, "--quota")


def default_quota_name(spec: StrategySpec) -> str:
    """The quota that the strategy was registered with, else the strategy's name."""
    from batchllm_celery.strategies import catalog

    known = catalog.lookup(spec.name).quota_for(spec) if spec.name in catalog else None
    return as_label(known or spec.name)


def model_name(spec: StrategySpec) -> str | None:
    """The name that prices are looked up under; None for a strategy of the user's."""
    if spec.name in PROVIDER_KEYS and spec.params.get("model"):
        return f"{spec.name}:{spec.params['model']}"
    return None


def config_of(request: CommandRequest) -> ProcessorConfig:
    """Attempts and time limits."""
    retry: dict[str, Any] = {"max_attempts": request.max_attempts} if request.max_attempts else {}
    given: dict[str, Any] = {
        "timeout_per_item": request.attempt_timeout,
        "item_timeout": request.item_timeout,
        "dry_run": request.dry_run,
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


def prices_of(request: CommandRequest, strategy: StrategySpec) -> dict[str, tuple[float, float]]:
    """The prices of `--price` by model; "" stands for every model that is not named.

    Raises:
        UsageError: for something that is no price.
    """
    prices = {}
    for text in request.price:
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
    """Check that `--max-cost` can stop the batch: each model of the strategy needs a price.

    Raises:
        UsageError: naming the model that has no price.
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
    """A readable id that no other batch has, as `reviews-1122-2104-3f2a`."""
    stem = "batch" if source == STDIN else Path(source).stem
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")
    # `dry-goods.jsonl` is no dry run: its batch could not be resumed by its id.
    clean = re.sub(rf"^({DRY_RUN_PREFIX}[-.]*)+", "", clean)[:40] or "batch"
    return f"{clean}-{time.strftime('%m%d-%H%M')}-{secrets.token_hex(2)}"


def spec_of(
    request: CommandRequest,
    strategy: StrategySpec,
    *,
    source: str,
    queue: str | None,
    keep_results: bool,
    own_models: bool = False,
) -> BatchSpec:
    """The specification of the batch.

    Args:
        request: the options.
        strategy: what answers.
        source: names the batch where `--batch-id` does not.
        queue: the default of `--queue`; None means a private queue of this batch.
        keep_results: whether results stay in Redis after they have been read.
        own_models: whether rows choose their model: each model then has a quota of its own.

    Raises:
        UsageError: naming the option that is wrong. pydantic's own error names a wrong bound.
    """
    batch_id = request.batch_id
    given = batch_id is not None
    batch_id = check_batch_id(batch_id, "--batch-id") if given else batch_id_for(source)
    if request.dry_run:
        batch_id = DRY_RUN_PREFIX + batch_id.removeprefix(DRY_RUN_PREFIX)
    elif given and batch_id.startswith(DRY_RUN_PREFIX):
        raise UsageError(
            f"--batch-id {batch_id!r}: ids that begin with {DRY_RUN_PREFIX!r} are dry runs"
        )
    return BatchSpec(
        batch_id=batch_id,
        strategy=strategy,
        quota=request.quota and _quota_name(request, "")
        if own_models
        else _quota_name(request, default_quota_name(strategy)),
        keep_raw=request.keep_raw or request.out_format is not None,
        config=config_of(request),
        queue=request.queue or queue or f"run.{batch_id}",
        priority=request.priority or 0,
        items_per_task=request.items_per_task,
        deadline=request.deadline,
        max_cost=request.max_cost,
        token_budget=request.token_budget,
        fail_fast=fail_fast_of(request.fail_fast),
        keep_results=keep_results,
        prices=prices_of(request, strategy),
        model=model_name(strategy),
    )


def columns_of(request: CommandRequest) -> tuple[str, ...] | None:
    """The names of `--columns`."""
    names = tuple(name.strip() for name in (request.columns or "").split(",") if name.strip())
    return names or None


def rerun_words(request: CommandRequest) -> tuple[str, ...]:
    """What `--rerun` and `--retry-failed` say.

    Raises:
        UsageError: for words that exclude each other.
    """
    words = tuple(dict.fromkeys(request.rerun + ("failed",) * request.retry_failed))
    if "none" in words and {"changed", "all"} & set(words):
        raise UsageError("--rerun none keeps what --rerun changed or all would run; give one")
    return words


def each_model(
    producer: Producer, spec: BatchSpec, request: CommandRequest, rows: Rows, settings: Settings
) -> None:
    """What is set or checked for each model that rows name, before its first row is enqueued: the
    limits of its quota, and its price under `--max-cost`."""
    if not rows.native.own_models:
        return

    def prepare(model: StrategySpec) -> None:
        quota = quota_of(request, default_quota_name(model)) if spec.quota is None else None
        try:
            if spec.max_cost is not None:
                check_price(spec, check_strategy(model, settings), settings)
            if quota is not None:
                producer.set_quota(quota, update=request.quota_update)
        except UsageError as error:
            raise InputError(str(error)) from error

    for model in list(rows.native.models.values()):
        prepare(model)
    rows.native.on_model = prepare


# -- over which rows


def rows_of(request: CommandRequest, sources: Sequence[str], strategy: StrategySpec | None) -> Rows:
    """The opened input.

    Raises:
        InputError: it can't be read, or it has no row.
    """
    template = request.prompt
    if template and request.text_column:
        raise UsageError("--prompt and --text-column exclude each other; give one of them")
    if request.limit and request.sample:
        raise UsageError("--limit and --sample exclude each other; give one of them")
    return Rows(
        sources,
        strategy,
        template=PromptTemplate(text_of(template, "--prompt")) if template else None,
        format=request.format,
        limit=request.limit,
        sample=request.sample,
        seed=request.sample_seed,
        id_column=request.id_column,
        text_column=request.text_column,
        delimiter=_delimiter(request.delimiter),
        encoding=request.encoding,
        native=native_of(request, strategy),
        files_root=Path(request.files_root) if request.files_root else None,
    )


def _delimiter(given: str | None) -> str | None:
    names = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";", "bar": "|", "pipe": "|"}
    delimiter = names.get(given.lower(), given) if given else given
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise UsageError(f"--delimiter {given!r}: one character, or tab")
    return delimiter


def text_of(value: str, option: str) -> str:
    """The text of an option, or of the file that `@FILE` names.

    Raises:
        UsageError: the file can't be read as UTF-8.
    """
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{option} {value}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {value} is not UTF-8") from None


def open_rows(
    request: CommandRequest,
    sources: Sequence[str],
    strategy: StrategySpec | None,
    stack: contextlib.ExitStack,
) -> Rows:
    """The input, closed by `stack`.

    `--strict` reads it completely first; standard input is copied to a file for that.

    Raises:
        InputError: the input can't be read, has no row, or has a bad one (`--strict`).
    """
    if request.strict or (STDIN in sources and request.batch_id):
        # It is read more than once: to check it, or to compare it with what is known.
        paths = [spooled(source) for source in sources]
        for path, source in zip(paths, sources, strict=True):
            if path != source:
                stack.callback(Path(path).unlink, missing_ok=True)
        sources = paths
    if request.strict:
        check_all(rows_of(request, sources, strategy))
    rows = rows_of(request, sources, strategy)
    stack.callback(rows.close)
    return rows


# -- how to go on


def resume_command(batch_id: str, arguments: list[str]) -> str:
    """The command that was typed, with the batch id and without passwords in URLs. What was decided
    once is kept with the batch, so `--rerun` is not repeated."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--batch-id", "--rerun"):
            skip = True
        elif argument not in ("--overwrite", "--retry-failed") and not argument.startswith(
            ("--batch-id=", "--rerun=")
        ):
            kept.append(_without_password(argument))
    return shlex.join(["batchllm", *kept, "--batch-id", batch_id])


def _without_password(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if not option.startswith("--"):
        option, equals, value = "", "", argument
    return option + equals + without_secrets(safe_url(value) if "://" in value else value)
