"""What a changed input means: the histories of a batch, and any other one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from batchllm_celery.files.row_keys import key_of_fields, key_of_id, key_of_line
from batchllm_celery.models.request import NativeRequest, Request
from batchllm_celery.producer.plan import (
    KnownRow,
    Plan,
    PresentRow,
    Rerun,
    plan,
    question_of,
    version_of,
)
from tests.unit.dialects.files import data_url, png

KINDS = ("ids", "no ids", "half of them equal")


@dataclass(frozen=True)
class Source:
    """A row of an input file as its reader sees it."""

    text: str
    item_id: str | None = None
    column: str = ""
    bad: bool = False


def rows_of(kind: str, count: int = 100) -> list[Source]:
    if kind == "ids":
        return [Source(f"text {i}", f"id-{i}") for i in range(count)]
    if kind == "no ids":
        return [Source(f"text {i}") for i in range(count)]
    return [Source("same" if i % 2 else f"text {i}") for i in range(count)]


def present_rows(sources: list[Source], system: str = "") -> list[PresentRow]:
    """As a reader makes them: the second row of an id is bad."""
    seen: set[str] = set()
    rows = []
    for source in sources:
        question = question_of(source.text, strategy="s", parameters={"system": system})
        if source.bad or source.item_id in seen:
            rows.append(PresentRow(key_of_line(repr(source)), b"", bad=True))
        elif source.item_id is not None:
            rows.append(PresentRow(key_of_id(source.item_id), question))
            seen.add(source.item_id)
        else:
            rows.append(PresentRow(key_of_fields([source.text, source.column]), question))
    return rows


def known_rows(
    sources: list[Source], failed: tuple[int, ...] = (), system: str = ""
) -> list[KnownRow]:
    return [
        KnownRow(row.key, row.question, answered=i not in failed and not row.bad)
        for i, row in enumerate(present_rows(sources, system))
    ]


def calls(made: Plan) -> int | str:
    """Calls of the run, or how many rows refuse it."""
    return f"refused {len(made.changed)}" if made.refused else len(made.run)


# -- the histories: 100 rows answered, then the command again


def again(kind: str, sources: list[Source], **given_: Any) -> Plan:
    known = given_.pop("known", known_rows(rows_of(kind)))
    return plan(present_rows(sources, given_.pop("system", "")), known, **given_)


def each(*values: Any) -> list[tuple[str, Any]]:
    return list(zip(KINDS, values, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changed(kind: str) -> None:
    made = again(kind, rows_of(kind))
    assert made == Plan(kept={i: i for i in range(100)})
    assert not made.rewrites


@pytest.mark.parametrize("kind", KINDS)
def test_another_system_is_refused_until_it_is_decided(kind: str) -> None:
    sources = rows_of(kind)
    assert calls(again(kind, sources, system="new")) == "refused 100"
    assert calls(again(kind, sources, system="new", rerun={Rerun.FAILED})) == "refused 100"
    assert calls(again(kind, sources, system="new", rerun={Rerun.CHANGED})) == 100
    kept = again(kind, sources, system="new", rerun={Rerun.NONE})
    assert calls(kept) == 0
    assert kept.kept == {i: i for i in range(100)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_at_the_top_is_the_only_call(kind: str) -> None:
    top = Source("brand new", "id-new" if kind == "ids" else None)
    made = again(kind, [top, *rows_of(kind)])
    assert made.run == [0]
    assert made.kept == {i + 1: i for i in range(100)}
    assert made.rewrites


@pytest.mark.parametrize("kind", KINDS)
def test_sorted_rows_are_moved(kind: str) -> None:
    made = again(kind, sorted(rows_of(kind), key=lambda row: row.text, reverse=True))
    assert calls(made) == 0
    assert len(made.kept) == 100
    assert made.rewrites


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_column_may_be_renamed_or_added(kind: str) -> None:
    added = [replace(row, item_id=f"other-{i}") for i, row in enumerate(rows_of(kind))]
    removed = [replace(row, item_id=None) for row in rows_of(kind)]
    for sources in (added, removed):
        made = again(kind, sources)
        assert calls(made) == 0
        assert len(made.kept) == 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_input_pays_nothing(kind: str) -> None:
    made = again(kind, rows_of(kind)[:60])
    assert calls(made) == 0
    assert len(made.gone) == 40


@pytest.mark.parametrize(("kind", "expected"), each((0, 100), (100, 0), (100, 0)))
def test_a_doubled_input(kind: str, expected: tuple[int, int]) -> None:
    made = again(kind, rows_of(kind) * 2)
    assert (len(made.run), len(made.bad)) == expected
    assert len(made.kept) == 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_goes_on(kind: str) -> None:
    known = known_rows(rows_of(kind))[:60]
    made = again(kind, rows_of(kind), known=known)
    assert made.run == list(range(60, 100))
    assert not made.rewrites
    assert calls(again(kind, rows_of(kind), known=known, system="new")) == "refused 60"


@pytest.mark.parametrize("kind", KINDS)
def test_one_edited_text_is_refused(kind: str) -> None:
    """Without ids it is one new row beside one that is gone."""
    sources = rows_of(kind)
    sources[40] = replace(sources[40], text="edited")
    made = again(kind, sources)
    assert calls(made) == "refused 1"
    assert made.changed == [(40, 40)]
    assert made.gone == []
    assert again(kind, sources, rerun={Rerun.CHANGED}).run == [40]
    assert again(kind, sources, rerun={Rerun.NONE}).kept[40] == 40


@pytest.mark.parametrize("kind", KINDS)
def test_of_failed_rows_the_mended_one_runs(kind: str) -> None:
    """The others wait until they are asked for, and no answer is left over for one."""
    failed = (3, 5, 7)
    sources = rows_of(kind)
    sources[5] = replace(sources[5], text="mended")
    known = known_rows(rows_of(kind), failed)
    made = again(kind, sources, known=known)
    assert made.run == [5]
    assert made.gone == []
    assert len(again(kind, sources, known=known, rerun={Rerun.FAILED}).run) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_further_column_pays_nothing(kind: str) -> None:
    made = again(kind, [replace(row, column="x") for row in rows_of(kind)])
    assert calls(made) == 0
    assert made.kept == {i: i for i in range(100)}


@pytest.mark.parametrize(("kind", "expected"), each("refused 2", 0, 0))
def test_two_texts_that_were_swapped(kind: str, expected: Any) -> None:
    sources = rows_of(kind)
    first, second = sources[10], sources[20]
    sources[10] = replace(first, text=second.text)
    sources[20] = replace(second, text=first.text)
    assert calls(again(kind, sources)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_everything_again(kind: str) -> None:
    assert calls(again(kind, rows_of(kind), rerun={Rerun.ALL})) == 100


@pytest.mark.parametrize("kind", KINDS)
def test_redis_is_empty_and_the_results_are_there(kind: str) -> None:
    """What is known comes from wherever it is kept; without anything all rows run."""
    assert calls(again(kind, rows_of(kind), known=[])) == 100


# -- neighbours


def test_results_that_do_not_tell_their_question_are_kept() -> None:
    known = [replace(row, question=None) for row in known_rows(rows_of("ids"))]
    made = again("ids", rows_of("ids"), known=known, system="new")
    assert (calls(made), made.unversioned) == (0, 100)
    assert calls(again("ids", rows_of("ids"), known=known, rerun={Rerun.ALL})) == 100


def test_an_edited_row_never_takes_an_answer_of_an_unknown_question() -> None:
    """Without an id and without a version nothing says that the answer is its own."""
    known = [replace(row, question=None) for row in known_rows([Source("old")])]
    assert calls(plan(present_rows([Source("new")]), known)) == "refused 1"


def test_a_file_replaced_by_another_is_refused_as_a_whole() -> None:
    others = [Source(f"other {i}") for i in range(80)]
    made = again("no ids", others)
    assert calls(made) == "refused 80"
    assert len(made.gone) == 20
    more = again("no ids", [Source(f"other {i}") for i in range(130)], rerun={Rerun.CHANGED})
    assert (len(more.changed), calls(more)) == (100, 130)


def test_new_ids_beside_gone_ones_are_new() -> None:
    """An id says that it is another row."""
    sources = [*rows_of("ids")[1:], Source("other", "id-new")]
    made = again("ids", sources)
    assert made.run == [99]
    assert made.gone == [0]


def test_bad_rows_are_never_called() -> None:
    sources = [Source("x", bad=True), Source("y")]
    first = plan(present_rows(sources), [])
    assert (first.run, first.bad) == ([1], [0])
    known = known_rows(sources)
    for rerun in ({Rerun.FAILED}, {Rerun.ALL}):
        assert plan(present_rows(sources), known, rerun).kept[0] == 0
    mended = plan(present_rows([Source("x"), Source("y")]), known)
    assert (calls(mended), mended.run) == (1, [0])


def test_an_equal_row_more_is_one_call() -> None:
    made = plan(present_rows([Source("a")] * 3), known_rows([Source("a")] * 2))
    assert made.run == [2]
    fewer = plan(present_rows([Source("a")]), known_rows([Source("a")] * 2, failed=(0,)))
    assert fewer.kept == {0: 1}


# -- questions


def test_what_is_in_a_question() -> None:
    base: dict[str, Any] = {"prompt": "x", "strategy": "s", "parameters": {"model": "m"}}
    changes: list[dict[str, Any]] = [
        {"prompt": "y"},
        {"strategy": "t"},
        {"version": "2"},
        {"parameters": {"model": "n"}},
        {"allow_dropping": ["seed"]},
        {"override": ["temperature"]},
        {"base_url": "https://example.com/v1"},
        {"context": {"a": 1}},
        {"prompt": Request.of({"messages": [{"role": "user", "content": "x"}]})},
        {"prompt": NativeRequest(dialect="openai", body={"messages": ["x"]})},
        {"prompt": NativeRequest(dialect="responses", body={"messages": ["x"]})},
    ]
    questions = [question_of(**base | change) for change in [{}, *changes]]
    assert len(set(questions)) == len(questions)
    assert all(len(question) == 8 for question in questions)
    assert len(version_of(questions[0])) == 8


def test_what_is_not_in_a_question() -> None:
    def ask(**given_: Any) -> bytes:
        return question_of("x", strategy="s", **given_)

    assert ask(parameters={"a": 1, "b": 2}) == ask(parameters={"b": 2, "a": 1})
    assert ask(allow_dropping=["b", "a"]) == ask(allow_dropping={"a", "b"})
    assert ask(base_url="https://user:pw@h/v1?x=1") == ask(base_url="http://h/v1/")
    body = {"messages": [{"role": "user", "content": [{"text": "x"}]}], "seed": 1}
    turned = {"seed": 1, "messages": body["messages"]}
    questions = [
        question_of(NativeRequest(dialect="openai", body=b), strategy="s") for b in (body, turned)
    ]
    assert questions[0] == questions[1]


def test_the_bytes_of_a_part_are_in_the_question() -> None:
    def ask(seed: int) -> bytes:
        part = {"type": "image", "url": data_url(png(9, 9, seed), "image/png")}
        request = Request.of({"messages": [{"role": "user", "content": [part]}]})
        return question_of(request, strategy="s")

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


# -- any history

TEXTS = st.sampled_from([f"t{i}" for i in range(6)])
IDS = st.one_of(st.none(), st.sampled_from([f"i{i}" for i in range(6)]))
RERUN = st.sets(st.sampled_from(list(Rerun)), max_size=2)


class History(RuleBasedStateMachine):
    """A file that is edited and run, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Source] = []
        self.system = ""
        self.known: list[KnownRow] = []

    @initialize(sources=st.lists(st.builds(Source, TEXTS, IDS), max_size=8))
    def begin(self, sources: list[Source]) -> None:
        self.sources = sources

    @rule(at=st.integers(0, 8), source=st.builds(Source, TEXTS, IDS, bad=st.booleans()))
    def insert(self, at: int, source: Source) -> None:
        self.sources.insert(at, source)

    @rule(at=st.integers(0, 8))
    def delete(self, at: int) -> None:
        del self.sources[at : at + 1]

    @rule(at=st.integers(0, 8), text=TEXTS)
    def edit(self, at: int, text: str) -> None:
        self.sources[at : at + 1] = [replace(s, text=text) for s in self.sources[at : at + 1]]

    @rule()
    def turn(self) -> None:
        self.sources.reverse()

    @rule(system=st.sampled_from(["", "other"]))
    def ask_otherwise(self, system: str) -> None:
        self.system = system

    @rule(column=st.sampled_from(["", "x"]))
    def add_a_column(self, column: str) -> None:
        self.sources = [replace(source, column=column) for source in self.sources]

    @rule(rerun=RERUN, data=st.data())
    def run(self, rerun: set[Rerun], data: st.DataObject) -> None:
        present = present_rows(self.sources, self.system)
        made = plan(present, self.known, rerun)
        if made.refused:
            return
        outcomes: dict[int, KnownRow] = {i: self.known[old] for i, old in made.kept.items()}
        for place in made.bad:
            outcomes[place] = KnownRow(present[place].key, present[place].question, False)
        for place in made.run:
            answered = data.draw(st.booleans())
            outcomes[place] = KnownRow(present[place].key, present[place].question, answered)
        # A kept outcome belongs to the row that it stands at now.
        self.known = [
            replace(outcomes[place], key=present[place].key) for place in sorted(outcomes)
        ]
        settled = plan(present, self.known, {Rerun.NONE})
        assert settled.run == settled.bad == settled.gone == []
        assert not any(place != old for place, old in settled.kept.items())

    @invariant()
    def every_row_has_one_fate(self) -> None:
        present = present_rows(self.sources, self.system)
        for rerun in ((), (Rerun.CHANGED,), (Rerun.NONE,), (Rerun.ALL,)):
            made = plan(present, self.known, rerun)
            waiting = [place for place, _ in made.changed] if made.refused else []
            fates = Counter([*made.kept, *made.run, *made.bad, *waiting])
            assert fates == Counter(range(len(present)))

    @invariant()
    def every_answer_has_one_fate(self) -> None:
        made = plan(present_rows(self.sources, self.system), self.known)
        fates = Counter([*made.kept.values(), *made.gone, *(old for _, old in made.changed)])
        answers = {i for i, row in enumerate(self.known) if row.answered}
        assert all(count == 1 for count in fates.values())
        assert answers <= fates.keys()

    @invariant()
    def nothing_is_paid_for_while_its_answer_is_left(self) -> None:
        """A row that runs, or is refused, without an id has no answer to its question at hand."""
        present = present_rows(self.sources, self.system)
        made = plan(present, self.known)
        left = {self.known[old].question for old in made.gone}
        left |= {
            self.known[old].question for _, old in made.changed if self.known[old].key[:1] == b"c"
        }
        asked = {present[place].question for place in made.run if present[place].key[:1] == b"c"}
        assert not (left & asked)

    @invariant()
    def a_kept_answer_answers_its_row(self) -> None:
        present = present_rows(self.sources, self.system)
        for place, old in plan(present, self.known).kept.items():
            if self.known[old].answered:
                assert self.known[old].question == present[place].question


History.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestHistory = History.TestCase


@settings(max_examples=50, deadline=None)
@given(sources=st.lists(st.builds(Source, TEXTS, IDS), max_size=12), data=st.data())
def test_order_alone_costs_nothing(sources: list[Source], data: st.DataObject) -> None:
    """Of rows whose ids are unique or absent, any order is the same batch."""
    unique = list({source.item_id or id(source): source for source in sources}.values())
    shuffled = data.draw(st.permutations(unique))
    made = plan(present_rows(list(shuffled)), known_rows(unique))
    assert calls(made) == 0
    assert made.gone == []
