"""A batch or a result file that is there already, and its input as it is now.

`look` compares them before anything changes. Ids or places that differ, answers that are gone, and
what is decided to run again make a new generation: the known outcomes are written or delivered
under their new places, all other rows are fed as new ones.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from batchllm_celery.errors import BatchConflictError, FailureKind, InputError, UsageError
from batchllm_celery.files.requests import Requests
from batchllm_celery.files.row_keys import canonical, hashed, key_of_fields, key_of_id, key_of_line
from batchllm_celery.ledger import Known
from batchllm_celery.ledger.codec import Payload, StoredRequest, fingerprint
from batchllm_celery.models import BadRow, BatchSpec, NativeRequest, Request, StrategySpec
from batchllm_celery.producer.plan import (
    KnownRow,
    Plan,
    PresentRow,
    Rerun,
    ask,
    identity_of,
    options_of,
    plan,
    read_identity,
)
from batchllm_celery.producer.requests import prepare
from batchllm_celery.producer.rows import Row, as_payload

#: Kinds of failures that a decision about the whole batch caused: those rows run when it goes on.
_STOPS = frozenset(
    {FailureKind.CANCELLED, FailureKind.DEADLINE, FailureKind.BUDGET, FailureKind.ABORTED}
)
#: Added to the places of results that stand elsewhere than the present ones.
ELSEWHERE = 2**40
_NO_QUESTION = bytes(8)
#: A key that no row has: an outcome that does not say which row it belongs to.
_NO_KEY = bytes(9)


class ChangedRowsError(BatchConflictError):
    """Finished rows ask another question now, and nobody has decided what becomes of them."""


def refusal(changed: int, cost: float, why: str = "") -> str:
    """The line that refuses changed rows, up to what decides."""
    rows = "1 finished row asks" if changed == 1 else f"{changed:,} finished rows ask"
    price = f"; paying again about ${cost:,.4f}" if cost else ""
    return f"{rows} another question now{why}{price}: nothing was changed; decide with "


def rerun_of(value: str | Rerun | Collection[str | Rerun] | None) -> frozenset[Rerun]:
    """What `rerun=` or `--rerun` says.

    Raises:
        ValueError: for a word that it is none of.
    """
    words = [value] if isinstance(value, str) else list(value or ())
    return frozenset(Rerun(word) for word in words)


class Questions:
    """What the rows of one batch ask; what they share is hashed once."""

    def __init__(self, spec: BatchSpec, base_url: str | None = None) -> None:
        self._spec = spec
        self._base_url = base_url if spec.strategy.name == "openai" else None
        self._shared: dict[str, bytes] = {}

    def identity(self, payload: Payload, key: bytes | None = None) -> str:
        """Key and question of a row."""
        chosen = payload.strategy or self._spec.strategy
        assert not isinstance(payload.prompt, StoredRequest)  # those are a worker's
        question = ask(payload.prompt, self._options(chosen))
        return identity_of(key or key_of_id(payload.item_id), question)

    def _options(self, strategy: StrategySpec) -> bytes:
        key = strategy.key
        if key not in self._shared:
            if len(self._shared) >= 1000:
                self._shared.clear()
            self._shared[key] = options_of(
                strategy=strategy.name, parameters=strategy.params, base_url=self._base_url
            )
        return self._shared[key]


def option_hashes(spec: BatchSpec, base_url: str | None) -> dict[str, str]:
    """The options that are part of each question, each as a hash: they may hold private text."""
    options = {"strategy": spec.strategy.name, **spec.strategy.params}
    if spec.strategy.name == "openai":
        options["base-url"] = base_url
    return {name: hashed(canonical(value)).hex() for name, value in sorted(options.items())}


@dataclass(frozen=True, slots=True)
class Answered:
    """A row whose outcome is known.

    Args:
        row: as the input has it.
        success: whether it is an answer.
        line: what the consumer gets, in `WorkItemResult.to_json` form; None: it has it already.
    """

    row: Row
    success: bool
    line: bytes = b""


class Outcomes:
    """Outcomes of rows that a result file or Redis holds, in 45 bytes each."""

    #: Place, key, question, hash of id and context, whether answered, whether signed, offset.
    _RECORD = struct.Struct("<q9s8s8s??q")

    def __init__(self) -> None:
        self._packed = bytearray()

    def __len__(self) -> int:
        return len(self._packed) // self._RECORD.size

    def add(self, line: Mapping[str, Any], offset: int = 0) -> None:
        """Add the outcome of a result line; `offset` finds the line again. What a stop of the batch
        left without a call has none yet."""
        if (line.get("error") or {}).get("kind") in _STOPS:
            return
        metadata = line.get("metadata") or {}
        identity = read_identity(metadata.get("row") if isinstance(metadata, Mapping) else None)
        item_id, index = str(line["item_id"]), int(line["index"])
        if identity is None:  # of an earlier version
            own = item_id != str(index)
            identity = (key_of_id(item_id) if own else _NO_KEY, _NO_QUESTION)
            signed = False
        else:
            signed = True
        detail = _detail(item_id, line.get("context"))
        self._packed += self._RECORD.pack(
            index, *identity, detail, bool(line["success"]), signed, offset
        )

    def append(self, outcome: tuple[int, bytes, bytes, bytes, bool, bool, int]) -> None:
        """Add one of others."""
        self._packed += self._RECORD.pack(*outcome)

    def __iter__(self) -> Iterator[tuple[int, bytes, bytes, bytes, bool, bool, int]]:
        return self._RECORD.iter_unpack(self._packed)

    def __getitem__(self, number: int) -> tuple[int, bytes, bytes, bytes, bool, bool, int]:
        return self._RECORD.unpack_from(self._packed, number * self._RECORD.size)


class _Present:
    """The rows of the input as it is now, in 26 bytes each."""

    _RECORD = struct.Struct("<9s8s8s?")

    def __init__(self) -> None:
        self._packed = bytearray()

    def __len__(self) -> int:
        return len(self._packed) // self._RECORD.size

    def add(self, key: bytes, question: bytes, detail: bytes, bad: bool) -> None:
        self._packed += self._RECORD.pack(key, question, detail, bad)

    def __getitem__(self, place: int) -> tuple[bytes, bytes, bytes, bool]:
        return self._RECORD.unpack_from(self._packed, place * self._RECORD.size)

    def rows(self) -> list[PresentRow]:
        return [
            PresentRow(key, question, bad)
            for key, question, _, bad in self._RECORD.iter_unpack(self._packed)
        ]


@dataclass(slots=True)
class Look:
    """What the comparison has found. Places are those of the present input; numbers are those of
    the known outcomes.

    Args:
        total: rows of the input.
        outcomes: the known ones.
        numbers: for each place the outcome that stays there, -1 for a row that runs.
        changed: places and answers of rows that ask another question now.
        gone: answers that no row asks for any more.
        refused: whether changed rows wait for a decision; nothing may be touched then.
        rewrites: whether outcomes move, go, or carry another id or context now.
        renews: whether the batch in Redis must begin a new generation.
        unversioned: outcomes of an earlier version, kept though their question is unknown.
    """

    total: int
    outcomes: Outcomes
    numbers: array[int]
    changed: list[tuple[int, int]]
    gone: list[int]
    refused: bool
    rewrites: bool
    renews: bool
    unversioned: int

    def feed(
        self, rows: Iterable[Row], line_of: Callable[[int, Row, int], bytes] | None = None
    ) -> Iterator[Row | Answered]:
        """The rows to feed: those with a known outcome as `Answered`, with the line that `line_of`
        makes of place, row and number."""
        for place, row in enumerate(rows):
            number = self.numbers[place] if place < len(self.numbers) else -1
            if number < 0:
                yield row
            else:
                line = b"" if line_of is None else line_of(place, row, number)
                yield Answered(row, self.outcomes[number][4], line)


def look(
    rows: Iterable[Row],
    outcomes: Outcomes,
    questions: Questions,
    default: StrategySpec,
    fed: bytes = b"",
    rerun: Collection[Rerun] = (),
    spare: Outcomes | None = None,
) -> Look:
    """Compare an input with the outcomes that are known and with what Redis was fed.

    Args:
        rows: all rows of the input; they are read once.
        outcomes: those that are known.
        questions: of the batch as it is asked for now.
        default: the batch's strategy.
        fed: 8 bytes for each row that Redis knows.
        rerun: what is decided about changed and failed rows.
        spare: answers of rows that had gone; those that are asked for again are taken back.
    """
    present, same_rows, requests = _Present(), True, Requests()
    for place, row in enumerate(rows):
        key, question, detail, bad = _read(row, place, questions, default, requests)
        present.add(key, question, detail, bad)
        if place * 8 < len(fed):
            print_ = fingerprint(identity_of(key, question).encode(), b"row")
            same_rows = same_rows and fed[place * 8 : place * 8 + 8] == print_
    same_rows = same_rows and len(fed) <= 8 * len(present)
    if spare is not None and len(spare):
        _take_back(present, outcomes, spare)
    latest = {outcome[0]: number for number, outcome in enumerate(outcomes)}
    made = _undisturbed(present, outcomes, latest, rerun)
    if made is None:
        made = plan(present.rows(), _known(present, outcomes, latest), rerun)
    numbers = array("q", [-1]) * len(present)
    rewrites, unversioned = False, 0
    for place, number in made.kept.items():
        was, key, question, detail, _, signed, _ = outcomes[number]
        now_key, now_question, now_detail, bad = present[place]
        if bad and was != place:
            continue  # a bad row names its line: it is told again
        numbers[place] = number
        unversioned += not signed
        same = (was, detail) == (place, now_detail) and not (signed and key != now_key)
        rewrites = rewrites or not (bad or (same and (not signed or question == now_question)))
    dropped = sum(number >= 0 for number in numbers) != len(latest)
    return Look(
        total=len(present),
        outcomes=outcomes,
        numbers=numbers,
        changed=made.changed,
        gone=made.gone,
        refused=made.refused,
        rewrites=rewrites or dropped,
        renews=not same_rows or dropped,
        unversioned=unversioned,
    )


def _take_back(present: _Present, outcomes: Outcomes, spare: Outcomes) -> None:
    """Add the spare answers that rows ask for, and that nothing else answers."""
    wanted = Counter(present[place][0] + present[place][1] for place in range(len(present)))
    wanted.subtract(key + question for _, key, question, *_ in outcomes)
    for outcome in spare:
        identity = outcome[1] + outcome[2]
        if outcome[4] and wanted[identity] > 0:
            wanted[identity] -= 1
            outcomes.append(outcome)


def _undisturbed(
    present: _Present, outcomes: Outcomes, latest: Mapping[int, int], rerun: Collection[Rerun]
) -> Plan | None:
    """The plan where every outcome stands at its row, as in a run that was interrupted; it needs
    no room for a million rows. None where something differs."""
    if Rerun.ALL in rerun:
        return None
    for place, number in latest.items():
        _, key, question, _, answered, signed, _ = outcomes[number]
        if place >= len(present) or not signed or present[place][:2] != (key, question):
            return None
        if not answered and Rerun.FAILED in rerun:
            return None
    return Plan(kept=dict(latest))


def _read(
    row: Row, place: int, questions: Questions, default: StrategySpec, requests: Requests
) -> tuple[bytes, bytes, bytes, bool]:
    payload = as_payload(row, place, default)
    if isinstance(payload, BadRow):
        return _bad_key(payload), _NO_QUESTION, _NO_QUESTION, True
    prepare(requests, payload, place, default)  # its question holds the bytes of its parts
    with as_json(place, payload.item_id):
        identity = read_identity(questions.identity(payload, key_of(row)))
        assert identity is not None
        return *identity, _detail(payload.item_id, payload.context), False


def _bad_key(row: BadRow) -> bytes:
    return row.key or key_of_line(row.message)


def identity_of_bad(row: BadRow) -> str:
    """The identity of a row that asks nothing."""
    return identity_of(_bad_key(row), _NO_QUESTION)


@contextmanager
def as_json(place: int, item_id: str) -> Iterator[None]:
    """Name the row of which something has no JSON form: it holds itself, say.

    Raises:
        InputError: with its place and id; an error's own words might quote the row.
    """
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"item {place} ({item_id}): it can't be written as JSON ({type(error).__name__})"
        ) from error


def key_of(row: Row) -> bytes | None:
    """The key of a row that has no id of its own; None: its id is the key."""
    if isinstance(row, str):
        return key_of_fields(row)
    if isinstance(row, Mapping):
        return key_of_fields(dict(row)) if row.get("item_id") is None else None
    if isinstance(row, Request | NativeRequest):
        return key_of_fields(row.to_json())
    return row.key or None


def _known(present: _Present, outcomes: Outcomes, latest: Mapping[int, int]) -> list[KnownRow]:
    known = []
    for number, (place, key, question, _, answered, signed, _) in enumerate(outcomes):
        if latest[place] != number:  # delivered again: the later one counts
            known.append(KnownRow(_NO_KEY + b"%d" % number, None, False))
            continue
        if not signed and place < len(present):
            # A row without an id is known by its place, where nothing else tells it.
            here = present[place]
            key = here[0] if key == _NO_KEY and here[0][:1] == b"c" else key
        known.append(KnownRow(key, question if signed else None, answered))
    return known


def _detail(item_id: str, context: Any) -> bytes:
    return hashed(canonical([item_id, context]))


def moved(
    line: Mapping[str, Any], place: int, row: Row, questions: Questions, default: StrategySpec
) -> Mapping[str, Any]:
    """A kept result line at its new place, with the row's id and context as they are now."""
    payload = as_payload(row, place, default)
    if isinstance(payload, BadRow):
        return line
    prepare(Requests(), payload, place, default)
    metadata = line.get("metadata") or {}
    # It goes on saying which question it answers.
    version = {"version": metadata["version"]} if "version" in metadata else {}
    return {
        **line,
        "item_id": payload.item_id,
        "index": place,
        "context": payload.context,
        "metadata": {**metadata, "row": questions.identity(payload, key_of(row)), **version},
    }


def known_of(answered: Answered, identity: str) -> Known:
    """An `Answered` row as the ledger stores it."""
    return Known(identity, answered.success, answered.line)
