"""What a changed input means for a batch that is there already: what is kept, run, gone, refused.

Pure: rows and outcomes come in as keys and questions, places come out. A row's *key* says which row
it is, its *question* what is asked of the model. A paid answer is never replaced without a word.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from batchllm_celery.dialects.blobs import lift
from batchllm_celery.models.request import NativeRequest, Prompt, Request

#: Bytes of a key's or a question's hash: millions of rows are kept in memory.
_HASH_BYTES = 8


class Rerun(StrEnum):
    """What a run pays for again, or leaves as it is."""

    CHANGED = "changed"
    FAILED = "failed"
    ALL = "all"
    NONE = "none"


# -- which row, and what it asks


def key_of_id(item_id: str) -> bytes:
    """The key of a row that has an id of its own."""
    return b"i" + _hash(item_id)


def key_of_fields(fields: Any) -> bytes:
    """The key of a row without an id: its source fields, before a template. Equal rows have the
    same key, and are told apart by their order."""
    return b"c" + _hash(_canonical(fields))


def key_of_line(line: str) -> bytes:
    """The key of a row that no item can be made of."""
    return b"b" + _hash(line)


def question_of(
    prompt: Prompt,
    *,
    strategy: str,
    version: str = "",
    parameters: Mapping[str, Any] | None = None,
    allow_dropping: Collection[str] = (),
    override: Collection[str] = (),
    base_url: str | None = None,
    context: Any = None,
) -> bytes:
    """The hash of everything that decides what the model is asked.

    Not in it: the row's id, its place, the quota, limits, priority and prices.

    Args:
        prompt: with the bytes of its parts, not their paths.
        strategy: its registered name.
        version: the strategy's own version, which its author raises when its prompt changes.
        parameters: of the strategy: model, system, schema, temperature.
        allow_dropping: parameters that may be left out.
        override: options that beat the row's own values.
        base_url: only its host and path count.
        context: the row's context, where the strategy reads it; None where it does not.
    """
    url = urlsplit(base_url or "")
    asked = [
        _asked(prompt),
        strategy,
        version,
        parameters or {},
        sorted(allow_dropping),
        sorted(override),
        [url.hostname or "", url.path.rstrip("/")],
        context,
    ]
    return _hash(_canonical(asked))


def version_of(question: bytes) -> str:
    """What a result names as the question that it answers: 8 hex digits."""
    return question.hex()[:8]


def _asked(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return ["text", prompt]
    form = prompt.dialect if isinstance(prompt, NativeRequest) else Request.FORM
    body = prompt.body if isinstance(prompt, NativeRequest) else prompt.to_json()
    # Parts by their hashes: 5 MB of base64 are not sorted and written once more.
    lifted = lift(body, most_bytes=sys.maxsize)
    return [form, lifted.body, [place.to_json() for place in lifted.places]]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _hash(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()


# -- what follows


@dataclass(frozen=True, slots=True)
class PresentRow:
    """A row of the present input; its place is its index there.

    `bad`: no item can be made of it, so it is never called.
    """

    key: bytes
    question: bytes
    bad: bool = False


@dataclass(frozen=True, slots=True)
class KnownRow:
    """A row that has an outcome. `question` is None where the outcome does not tell it."""

    key: bytes
    question: bytes | None
    answered: bool


@dataclass(slots=True)
class Plan:
    """What a run does. Places are those of the present input, known ones those of the outcomes.

    Args:
        kept: place -> known outcome that stays, an answer or a failure.
        run: places that are called, in order.
        bad: places of bad rows whose outcome is new.
        changed: (place, known answer) of rows that ask another question now.
        gone: known answers that no row asks for any more.
        unversioned: kept outcomes that do not tell what they answer.
        refused: whether changed rows wait for a decision; nothing may be touched then.
    """

    kept: dict[int, int] = field(default_factory=dict)
    run: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    changed: list[tuple[int, int]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    unversioned: int = 0
    refused: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether known outcomes move, go or are replaced, so that a new generation begins."""
        moved = any(place != known for place, known in self.kept.items())
        return bool(moved or self.gone or self.changed)


