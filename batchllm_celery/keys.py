"""Every key we write to Redis, on one page. All have a TTL; each family shares one hash tag.

NS:{batch:ID}:meta    hash    state, round, total, fed, counters, spent, budget, deadline, locks
NS:{batch:ID}:item    hash    index -> payload (JSON), until the item has succeeded
NS:{batch:ID}:fp      string  8 bytes of content fingerprint per index
NS:{batch:ID}:ready   zset    index -> score; what waits for a claim, expired ones first
NS:{batch:ID}:held    hash    index -> phase (c claimed, p in a call) | token | process
NS:{batch:ID}:procs   hash    process -> its last sign of life; reply to its last `record`
NS:{batch:ID}:attempts hash   index -> losses | round | attempts, RetryState, usage (JSON)
NS:{batch:ID}:done    bitmap  items with an outcome
NS:{batch:ID}:failed  bitmap  those whose outcome is a failure
NS:{batch:ID}:out     stream  outcomes, until the consumer has them (or the batch's TTL)
NS:{batch:ID}:stopped bitmap  failures that a control decision caused: a resume runs them again
NS:{batch:ID}:calls   hash    index -> calls begun in this round | cut off | what cut the last one
NS:{batch:ID}:ids     hash    of a standing batch: id of an item -> index
NS:{batch:ID}:places  hash    of a standing batch: index -> its entry in `out`
NS:{batch:ID}:tasks   hash    of a standing batch: index -> the Celery task that awaits it (JSON)
NS:{batch:ID}:owed    zset    of a standing batch: done -> when its task is sent again
NS:{batch:ID}:done    channel of a standing batch: indexes as they get their outcomes
NS:sealed:ID          string  arguments of a strategy's task that waits in another task's message
NS:batches            zset    batch id -> time of submission
NS:queue:{Q}          zset    active batches of a queue
NS:{quota:NAME}       hash    configuration, live state (clock, cooldown, rates), history
NS:{quota:NAME}:procs hash    process -> sequence | lease clock | permits | last reply
NS:{quota:NAME}:wait  zset    process -> waiting since
NS:{quota:NAME}:ch:DB channel new epochs and free slots; channels know no database, so they name it
NS:quotas             zset    quota names -> last use
NS:worker:ID          hash    one worker process: host, pid, slots, running, last seen
NS:workers            zset    worker id -> last seen
NS:able               zset    what a live process can run -> when it last could (`ledger/able.py`)
NS:succeeded          zset    quota -> its last successful call in any process
NS:control:DB         channel batch ids whose state was changed by a person
NS:cache:{NAME}       hash    a provider-side context cache shared by the fleet
NS:cache:{NAME}:lock  string  who creates or renews it at the moment
NS:app / celery keys          Celery's own, prefixed with NS through `global_keyprefix`
"""

from __future__ import annotations

from dataclasses import dataclass

_MORE = ("stopped", "calls", "blob", "uses", "refs", "ids", "places", "tasks", "owed")


@dataclass(frozen=True, slots=True)
class BatchKeys:
    """Keys of one batch, in the order in which scripts take them."""

    meta: str
    item: str
    fp: str
    ready: str
    held: str
    procs: str
    attempts: str
    done: str
    failed: str
    out: str
    stopped: str
    calls: str
    blob: str
    uses: str
    refs: str
    ids: str
    places: str
    tasks: str
    owed: str


@dataclass(frozen=True, slots=True)
class QuotaKeys:
    """Keys of one quota, in the order in which scripts take them."""

    state: str
    procs: str
    waiting: str
    channel: str


@dataclass(frozen=True, slots=True)
class Keys:
    """Names all keys of one namespace (one fleet), and its channels in one database."""

    namespace: str = "batchllm"
    database: int = 0

    def batch(self, batch_id: str) -> BatchKeys:
        tag = f"{self.namespace}:{{batch:{batch_id}}}"
        names = (
            "meta",
            "item",
            "fp",
            "ready",
            "held",
            "procs",
            "attempts",
            "done",
            "failed",
            "out",
        )
        return BatchKeys(*(f"{tag}:{name}" for name in (*names, *_MORE)))

    def done(self, batch_id: str) -> str:
        """The channel of a standing batch."""
        return f"{self.namespace}:{{batch:{batch_id}}}:done"

    def sealed(self, token: str) -> str:
        return f"{self.namespace}:sealed:{token}"

    def quota(self, name: str) -> QuotaKeys:
        tag = f"{self.namespace}:{{quota:{name}}}"
        return QuotaKeys(tag, f"{tag}:procs", f"{tag}:wait", f"{tag}:ch:{self.database}")

    def queue(self, name: str) -> str:
        return f"{self.namespace}:queue:{{{name}}}"

    def worker(self, worker_id: str) -> str:
        return f"{self.namespace}:worker:{worker_id}"

    def cache(self, name: str) -> str:
        return f"{self.namespace}:cache:{{{name}}}"

    def cache_lock(self, name: str) -> str:
        return f"{self.cache(name)}:lock"

    @property
    def batches(self) -> str:
        return f"{self.namespace}:batches"

    @property
    def quotas(self) -> str:
        return f"{self.namespace}:quotas"

    @property
    def workers(self) -> str:
        return f"{self.namespace}:workers"

    @property
    def able(self) -> str:
        return f"{self.namespace}:able"

    @property
    def succeeded(self) -> str:
        return f"{self.namespace}:succeeded"

    @property
    def control(self) -> str:
        return f"{self.namespace}:control:{self.database}"
