"""Failures of a batch, grouped by kind and message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: What differs between messages of one cause: numbers, ids, quoted texts.
_VARIES = re.compile(
    r"\b[0-9a-f]{8,}(?:-[0-9a-f]{4,})*\b|\d+(?:[.,]\d+)*|'[^']{1,80}'|\"[^\"]{1,80}\"", re.I
)
#: Groups that are kept; messages that are all different are counted under their kind.
_MOST_GROUPS = 500
_EXAMPLES = 3


@dataclass(slots=True)
class FailureGroup:
    """Failures of one kind with the same message, but for numbers and quoted texts."""

    kind: str
    message: str
    count: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)
    """Ids of the first ones."""


def group_failures(lines: Iterable[Mapping[str, Any]]) -> tuple[int, list[FailureGroup]]:
    """The number of all results, and the failures in groups, the largest first."""
    groups: dict[tuple[str, str], FailureGroup] = {}
    total = 0
    for line in lines:
        total += 1
        if line["success"]:
            continue
        error = line.get("error") or {}
        kind, message = str(error.get("kind")), str(error.get("message") or "")
        key = (kind, _VARIES.sub("*", message))
        if key not in groups and len(groups) >= _MOST_GROUPS:
            key = (kind, "")
        group = groups.setdefault(
            key, FailureGroup(kind, message if key[1] else "(other messages)")
        )
        group.count += 1
        group.tokens += int((line.get("token_usage") or {}).get("total_tokens") or 0)
        if len(group.examples) < _EXAMPLES:
            group.examples.append(str(line["item_id"]))
    return total, sorted(groups.values(), key=lambda group: -group.count)