def plan(
    present: Sequence[PresentRow],
    known: Sequence[KnownRow],
    rerun: Collection[Rerun] = (),
) -> Plan:
    """Match the present rows to the known outcomes, first by key, then by question.

    Args:
        present: all rows of the input, in its order.
        known: all outcomes, in the order of their places when they were made.
        rerun: what is decided: `changed` runs changed rows, `none` keeps their old answers,
            `failed` runs failed rows again, `all` runs everything. Without one of `changed`,
            `none` and `all` a changed row refuses the whole.
    """
    pairs = _match(present, known)
    edited = _pair_edited(pairs, present, known)
    made = Plan()
    used = set(pairs.values())
    made.gone = [i for i, row in enumerate(known) if row.answered and i not in used]
    for place, row in enumerate(present):
        old = pairs.get(place)
        if old is None:
            (made.bad if row.bad else made.run).append(place)
            continue
        same = place not in edited and known[old].question in (None, row.question)
        if known[old].answered and not same:
            made.changed.append((place, old))
        if _runs_again(row, known[old], same, frozenset(rerun)):
            made.run.append(place)
        elif same or not known[old].answered or Rerun.NONE in rerun:
            made.kept[place] = old
            made.unversioned += known[old].question is None
    decided = {Rerun.CHANGED, Rerun.NONE, Rerun.ALL} & frozenset(rerun)
    made.refused = bool(made.changed) and not decided
    return made


def _runs_again(row: PresentRow, old: KnownRow, same: bool, rerun: frozenset[Rerun]) -> bool:
    if row.bad:
        return False
    if Rerun.ALL in rerun:
        return True
    if old.answered:
        return not same and Rerun.CHANGED in rerun
    # Who mends a failed row wants it run; one that failed as it stands does not run by itself.
    return not same or Rerun.FAILED in rerun


def _match(present: Sequence[PresentRow], known: Sequence[KnownRow]) -> dict[int, int]:
    """Place -> known outcome: by key, and what is left by question (an id column that was renamed
    or added, a column that came or went)."""
    pairs: dict[int, int] = {}
    keyed = [row.key for row in present], [row.key for row in known]
    _pair(pairs, keyed, range(len(present)), range(len(known)), known)
    used = set(pairs.values())
    places = [i for i, row in enumerate(present) if i not in pairs and not row.bad]
    outcomes = [i for i, row in enumerate(known) if i not in used and row.question is not None]
    asked = [row.question for row in present], [row.question for row in known]
    _pair(pairs, asked, places, outcomes, known)
    return pairs


def _pair(
    pairs: dict[int, int],
    names: tuple[Sequence[Hashable], Sequence[Hashable]],
    places: Iterable[int],
    outcomes: Iterable[int],
    known: Sequence[KnownRow],
) -> None:
    """Pair rows and outcomes of the same name in their order. Of more outcomes than rows the
    answers come before the failures: none is paid for while one is left over."""
    wanted, found = _grouped(places, names[0]), _grouped(outcomes, names[1])
    for name, group in wanted.items():
        candidates = found.get(name, [])
        if len(candidates) > len(group):
            candidates = sorted(candidates, key=lambda i: not known[i].answered)[: len(group)]
            candidates.sort()
        pairs.update(zip(group, candidates, strict=False))


def _grouped(indexes: Iterable[int], names: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in indexes:
        groups[names[index]].append(index)
    return groups


def _pair_edited(
    pairs: dict[int, int], present: Sequence[PresentRow], known: Sequence[KnownRow]
) -> set[int]:
    """New rows without an id beside answers that are gone: an edit can't be told from a swap, so
    they count as changed, up to the smaller number."""
    used = set(pairs.values())
    gone = [i for i, row in enumerate(known) if row.answered and i not in used]
    new = [
        place
        for place, row in enumerate(present)
        if place not in pairs and not row.bad and row.key.startswith(b"c")
    ]
    edited = dict(zip(new, gone, strict=False))
    pairs |= edited
    return set(edited)
