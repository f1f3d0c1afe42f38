"""Rows, fingerprints, result lines and the observer: what the ledger decides without Redis."""

from __future__ import annotations

import json
import math

import pytest

from batchllm_celery.errors import FailureKind, UsageError
from batchllm_celery.ledger.codec import (
    Attempts,
    Payload,
    Stored,
    decode_entry,
    encode_result,
    fingerprint,
    strategy_identity,
)
from batchllm_celery.ledger.failure_detector import FailureDetector
from batchllm_celery.ledger.holding import Claim, Holding
from batchllm_celery.ledger.locks import died_here, new_process_id
from batchllm_celery.models import (
    BatchSpec,
    ProcessorConfig,
    RetryState,
    StrategySpec,
    TokenUsage,
    WorkItemResult,
)
from tests.support import Clock

PAYLOADS = [
    Payload("1", "hello"),
    Payload("1", ""),
    Payload("line\nbreak", "several\nlines\n", {"nested": [1, None, "ü"]}),
    Payload("ü", "日本語 \ud800 lone surrogate", "text"),
    Payload("1", "x", 0, StrategySpec(name="echo", params={"model": "m"})),
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_row_survives_redis_unchanged(payload: Payload) -> None:
    """Ids, contexts, strategies and prompts of any text come back as they went in."""
    assert Payload.decode(payload.encode()) == payload


def test_a_stored_row_carries_when_it_was_fed_and_its_fingerprint() -> None:
    """The script puts 13 digits and 8 bytes before the payload, whatever those bytes are."""
    payload = PAYLOADS[2]
    stored = Stored.decode(b"1700000000123" + b"\n\x00\xff12345" + payload.encode())
    assert stored == Stored(1_700_000_000.123, b"\n\x00\xff12345", payload)


def test_a_row_of_a_newer_version_is_refused_with_a_word() -> None:
    """An old worker does not guess at a format that it does not know."""
    with pytest.raises(UsageError, match="newer batchllm-celery"):
        Payload.decode(b'{"v":99,"id":"1"}\nprompt')


def test_the_fingerprint_changes_with_row_and_strategy_and_with_nothing_else() -> None:
    """Same row, same strategy: not paid for again; anything else: another call."""
    spec = BatchSpec(batch_id="b", strategy=StrategySpec(name="echo", params={"a": 1, "b": 2}))
    same = BatchSpec(batch_id="c", strategy=StrategySpec(name="echo", params={"b": 2, "a": 1}))
    other = BatchSpec(batch_id="b", strategy=StrategySpec(name="echo", params={"a": 2, "b": 2}))
    dry = spec.model_copy(update={"config": ProcessorConfig(dry_run=True)})
    row = Payload("1", "hello").encode()
    prints = {
        name: fingerprint(row, strategy_identity(one))
        for name, one in {"spec": spec, "same": same, "other": other, "dry": dry}.items()
    }
    assert all(len(print_) == 8 for print_ in prints.values())
    assert prints["spec"] == prints["same"]
    assert len(set(prints.values())) == 3
    changed = Payload("1", "hello!").encode()
    assert fingerprint(changed, strategy_identity(spec)) != prints["spec"]


def result(**fields: object) -> WorkItemResult[object, object]:
    return WorkItemResult(**{"item_id": "1", "success": True, **fields})  # type: ignore[arg-type]  # test data


def test_a_result_line_is_valid_json_whatever_a_strategy_answers() -> None:
    """NaN, odd objects and lone surrogates must not cost a paid answer."""
    assert json.loads(encode_result(result(output={"x": math.nan})))["output"] == {"x": None}
    assert json.loads(encode_result(result(output="\ud800")))["output"] == "\ud800"
    assert "object" in json.loads(encode_result(result(output=object())))["output"]


def test_an_outcome_that_no_worker_wrote_tells_all_that_is_known() -> None:
    """Its line is made from the payload's head and the attempts before."""
    head = Payload("id-7", "secret prompt", {"n": 7}).encode().partition(b"\n")[0]
    earlier = Attempts(2, 1, RetryState({"k": 1}), TokenUsage(input_tokens=9)).encode()
    fields = {b"b": b"1:1", b"i": b"7", b"k": b"worker_lost", b"h": head, b"t": b"5 0 " + earlier}
    outcome = decode_entry((b"1-0", fields))
    line = WorkItemResult.from_json(json.loads(outcome.line))
    assert (outcome.stream_id, outcome.index, line.item_id, line.index) == ("1-0", 7, "id-7", 7)
    assert line.error_kind is FailureKind.WORKER_LOST
    assert "5 times" in (line.error or "")
    assert (line.context, line.attempts, line.token_usage.input_tokens) == ({"n": 7}, 2, 9)
    assert b"secret" not in outcome.line


def test_attempts_survive_the_move_to_another_process() -> None:
    """Retry state, counters and tokens come back as they were saved."""
    earlier = Attempts(
        2, 3, RetryState({"level": [1, 2]}), TokenUsage(input_tokens=4, output_tokens=5)
    )
    assert Attempts.decode(earlier.encode()) == earlier
    assert Attempts.decode(b"") == Attempts()


def watch(
    detector: FailureDetector, clock: Clock, seconds: float, run_id: str = "r"
) -> dict[str, str]:
    """Look once a second at a process whose counter stays; what has stalled in the end."""
    stalled: dict[str, str] = {}
    for _ in range(int(seconds)):
        clock.now += 1
        stalled = detector.stalled("b", {"p": "7"}, run_id)
    return stalled


def test_a_process_has_stalled_after_one_lease_without_a_beat() -> None:
    """Not a second earlier; and a beat starts the observation anew."""
    clock = Clock()
    detector = FailureDetector(30, clock)
    assert watch(detector, clock, 30) == {}
    assert watch(detector, clock, 1) == {"p": "7"}
    assert detector.stalled("b", {"p": "8"}, "r") == {}


def test_a_detector_that_could_not_observe_does_not_take_that_for_silence() -> None:
    """After an outage, or its own stop, of more than a lease nobody has been heard to be silent."""
    clock = Clock()
    detector = FailureDetector(30, clock)
    watch(detector, clock, 5)
    clock.now += 1000
    assert detector.stalled("b", {"p": "7"}, "r") == {}
    assert watch(detector, clock, 20) == {"p": "7"}


def test_observation_starts_anew_with_another_redis_process() -> None:
    """A restarted Redis may show counters of a second ago."""
    clock = Clock()
    detector = FailureDetector(30, clock)
    assert watch(detector, clock, 31) == {"p": "7"}
    assert watch(detector, clock, 30, run_id="s") == {}
    assert watch(detector, clock, 1, run_id="s") == {"p": "7"}


def claim(index: int, losses: int = 0) -> Claim:
    return Claim("b", index, f"{index:016x}", 0, b"12345678", PAYLOADS[0], losses=losses)


def test_a_process_knows_what_it_holds_and_how_suspicious_that_is() -> None:
    """Forgetting an old claim leaves a newer one of the same item."""
    holding = Holding()
    first, again = claim(1, losses=2), claim(1)
    holding.add(first)
    holding.add(claim(2, losses=1))
    assert (len(holding), holding.poison_candidates(), holding.batches()) == (2, (2, 2), ["b"])
    holding.add(again)
    holding.discard(first)
    assert holding.has("b", 1)
    holding.discard(again)
    holding.discard(again)
    assert not holding.has("b", 1)


def test_a_dead_process_of_this_host_is_known_to_be_dead() -> None:
    """Its lock is free at once; one of another host keeps it for its lease."""
    mine = new_process_id()
    host = mine.split(":")[0]
    assert not died_here(mine)
    assert died_here(f"{host}:{2**22 + 1}:abcd")  # beyond the largest pid
    assert not died_here("elsewhere:1:abcd")
    assert not died_here("nonsense")
