"""Rows of the providers' batch files: which they are, what they ask, and their result rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from batchllm_celery.dialects import anthropic, gemini, openai, responses
from batchllm_celery.dialects.answers import FailedAnswer, condense
from batchllm_celery.dialects.refusals import Reader, Refusals
from batchllm_celery.errors import FailureKind
from batchllm_celery.models import Completion
from batchllm_celery.models.request import MOST_LEVELS, DialectName, NativeRequest, too_deep

#: The files' formats. OpenAI's holds rows of three dialects.
RowFormat: TypeAlias = Literal["openai", "gemini", "anthropic"]

_URL_DIALECTS: dict[str, DialectName] = {
    "/chat/completions": "openai",
    "/responses": "responses",
    "/embeddings": "embeddings",
}
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
#: Ids that Anthropic takes; the others take any text.
_ANTHROPIC_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NEVER_NATIVE = "unsupported: an answer here comes whole, from this request alone"


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of a batch file asks.

    Args:
        row_format: the file's format.
        key: the row's own id; None where it has none.
        request: its body, unchanged.
        model: the model that the body names; None in most rows of Gemini.
        rest: fields beside the provider's own, for the item's context.
    """

    row_format: RowFormat
    key: str | None
    request: NativeRequest
    model: str | None
    rest: Mapping[str, Any] = field(default_factory=dict)


# -- rows in


def recognise(fields: Mapping[str, Any]) -> RowFormat | None:
    """Whose batch row this is; None for a row of another kind."""
    if "prompt" in fields:
        return None
    if isinstance(fields.get("body"), Mapping) and ("url" in fields or "custom_id" in fields):
        return "openai"
    if isinstance(fields.get("params"), Mapping) and "custom_id" in fields:
        return "anthropic"
    request = fields.get("request")
    if isinstance(request, Mapping) and "contents" in request:
        return "gemini"
    return None


def read_row(fields: Mapping[str, Any]) -> Row | Refusals:
    """Read a row that `recognise` knows.

    Returns:
        `Refusals` naming what is wrong with the row or can't be run: `row.url`, `body.stream`.
    """
    row_format = recognise(fields)
    reader = Reader()
    rest = dict(fields)
    if row_format == "openai":
        dialect = _read_url(reader, rest)
        body, key = rest.pop("body"), _key(reader, rest, "custom_id")
        if rest.pop("method", "POST") != "POST":
            reader.refuse("row.method", "must be POST")
    elif row_format == "anthropic":
        dialect, body = "anthropic", rest.pop("params")
        key = _key(reader, rest, "custom_id")
        if key is not None and not _ANTHROPIC_ID.fullmatch(key):
            reader.refuse("row.custom_id", "must be 1 to 64 letters, digits, - and _")
    elif row_format == "gemini":
        dialect, body, key = "gemini", rest.pop("request"), _key(reader, rest, "key")
    else:
        reader.refuse("row", "is no row of a batch file of OpenAI, Gemini or Anthropic")
        return _refused(reader)
    model = check_body(reader, dialect, body)
    if reader.refusals:
        return _refused(reader)
    request = NativeRequest(dialect=dialect, body=dict(body))
    return Row(row_format, key, request, model, rest)


def _refused(reader: Reader) -> Refusals:
    return Refusals(tuple(reader.refusals))


def _key(reader: Reader, rest: dict[str, Any], name: str) -> str | None:
    key = rest.pop(name, None)
    if key is None or (isinstance(key, str) and key.strip()):
        return key
    reader.refuse(f"row.{name}", "must be a text that is not empty")
    return None


def _read_url(reader: Reader, rest: dict[str, Any]) -> DialectName:
    url = rest.pop("url", None)
    if isinstance(url, str):
        path = url.partition("?")[0].rstrip("/")
        for end, dialect in _URL_DIALECTS.items():
            if path in (end, f"/v1{end}") or path.endswith(f"/v1{end}"):
                return dialect
    reader.refuse(
        "row.url", "unsupported: it must be /v1/chat/completions, /v1/responses or /v1/embeddings"
    )
    return "openai"


_NEEDED = {
    "openai": ("messages",),
    "responses": (),
    "embeddings": ("input",),
    "gemini": ("contents",),
    "anthropic": ("messages", "max_tokens"),
}


