"""Which processes have stalled for a lease: judged on our own clock, never on theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class _Silence:
    counter: str
    seconds: float = 0.0


class FailureDetector:
    """Watches the heartbeat counters of a fleet.

    A process has stalled when its counter has not changed for one lease of *observed* time: of the
    time between two calls at most a third of a lease counts. So neither an outage of Redis nor a
    stop of this process is taken for the death of others.

    Args:
        lease: seconds.
        clock: monotonic seconds.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._run_id: str | None = None
        self._seen: dict[str, dict[str, _Silence]] = {}
        self._observed_at: dict[str, float] = {}

    def stalled(self, batch_id: str, counters: Mapping[str, str], run_id: str) -> dict[str, str]:
        """The stalled ones among `counters` (process -> heartbeat counter), with their counters.

        `run_id` names the Redis process: after a restart all observation begins again.
        """
        if run_id != self._run_id:
            self._run_id, self._seen, self._observed_at = run_id, {}, {}
        now = self._clock()
        counted = min(now - self._observed_at.get(batch_id, now), self._lease / 3)
        self._observed_at[batch_id] = now
        before = self._seen.get(batch_id, {})
        after = {}
        for process, counter in counters.items():
            silence = before.get(process)
            if silence is None or silence.counter != counter:
                silence = _Silence(counter)
            else:
                silence.seconds += counted
            after[process] = silence
        self._seen[batch_id] = after
        return {
            process: silence.counter
            for process, silence in after.items()
            if silence.seconds >= self._lease
        }

    def forget(self, batch_id: str) -> None:
        """Drop what is known of a batch that is over."""
        self._seen.pop(batch_id, None)
        self._observed_at.pop(batch_id, None)
