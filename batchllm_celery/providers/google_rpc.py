"""Errors of Google's form (google.rpc), which Gemini gives at its own and at OpenAI's endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from batchllm_celery.errors import FailureKind
from batchllm_celery.strategies.failures import kind_of_refusal

_LIMIT_0 = re.compile(r"\blimit: 0(?![.\d])")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)s")
_KEY_REASONS = {"API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_SERVICE_BLOCKED", "SERVICE_DISABLED"}
_BILLING_REASONS = {"BILLING_DISABLED", "CONSUMER_SUSPENDED", "CONSUMER_INVALID"}


def details_of(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The google.rpc details of an error's body."""
    details = fields.get("details")
    found = details if isinstance(details, list) else []
    return [detail for detail in found if isinstance(detail, Mapping)]


def _of_type(details: list[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    return (detail for detail in details if str(detail.get("@type", "")).endswith(f".{name}"))


def retry_delay(details: list[Mapping[str, Any]]) -> float | None:
    """Seconds to wait, where a `RetryInfo` says so."""
    for detail in _of_type(details, "RetryInfo"):
        match = _DURATION.fullmatch(str(detail.get("retryDelay", "")))
        if match:
            return float(match.group(1))
    return None


def kind_of_error(code: int, details: list[Mapping[str, Any]], message: str) -> FailureKind:
    """The failure kind of a Google error: by its details, then its status and words."""
    reasons = {str(detail.get("reason")) for detail in _of_type(details, "ErrorInfo")}
    if reasons & _KEY_REASONS or (code == 400 and "api key" in message.lower()):
        return FailureKind.AUTHENTICATION
    if reasons & _BILLING_REASONS:
        return FailureKind.BILLING
    if code == 429:
        return _kind_of_429(details, message)
    if code == 400 and "billing" in message.lower():
        return FailureKind.BILLING
    return kind_of_refusal(code, message)


def _kind_of_429(details: list[Mapping[str, Any]], message: str) -> FailureKind:
    """Which 429. The message alone won't do: every one of them says "check your plan and billing
    details"; the violated quota's id tells minute from day, a free tier of 0 that money is
    missing."""
    violations = [
        violation
        for detail in _of_type(details, "QuotaFailure")
        for violation in detail.get("violations") or ()
    ]
    words = json.dumps(violations, default=str) + message
    nothing = any(str(violation.get("quotaValue")) == "0" for violation in violations)
    if re.search(r"free_?tier", words, re.IGNORECASE) and (nothing or _LIMIT_0.search(message)):
        return FailureKind.BILLING
    if "prepayment" in message.lower():
        return FailureKind.BILLING
    names = " ".join(
        str(violation.get(name, "")) for violation in violations for name in ("quotaId", "subject")
    )
    if re.search(r"PerDay|per day", f"{names} {message}", re.IGNORECASE):
        return FailureKind.QUOTA_EXHAUSTED
    return FailureKind.RATE_LIMITED