def check_body(reader: Reader, dialect: DialectName, body: Mapping[str, Any]) -> str | None:
    """Refuse what can't be run of a native body; the model that it names, where it names one.

    Everything else is the provider's to judge: the body is sent as it is.
    """
    if too_deep(body):
        reader.refuse("body", f"is nested deeper than {MOST_LEVELS} levels")
        return None
    for name in ("stream", "background"):
        if body.get(name):
            reader.refuse(f"body.{name}", _NEVER_NATIVE)
    for name in ("previous_response_id", "previousResponseId", "continuationToken"):
        if body.get(name) is not None:
            reader.refuse(f"body.{name}", _NEVER_NATIVE)
    for name in _NEEDED[dialect]:
        if body.get(name) is None:
            reader.refuse(f"body.{name}", "is missing")
    model = body.get("model")
    if model is None:
        if dialect != "gemini":
            reader.refuse("body.model", "is missing")
        return None
    if not isinstance(model, str) or not _MODEL.fullmatch(model):
        reader.refuse("body.model", "must be a model's name")
        return None
    return model.removeprefix("models/") if dialect == "gemini" else model


# -- rows out


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of one row.

    Args:
        key: the row's id.
        batch_id: of the batch; with the key it makes the id of the result row.
        completion: the answer; None for a failure.
        kind: why it failed; None for an answer.
        message: `Type: message` of the failure.
        status: of the last reply; None where there was none (time-outs, cancelled rows).
        request_id: of that reply.
        raw: text of its body, which is spliced into the row unchanged; None where it was not kept
            or comes from a provider of another dialect.
        model: PROVIDER:MODEL that answered.
        dialect: of the row, in a file of OpenAI.
    """

    key: str
    batch_id: str = ""
    completion: Completion[Any] | None = None
    kind: FailureKind | None = None
    message: str = ""
    status: int | None = None
    request_id: str | None = None
    raw: str | None = None
    model: str = ""
    dialect: DialectName = "openai"

    @classmethod
    def of_failure(cls, key: str, failure: FailedAnswer, **given: Any) -> RowOutcome:
        """The outcome of a reply that failed."""
        return cls(
            key,
            kind=failure.kind,
            message=failure.message,
            status=failure.status,
            request_id=failure.request_id,
            **given,
        )


def write_row(row_format: RowFormat, outcome: RowOutcome) -> tuple[str, bool]:
    """A result row as the provider's batch API writes it, without its line end, and whether it
    belongs into the file of errors (which OpenAI alone has)."""
    return _WRITERS[row_format](outcome)


def _write_openai(outcome: RowOutcome) -> tuple[str, bool]:
    error: Any = None
    response = None
    request_id = outcome.request_id or ""
    if outcome.completion is not None:
        body = _raw_object(outcome) or _dumps(_translated(outcome))
        response = _spliced({"status_code": 200, "request_id": request_id}, "body", body)
    elif outcome.status:
        body = _raw_object(outcome) or _dumps(_openai_error(outcome))
        head = {"status_code": outcome.status, "request_id": request_id}
        response = _spliced(head, "body", body)
    else:
        error = {"code": _openai_code(outcome.kind), "message": outcome.message}
    head = {"id": _row_id(outcome), "custom_id": outcome.key}
    line = _spliced(head, "response", response or "null")
    return f'{line[:-1]}, "error": {_dumps(error)}}}', outcome.completion is None


def _write_gemini(outcome: RowOutcome) -> tuple[str, bool]:
    body = _answer_body(outcome, ("candidates", "promptFeedback", "prompt_feedback"))
    if body is not None:
        return _spliced({"key": outcome.key}, "response", body), False
    error = {"code": rpc_code(outcome.status, outcome.kind), "message": outcome.message}
    return _dumps({"key": outcome.key, "error": error}), False


def _write_anthropic(outcome: RowOutcome) -> tuple[str, bool]:
    body = _answer_body(outcome, ("content",))
    if body is not None:
        result = _spliced({"type": "succeeded"}, "message", body)
    elif outcome.kind in _ENDED:
        result = _dumps({"type": _ENDED[outcome.kind]})
    else:
        raw = _raw_object(outcome)
        if raw is None or not _has(raw, ("error",)):
            name = _anthropic_type(outcome)
            error = {"type": name, "message": outcome.message}
            raw = _dumps({"type": "error", "error": error, "request_id": outcome.request_id})
        result = _spliced({"type": "errored"}, "error", raw)
    return _spliced({"custom_id": outcome.key}, "result", result), False


_WRITERS: dict[RowFormat, Callable[[RowOutcome], tuple[str, bool]]] = {
    "openai": _write_openai,
    "gemini": _write_gemini,
    "anthropic": _write_anthropic,
}


def _answer_body(outcome: RowOutcome, names: tuple[str, ...]) -> str | None:
    """The body that the provider's own file would hold: of an answer, and of one that was cut or
    blocked, since there it is an answer too."""
    raw = _raw_object(outcome)
    if outcome.completion is not None:
        return raw or _dumps(_translated(outcome))
    if raw is not None and outcome.status == 200 and _has(raw, names):
        return raw
    return None


def _raw_object(outcome: RowOutcome) -> str | None:
    """The kept body where it is a JSON object, on one line."""
    if outcome.raw is None:
        return None
    try:
        value = json.loads(outcome.raw)
    except (ValueError, RecursionError):
        return None
    # Line ends in JSON stand between values only: within texts they are escaped.
    return " ".join(outcome.raw.split("\n")).replace("\r", " ") if isinstance(value, dict) else None


def _has(raw: str, names: tuple[str, ...]) -> bool:
    value = json.loads(raw)
    return any(name in value for name in names)


def _translated(outcome: RowOutcome) -> dict[str, Any]:
    completion = outcome.completion
    assert completion is not None
    model, answer_id = outcome.model, f"batchllm-{_digest(outcome)}"
    if outcome.dialect == "gemini":
        return gemini.write_answer(completion, model=model, answer_id=answer_id)
    if outcome.dialect == "anthropic":
        return anthropic.write_answer(completion, model=model, answer_id=answer_id)
    if outcome.dialect == "responses":
        return responses.write_answer(completion, model=model, answer_id=answer_id)
    if outcome.dialect == "embeddings":
        return openai.write_embeddings(completion, model=model)
    return openai.write_answer(completion, model=model, answer_id=answer_id)


def _spliced(head: Mapping[str, Any], name: str, raw: str) -> str:
    """A JSON object whose last value is this JSON text, unchanged: 1.0 stays 1.0."""
    return f'{_dumps(head)[:-1]}, "{name}": {raw}}}'


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)


def _row_id(outcome: RowOutcome) -> str:
    return f"batch_req_{_digest(outcome)}"


def _digest(outcome: RowOutcome) -> str:
    name = f"{outcome.batch_id}\n{outcome.key}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(name).hexdigest()[:32]


# -- error codes

_ENDED = {
    FailureKind.CANCELLED: "canceled",
    FailureKind.ABORTED: "canceled",
    FailureKind.BUDGET: "canceled",
    FailureKind.DEADLINE: "expired",
}


def _openai_code(kind: FailureKind | None) -> str:
    codes = {FailureKind.DEADLINE: "batch_expired", FailureKind.CANCELLED: "batch_cancelled"}
    return codes.get(kind or FailureKind.UNKNOWN, (kind or FailureKind.UNKNOWN).value)


def _openai_error(outcome: RowOutcome) -> dict[str, Any]:
    kind = outcome.kind or FailureKind.UNKNOWN
    message = condense(outcome.message)
    return {"error": {"message": message, "type": kind.value, "param": None, "code": kind.value}}


_RPC_CODES = {
    400: 3,
    401: 16,
    403: 7,
    404: 5,
    408: 4,
    409: 10,
    429: 8,
    499: 1,
    501: 12,
    503: 14,
    504: 4,
}
_RPC_KINDS = {
    FailureKind.CANCELLED: 1,
    FailureKind.ABORTED: 1,
    FailureKind.BUDGET: 1,
    FailureKind.DEADLINE: 4,
    FailureKind.FRAMEWORK_TIMEOUT: 4,
    FailureKind.PROVIDER_TIMEOUT: 4,
    FailureKind.RATE_LIMITED: 8,
    FailureKind.QUOTA_EXHAUSTED: 8,
    FailureKind.INVALID_REQUEST: 3,
    FailureKind.INVALID_INPUT: 3,
    FailureKind.AUTHENTICATION: 16,
    FailureKind.CONNECTION: 14,
    FailureKind.OVERLOADED: 14,
}


def rpc_code(status: int | None, kind: FailureKind | None) -> int:
    """The google.rpc code of a failure: by its status, else by its kind; 13 (internal) else."""
    if status is None or status < 400:
        return _RPC_KINDS.get(kind or FailureKind.UNKNOWN, 13)
    return _RPC_CODES.get(status, 3 if status < 500 else 13)


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
    503: "overloaded_error",
}
_ANTHROPIC_KINDS = {
    FailureKind.RATE_LIMITED: "rate_limit_error",
    FailureKind.QUOTA_EXHAUSTED: "rate_limit_error",
    FailureKind.OVERLOADED: "overloaded_error",
    FailureKind.AUTHENTICATION: "authentication_error",
    FailureKind.BILLING: "billing_error",
    FailureKind.INVALID_REQUEST: "invalid_request_error",
    FailureKind.INVALID_INPUT: "invalid_request_error",
    FailureKind.FRAMEWORK_TIMEOUT: "timeout_error",
    FailureKind.PROVIDER_TIMEOUT: "timeout_error",
}


def _anthropic_type(outcome: RowOutcome) -> str:
    status = outcome.status
    if status is None or status < 400:
        return _ANTHROPIC_KINDS.get(outcome.kind or FailureKind.UNKNOWN, "api_error")
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
