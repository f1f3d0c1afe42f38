"""Outputs and metadata as plain JSON types."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

#: Digits of an integer that Python reads from JSON by default.
MOST_DIGITS = 4300
_LONG_NUMBER = re.compile(rb"\d{4301}")
_SHORT = 10**18


def plain_metadata(metadata: Mapping[str, Any]) -> Any:
    """`metadata` as plain JSON types; what has no JSON form becomes its text.

    Raises:
        ValueError: if it can't be read back.
    """
    data = to_json(dict(metadata), serialize_unknown=True, inf_nan_mode="null")
    _check_digits(data)
    return from_json(data)


def _check_digits(data: bytes) -> None:
    """Python's own JSON reader refuses integers of more than 4,300 digits: what holds one can't
    be read back.

    Raises:
        ValueError: if there is one.
    """
    if len(data) > MOST_DIGITS and _LONG_NUMBER.search(data):
        json.loads(data)


def json_form(value: Any) -> Any:
    """`value` as plain JSON types: pydantic models and dataclasses become objects, NaN null, and
    half a surrogate pair (which no file can hold) a question mark.

    Raises:
        ValueError: if it has no JSON form (PydanticSerializationError is one).
    """
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int and -_SHORT < value < _SHORT:
        return value
    if type(value) is str and value.isascii():
        return value
    if type(value) is float and math.isfinite(value):
        return value
    try:
        data = to_json(value, inf_nan_mode="null")
        _check_digits(data)
        return from_json(data)
    except PydanticSerializationError as error:
        if "UnicodeEncodeError" not in str(error):
            raise
        text = json.dumps(to_jsonable_python(value), ensure_ascii=False)
        return from_json(text.encode("utf-8", "replace"))
