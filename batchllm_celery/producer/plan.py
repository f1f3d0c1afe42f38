"""What a changed input means for a batch that is there already: what is kept, run, gone, refused.

Pure: rows and outcomes come in as keys and questions, places come out. A row's *key* says which row
it is, its *question* what is asked of the model. A paid answer is never replaced without a word.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from batchllm_celery.dialects.blobs import lift
from batchllm_celery.files.row_keys import HASH_BYTES, canonical, hashed
from batchllm_celery.models.request import NativeRequest, Prompt, Request


class Rerun(StrEnum):
    """What a run pays for again, or leaves as it is."""

    CHANGED = "changed"
    FAILED = "failed"
    ALL = "all"
    NONE = "none"


# -- what a row asks


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
    shared = options_of(
        strategy=strategy,
        version=version,
        parameters=parameters,
        allow_dropping=allow_dropping,
        override=override,
        base_url=base_url,
    )
    return ask(prompt, shared, context)


def options_of(
    *,
    strategy: str,
    version: str = "",
    parameters: Mapping[str, Any] | None = None,
    allow_dropping: Collection[str] = (),
    override: Collection[str] = (),
    base_url: str | None = None,
) -> bytes:
    """The part of a question that rows share, hashed once for all of them."""
    url = urlsplit(base_url or "")
    host = [url.hostname or "", url.path.rstrip("/")]
    shared = [
        strategy, version, parameters or {}, sorted(allow_dropping), sorted(override), host
    ]  # fmt: skip
    return hashed(canonical(shared))


def ask(prompt: Prompt, options: bytes, context: Any = None) -> bytes:
    """The question of one row, from what it shares with others (`options_of`)."""
    if isinstance(prompt, str) and context is None:
        asked = "t" + prompt
    else:
        asked = "j" + canonical([_asked(prompt), context])
    return hashed(asked, options)


def version_of(question: bytes) -> str:
    """What a result names as the question that it answers: 8 hex digits."""
    return question.hex()[:8]


def identity_of(key: bytes, question: bytes) -> str:
    """Key and question as text, for the metadata of a result."""
    return f"{chr(key[0])}{key[1:].hex()}.{question.hex()}"


def read_identity(text: Any) -> tuple[bytes, bytes] | None:
    """Key and question of `identity_of`; None for anything else."""
    if not isinstance(text, str) or len(text) != 4 * HASH_BYTES + 2 or text[0] not in "icb":
        return None
    key, _, question = text[1:].partition(".")
    try:
        return text[0].encode() + bytes.fromhex(key), bytes.fromhex(question)
    except ValueError:
        return None


def _asked(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return ["text", prompt]
    form = prompt.dialect if isinstance(prompt, NativeRequest) else Request.FORM
    body = prompt.body if isinstance(prompt, NativeRequest) else prompt.to_json()
    # Parts by their hashes: 5 MB of base64 are not sorted and written once more.
    lifted = lift(body, most_bytes=sys.maxsize)
    return [form, lifted.body, [place.to_json() for place in lifted.places]]


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
