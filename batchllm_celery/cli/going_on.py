"""A run that goes on: what its result file and Redis know, against the input as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchllm_celery.cli.display.wording import count, plural
from batchllm_celery.files.result_file import OutputError, ResultFile, Sink, gone_path
from batchllm_celery.files.rows import Rows
from batchllm_celery.models import BatchSpec, StrategySpec

if TYPE_CHECKING:
    from batchllm_celery.producer import Producer
    from batchllm_celery.producer.continuing import Look
    from batchllm_celery.producer.plan import Rerun
    from batchllm_celery.producer.producer import Found


@dataclass(frozen=True, slots=True)
class Beginning:
    """How to open a batch and feed it.

    Args:
        spec: of its present generation.
        renew: whether the batch in Redis begins a new one.
        seen: what the input was compared with; None where nothing is there yet.
        words: lines for the person who waits.
    """

    spec: BatchSpec
    renew: bool = False
    seen: Look | None = None
    words: tuple[str, ...] = ()

    def feed(self, rows: Rows) -> Iterable[Any]:
        """What to feed."""
        return rows if self.seen is None else self.seen.feed(rows)


def begin(
    producer: Producer, spec: BatchSpec, rows: Rows, sink: Sink, rerun: frozenset[Rerun]
) -> Beginning:
    """Compare the input with what is there, write known answers to their new places, and say how to
    go on. Nothing has changed where it raises.

    Raises:
        ChangedRowsError: finished rows ask another question now.
        OutputError: results of the batch were written elsewhere.
    """
    from batchllm_celery.producer.continuing import option_hashes
    from batchllm_celery.producer.producer import find_batch

    if spec.config.dry_run:
        return Beginning(spec)
    found = find_batch(producer, spec.batch_id)
    options = option_hashes(spec, producer.settings.openai_base_url)
    if not isinstance(sink, ResultFile):
        return _stream(spec, rows, found, rerun, producer)
    if found is None and not len(sink.written):
        sink.accept(1, options)
        return Beginning(spec)
    return _Continuation(producer, spec, rows, sink, rerun, options).begin(found)


class _Continuation:
    def __init__(
        self,
        producer: Producer,
        spec: BatchSpec,
        rows: Rows,
        sink: ResultFile,
        rerun: frozenset[Rerun],
        options: dict[str, str],
    ) -> None:
        self._producer = producer
        self._spec = spec
        self._rows = rows
        self._sink = sink
        self._rerun = rerun
        self._options = options

    def begin(self, found: Found | None) -> Beginning:
        sink = self._sink
        stale = found is not None and found.spec.generation != sink.generation
        if found is not None and not stale:
            self._drain()
            self._refuse_lost(found.spec.batch_id)
        seen = self._look(found)
        if seen.refused:
            raise self._refusal(seen)
        renew = found is not None and (seen.renews or stale)
        if renew and not stale:
            # What is under way ends first: its answers are paid for.
            self._producer.quiesce(self._spec.batch_id)
            self._drain()
            seen = self._look(found)
            if seen.refused:
                raise self._refusal(seen)
        generation = sink.generation + (renew and not stale)
        words = self._words(seen)
        sink.accept(generation, self._options)
        if seen.rewrites:
            self._rewrite(seen)
        spec = self._spec.model_copy(update={"generation": generation})
        return Beginning(spec, renew, seen, words)

    def _drain(self) -> None:
        """Write the results that are in Redis still."""
        batch = self._producer.attach(self._spec.batch_id)
        while taken := batch.take(timeout=0.0):
            self._sink.write(taken)
            if (receipt := self._sink.sync()) is not None:
                batch.acknowledge(receipt)

    def _refuse_lost(self, batch_id: str) -> None:
        """Results of the batch that are neither in Redis nor in this file would be paid again."""
        progress = self._producer.attach(batch_id).progress()
        lost = progress.finished - len(self._sink.written) - (progress.unread or 0)
        if progress.unread is not None and lost > 0:
            raise OutputError(
                f"{lost:,} results of batch {batch_id} were written to another file than "
                f"{self._sink.path}; name that file with -o, or start again with another --batch-id"
            )

    def _look(self, found: Found | None) -> Look:
        from batchllm_celery.producer.continuing import ELSEWHERE, Outcomes, Questions, look

        outcomes = Outcomes()
        for offset, line in self._sink.lines():
            outcomes.add(line, offset)
        spare = Outcomes()
        for offset, line in self._sink.gone_lines():
            spare.add({**line, "index": ELSEWHERE + len(spare)}, offset)
        questions = Questions(self._spec, self._producer.settings.openai_base_url)
        fed = found.fed if found is not None else b""
        rows = self._rows.again()
        return look(rows, outcomes, questions, self._spec.strategy, fed, self._rerun, spare)

    def _refusal(self, seen: Look) -> Exception:
        from batchllm_celery.producer.continuing import ChangedRowsError, refusal

        known = self._sink.options
        options = sorted(known.keys() | self._options.keys())
        differing = [name for name in options if known.get(name) != self._options.get(name)]
        why = f" ({', '.join(differing)})" if known and differing else ""
        lines = (self._sink.line_at(seen.outcomes[number][6]) for _, number in seen.changed)
        cost = sum(line.get("cost") or 0.0 for line in lines)
        return ChangedRowsError(
            refusal(len(seen.changed), cost, why) + "--rerun changed (pays) or --rerun none (keeps "
            "the old answers)"
        )

    def _words(self, seen: Look) -> tuple[str, ...]:
        words = []
        runs = seen.total - sum(number >= 0 for number in seen.numbers)
        known = seen.total - runs
        if known:
            words.append(f"{plural(known, 'row')} known already, {count(runs)} to run")
        if seen.gone:
            where = gone_path(self._sink.path)
            words.append(
                f"{plural(len(seen.gone), 'answer')} of rows that are gone: kept in {where}"
            )
        if seen.unversioned:
            words.append(
                f"{plural(seen.unversioned, 'result')} of an earlier version kept: they don't say "
                "what they answer; --rerun all asks again"
            )
        return tuple(words)

    def _rewrite(self, seen: Look) -> None:
        kept = {number for number in seen.numbers if number >= 0}
        left = [
            (number, outcome[6])
            for number, outcome in enumerate(seen.outcomes)
            if outcome[4] and number not in kept and outcome[6] >= 0
        ]
        unasked = set(seen.gone)

        def gone() -> Iterator[Mapping[str, Any]]:
            for number, offset in left:
                line = self._sink.line_at(offset)
                if number not in unasked:  # its row is asked again
                    line["metadata"] = {**(line.get("metadata") or {}), "superseded": True}
                yield line

        back = {offset for n in kept if (offset := seen.outcomes[n][6]) < 0}
        self._sink.replace(self._moved(seen), gone(), back)

    def _moved(self, seen: Look) -> Iterator[Mapping[str, Any]]:
        from batchllm_celery.producer.continuing import Questions, moved

        questions = Questions(self._spec, self._producer.settings.openai_base_url)
        default: StrategySpec = self._spec.strategy
        for place, row in enumerate(self._rows.again()):
            if (number := seen.numbers[place]) >= 0:
                line = self._sink.line_at(seen.outcomes[number][6])
                yield moved(line, place, row, questions, default)


def _stream(
    spec: BatchSpec,
    rows: Rows,
    found: Found | None,
    rerun: frozenset[Rerun],
    producer: Producer,
) -> Beginning:
    """Results that went to a pipe are nowhere any more: a batch of theirs goes on only with the
    rows that it has."""
    from batchllm_celery.producer.continuing import Outcomes, Questions, look

    if found is None:
        return Beginning(spec)
    questions = Questions(spec, producer.settings.openai_base_url)
    seen = look(rows.again(), Outcomes(), questions, spec.strategy, found.fed)
    spec = spec.model_copy(update={"generation": found.spec.generation})
    if not seen.renews:
        return Beginning(spec)
    if not rerun and found.progress.finished:
        raise OutputError(
            f"the rows of batch {spec.batch_id} have changed, and its results went to a pipe: "
            "take another --batch-id, or pay for all rows again with --rerun all"
        )
    return Beginning(spec.model_copy(update={"generation": spec.generation + 1}), renew=True)
