"""Prompt templates as `Summarise: {text}`, filled with the fields of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from batchllm_celery.errors import UsageError

#: `{field}` is a field; `{{field}}` is the text `{field}`. Every other brace is text, so that a
#: template can contain JSON. `{a.b}` is the field of that name, else the field `b` of the object
#: `a`; it never is an attribute.
_FIELD = re.compile(r"\{(\{)?([^\W\d][\w.\- ]*)\}(?(1)\})")


class MissingFieldError(ValueError):
    """The row has no such field, or it is null."""


class PromptTemplate:
    """A checked template.

    Raises:
        UsageError: it names no field, so that every prompt would be the same.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.fields = {match[2] for match in _FIELD.finditer(text) if not match[1]}
        if not self.fields:
            raise UsageError(
                f"the prompt template {text!r} names no field of the rows; "
                "write one in braces, as in 'Summarise: {text}'"
            )

    def roots(self, columns: Collection[str]) -> set[str]:
        """The columns that the fields are in: `a.b` is in `a` where there is no column `a.b`."""
        return {name if name in columns else name.split(".")[0] for name in self.fields}

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Raises:
            MissingFieldError: naming the field.
        """

        def value(match: re.Match[str]) -> str:
            return match[0][1:-1] if match[1] else _as_text(row, match[2])

        return _FIELD.sub(value, self._text)


def find(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field, or of a field inside an object or a list; None where there is none."""
    if field in row or "." not in field:
        return row.get(field)
    value: Any = row
    for part in field.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _as_text(row: Mapping[str, Any], field: str) -> str:
    value = find(row, field)
    if value is None:
        state = "is null" if field in row else "is missing"
        raise MissingFieldError(f"field {field!r} of the prompt template {state}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
