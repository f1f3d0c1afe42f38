"""Answers that can be checked against their prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

#: How many words of the prompt an answer repeats.
ECHOED_WORDS = 40
#: How deep optional parts of a schema are filled in; recursive schemas end here.
_MAX_DEPTH = 6

Schema = Mapping[str, Any]


def digest_of(prompt: str) -> str:
    """Eight hexadecimal digits that name a prompt; every answer to it holds them."""
    return hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest()


def answer_to(prompt: str) -> str:
    """The simulated provider's answer to `prompt` when no schema is asked for."""
    return f"Answer {digest_of(prompt)} to: {' '.join(prompt.split()[:ECHOED_WORDS])}"


def count_tokens(text: str) -> int:
    """The simulated provider's token count: a token for every four bytes of UTF-8."""
    return math.ceil(len(text.encode()) / 4)


def json_answer_to(prompt: str, schema: Schema | None) -> Any:
    """A JSON answer to `prompt`: a valid instance of `schema`, or a free object without one.

    Reads JSON Schema and Gemini's dialect of it (`"STRING"`, `nullable`). Of the keywords that
    need a search (`pattern`, `not`, `if`) none is honoured.
    """
    if schema is None:
        return {"digest": digest_of(prompt), "answer": answer_to(prompt)}
    return _Builder(prompt, schema).build(schema, "", 0)


def json_text_for(prompt: str, schema: Schema | None) -> str:
    """`json_answer_to` as text."""
    return json.dumps(json_answer_to(prompt, schema), ensure_ascii=False)


class _Builder:
    """Builds one instance of a schema, choosing by the prompt's digest."""

    def __init__(self, prompt: str, root: Schema) -> None:
        self._prompt = prompt
        self._root = root
        self._choices = int(digest_of(prompt), 16)
        self._text = answer_to(prompt)

    def build(self, schema: Any, name: str, depth: int) -> Any:
        schema = self._resolve(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._pick(schema["enum"])
        for keyword in ("anyOf", "any_of", "oneOf"):
            if schema.get(keyword):
                return self.build(_alternative(schema[keyword], depth), name, depth)
        return self._build_type(_type_of(schema), schema, name, depth)

    def _resolve(self, schema: Any) -> dict[str, Any]:
        if not isinstance(schema, Mapping):  # `true`: anything goes
            return {}
        resolved = dict(schema)
        for _ in range(20):
            if "$ref" not in resolved:
                break
            reference = resolved.pop("$ref")
            resolved = {**self._target(reference), **resolved}
        for part in resolved.pop("allOf", ()):
            resolved = _merged(resolved, self._resolve(part))
        return resolved

    def _target(self, reference: str) -> Mapping[str, Any]:
        node: Any = self._root
        for part in reference.removeprefix("#").strip("/").split("/"):
            if part:
                node = node[part.replace("~1", "/").replace("~0", "~")]
        return node if isinstance(node, Mapping) else {}

    def _build_type(self, kind: str, schema: dict[str, Any], name: str, depth: int) -> Any:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, name, depth)
        if kind in ("integer", "number"):
            return self._number(schema, kind)
        if kind == "boolean":
            return self._choices % 2 == 0
        if kind == "null":
            return None
        return self._string(schema, name)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        properties = schema.get("properties", {})
        names = [name for name in properties if name in required or depth < _MAX_DEPTH]
        built = {name: self.build(properties[name], name, depth + 1) for name in names}
        extra = schema.get("additionalProperties", schema.get("additional_properties"))
        for name in sorted(required - set(properties)):
            built[name] = self.build(extra or {}, name, depth + 1)
        if isinstance(extra, Mapping) and not built:
            built = {"answer": self.build(extra, "answer", depth + 1)}
        return built

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        items = [self.build(part, name, depth + 1) for part in schema.get("prefixItems", ())]
        least = _whole(schema, "minItems", "min_items", default=0)
        most = _whole(schema, "maxItems", "max_items", default=max(least, len(items) + 2))
        wanted = max(least, min(most, len(items) + (2 if depth < _MAX_DEPTH else 0)))
        if schema.get("items") is False:
            wanted = len(items)
        missing = range(len(items), wanted)
        items += [self._distinct(schema.get("items", {}), name, depth + 1, n) for n in missing]
        return _unique(items) if schema.get("uniqueItems") else items

    def _distinct(self, schema: Any, name: str, depth: int, number: int) -> Any:
        self._choices += 1  # the next item of an array is another one
        item = self.build(schema, name, depth)
        plain = isinstance(item, str) and set(self._resolve(schema)) <= {"type", "title"}
        return f"{item} ({number + 1})" if plain else item

    def _number(self, schema: dict[str, Any], kind: str) -> float:
        step = schema.get("multipleOf") or (1 if kind == "integer" else 0.25)
        low, high = _bounds(schema, step)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        steps = first + self._choices % max(1, min(last - first + 1, 1_000_000))
        value = steps * step
        return int(value) if kind == "integer" else min(float(value), high)

    def _string(self, schema: dict[str, Any], name: str) -> str:
        text = (
            self._formatted(schema.get("format", "")) or (f"{name}: " if name else "") + self._text
        )
        text = text.ljust(_whole(schema, "minLength", "min_length", default=0), ".")
        return text[: _whole(schema, "maxLength", "max_length", default=len(text))]

    def _formatted(self, form: str) -> str | None:
        digest, number = digest_of(self._prompt), self._choices
        day = f"{2000 + number % 25}-{1 + number % 12:02}-{1 + number % 28:02}"
        time = f"{number % 24:02}:{number % 60:02}:00Z"
        return {
            "date": day,
            "time": time,
            "date-time": f"{day}T{time}",
            "duration": f"PT{number % 3600}S",
            "email": f"{digest}@example.com",
            "uri": f"https://example.com/{digest}",
            "url": f"https://example.com/{digest}",
            "hostname": f"{digest}.example.com",
            "ipv4": f"127.{number % 256}.0.1",
            "uuid": f"{digest}-0000-4000-8000-{digest:0>12}",
        }.get(form)

    def _pick(self, values: Sequence[Any]) -> Any:
        return values[self._choices % len(values)]


def _type_of(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if kind is None:
        guesses = {"properties": "object", "items": "array", "minimum": "number"}
        kind = next((guess for key, guess in guesses.items() if key in schema), "string")
    return str(kind).lower()


def _alternative(alternatives: Sequence[Any], depth: int) -> Any:
    """The first that is not null; beyond the depth limit null, or the last (the base case)."""
    nulls = [one for one in alternatives if _is_null(one)]
    others = [one for one in alternatives if not _is_null(one)]
    if depth > _MAX_DEPTH:
        return (nulls or others)[-1]
    return (others or nulls)[0]


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and str(schema.get("type", "")).lower() == "null"


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = {**first, **second}
    if "properties" in first and "properties" in second:
        merged["properties"] = {**first["properties"], **second["properties"]}
    if "required" in first and "required" in second:
        merged["required"] = [*first["required"], *second["required"]]
    return merged


def _whole(schema: Schema, *names: str, default: int) -> int:
    # Gemini writes 64-bit integers as strings.
    return next((int(schema[name]) for name in names if schema.get(name) is not None), default)


def _bounds(schema: Schema, step: float) -> tuple[float, float]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema.get("exclusiveMinimum") is not None:
        low = max(schema["exclusiveMinimum"] + step, -math.inf if low is None else low)
    if schema.get("exclusiveMaximum") is not None:
        high = min(schema["exclusiveMaximum"] - step, math.inf if high is None else high)
    if low is None:
        low = 0 if high is None or high >= 0 else high - 100
    return low, max(low, low + 100 if high is None else high)


def _unique(items: list[Any]) -> list[Any]:
    seen: dict[str, Any] = {}
    for item in items:
        seen.setdefault(json.dumps(item, sort_keys=True), item)
    return list(seen.values())
