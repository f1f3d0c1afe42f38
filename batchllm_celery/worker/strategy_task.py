"""A strategy as a Celery task: `summarise.delay("text")`, chains, groups, chords, beat.

The prompt goes to the ledger, when the task is sent; the message names a standing batch and an
index there. So the broker and Flower never see it, a lost message is sent again, and the item has
exactly one outcome whatever becomes of messages.

    apply_async -> item in the ledger -> message -> claim, limiter, call, outcome in the ledger
                                                       -> Celery stores the result, calls callbacks
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from celery import Celery, Task, states
from celery.app.trace import trace_ok_t
from celery.exceptions import Ignore
from celery.utils.time import maybe_iso8601
from kombu.utils import json
from kombu.utils.uuid import uuid

from batchllm_celery import event_loop
from batchllm_celery.errors import ItemFailedError, UsageError, describe
from batchllm_celery.ledger import Payload
from batchllm_celery.ledger.standing import ItemPlace
from batchllm_celery.models import BatchSpec, StrategySpec
from batchllm_celery.queue import DEFAULT_QUEUE, ITEMS_HEADER, STRATEGY_PREFIX, show_items
from batchllm_celery.strategies.registered import named

if TYPE_CHECKING:
    from batchllm_celery.services import Services
    from batchllm_celery.strategies.registry import Registration

logger = logging.getLogger("batchllm_celery")

#: Stands in a message for the arguments of a strategy's task that waits in it; see `seal`.
SEALED = "batchllm_sealed"
#: Options that a message sent again needs, besides those of the first one's route.
_KEPT = (
    *("link", "link_error", "chain", "chord", "group_id", "group_index", "root_id", "parent_id"),
    *("reply_to", "ignore_result", "queue", "priority", "shadow", "replaced_task_nesting"),
)
_WORDS_OF_BACKENDS = frozenset(
    {
        "mark_as_done",
        "mark_as_failure",
        "mark_as_retry",
        "mark_as_revoked",
        "mark_as_started",
        "on_chord_part_return",
        "store_result",
    }
)


if TYPE_CHECKING:
    _Task = Task[Any, Any]
else:
    _Task = Task


class Host(Protocol):
    """The process that a task is in: what `worker.tasks` gives to it."""

    def sender(self) -> Services:
        """The services that items are sent with, on the loop; opened at first use."""

    async def run_single(
        self, task_id: str, hostname: str | None, batch_id: str, index: int
    ) -> tuple[Any, str]:
        """Run one item; its output, and what Flower shows."""

    def told(self, batch_id: str, index: int) -> None:
        """Celery has stored the item's outcome. Any thread."""

    def cancel(self, place: ItemPlace) -> None:
        """End an item that was revoked, in the background. Any thread."""

    def lane(self, queue: str | None) -> str:
        """The queue of the fleet for a queue of the app."""


class Expired(Exception):
    """The item's time was over before it was run."""


class StrategyTask(_Task):
    """The task of one registered strategy; its arguments are the prompt and the parameters."""

    abstract = True
    acks_late = True
    reject_on_worker_lost = True
    resultrepr_maxsize = 0  # the log shows no answer; Flower shows what `__trace__` says
    typing = False  # the factory's signature is checked, with what to do
    throws = (ItemFailedError,)

    registration: Registration
    host: Host

    # -- sending

    def apply_async(
        self,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> Any:
        """Store the item, and send the message that names it. As Celery's, but for these:

        Args:
            args: the prompt, then the strategy's parameters.
            kwargs: `prompt`, where it is not the first of `args`; the strategy's parameters.
            task_id: the same id within an hour is the same item.
            producer: Celery's.
            link: called with the output.
            link_error: called on a failure.
            shadow: the name that Flower shows.
            options: `queue`; `priority`: 0 (usual) to 9 (urgent); `expires`: then no call starts
                any more; `countdown`, `eta`; all others of Celery's.

        Raises:
            UsageError: the prompt is no text, the parameters are none of the strategy's, or a
                sealed prompt has expired.
            LedgerFullError: Redis holds as many bytes of waiting prompts as it may.
        """
        app = self.app
        if app.conf.task_always_eager:
            return super().apply_async(
                args, kwargs, task_id, producer, link, link_error, shadow, **options
            )
        task_id = task_id or uuid()
        prompt, params = self.arguments(*self._unsealed(tuple(args or ()), dict(kwargs or {})))
        priority = _priority(options.pop("priority", None))
        options |= self._family(options)
        now = time.time()
        queue = self._queue(options)
        if queue is not None:
            options["queue"] = queue
        delay = max(0.0, _moment(options.get("countdown"), options.get("eta"), now) - now)
        expires = options.pop("expires", None)
        template = BatchSpec(
            batch_id="standing",
            strategy=StrategySpec(name=self.registration.name, params=params),
            queue=self.host.lane(queue),
            priority=priority,
        )
        payload = Payload(
            item_id=task_id,
            prompt=prompt,
            expires_at=None if expires is None else _moment(expires, expires, now),
        )
        # Celery on Redis serves 0 first; ours is 0 for usual, 9 for urgent.
        options["priority"] = 9 - priority
        kept = {**options, "link": link, "link_error": link_error, "shadow": shadow}
        kept = {key: kept[key] for key in _KEPT if kept.get(key) is not None}
        task = json.dumps({"name": self.name, "id": task_id, "options": kept}).encode()

        async def store() -> ItemPlace:
            standing = self.host.sender().ledger.standing
            return await standing.append(template, payload, item_id=task_id, task=task, delay=delay)

        place = event_loop.run(store())
        try:
            return super().apply_async(
                (place.batch_id, [place.index]),
                {},
                task_id,
                producer,
                link,
                link_error,
                shadow,
                **options,
                **message_of(place),
            )
        except BaseException:
            # The caller knows of no task: nothing must be paid for it.
            event_loop.run(self.host.sender().ledger.standing.cancel(place.batch_id, place.index))
            raise

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """The prompt and the parameters that a call means.

        Raises:
            UsageError: with what to do.
        """
        name = self.registration.name
        if args:
            prompt, *args_left = args
        elif "prompt" in kwargs:
            prompt, args_left = kwargs.pop("prompt"), []
        else:
            raise UsageError(f"strategy {name!r}: its task takes a prompt: {name}.delay('text')")
        if not isinstance(prompt, str):
            raise UsageError(
                f"strategy {name!r}: its prompt must be text, not {type(prompt).__name__}; a task "
                f"before it in a chain returns it, and several texts are {name}.submit(texts)"
            )
        return prompt, named(name, self.registration.factory, tuple(args_left), kwargs)

    def chunks(self, *_: Any, **__: Any) -> Any:
        """Not for strategies: the prompts would travel in one message.

        Raises:
            UsageError: with what to write instead.
        """
        raise UsageError(
            f"a strategy has no chunks, map or starmap: {self.registration.name}.submit(texts) is "
            f"a batch, and group({self.registration.name}.s(text) for text in texts) are its tasks"
        )

    map = starmap = chunks

    def _family(self, options: dict[str, Any]) -> dict[str, Any]:
        """Root and parent, as Celery finds them: a message sent again has no parent that runs."""
        parent = self.app.current_worker_task
        if parent is None:
            return {}
        request = parent.request
        return {
            "root_id": options.get("root_id") or request.root_id or request.id,
            "parent_id": options.get("parent_id") or request.id,
        }

    def _queue(self, options: dict[str, Any]) -> str | None:
        """The name of the queue that the app's routes choose; None: its default one."""
        router: Any = self.app.amqp.router
        routed = router.route(dict(options), self.name, (), {}, self).get("queue")
        name: str | None = getattr(routed, "name", routed)
        return None if name == self.app.conf.task_default_queue else name

    def _unsealed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with those that waited in the ledger put back in their place."""
        found: list[Any] = []
        for value in args:
            if isinstance(value, dict) and set(value) == {SEALED}:
                more, named_ones = event_loop.run(unseal(self.host.sender(), value[SEALED]))
                found += more
                kwargs = {**named_ones, **kwargs}
            else:
                found.append(value)
        return tuple(found), kwargs

    # -- running

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the item that a message names; called directly or eagerly, the prompt itself."""
        request = self.request
        if request.called_directly or request.is_eager:
            from batchllm_celery.execution.alone import run_alone

            prompt, params = self.arguments(*self._unsealed(args, kwargs))
            strategy = self.registration.build(
                StrategySpec(name=self.registration.name, params=params)
            )
            result = event_loop.run(run_alone(strategy, prompt, item_id=request.id or "item"))
            if not result.success:
                raise ItemFailedError(str(result.error_kind), result.error or "", result.item_id)
            return result.output
        place = reference(args, kwargs)
        if place is None:
            raise UsageError(
                f"a message for {self.name} must come from a process that has the strategy "
                f"registered ({self.registration.name}.delay, .s, apply_async): this one carries "
                f"its arguments in clear"
            )
        try:
            output, shown = event_loop.run(
                self.host.run_single(str(request.id), request.hostname, place.batch_id, place.index)
            )
        except Expired:
            self.backend.mark_as_revoked(request.id, "expired", request=request, store_result=True)
            self.host.told(place.batch_id, place.index)
            raise Ignore from None
        self._shown[str(request.id)] = shown
        return output

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        """Note that Celery has stored the outcome and sent what follows."""
        place = reference(tuple(args), kwargs)
        if place is not None and status in (states.SUCCESS, states.FAILURE):
            self.host.told(place.batch_id, place.index)

    @property
    def _shown(self) -> dict[str, str]:
        shown: dict[str, str] = self.__dict__.setdefault("_shown_texts", {})
        return shown

    # Celery's workers set `__trace__`, and put the answer's `repr` into Flower and the log.
    @property
    def __trace__(self) -> Any:
        return self.__dict__.get("_trace")

    @__trace__.setter
    def __trace__(self, trace: Callable[..., Any] | None) -> None:
        if trace is None:
            self.__dict__["_trace"] = None
            return

        def traced(task_id: str, *args: Any, **kwargs: Any) -> Any:
            result, info, runtime, _ = trace(task_id, *args, **kwargs)
            return trace_ok_t(result, info, runtime, self._shown.pop(task_id, ""))

        self.__dict__["_trace"] = traced

    @property
    def backend(self) -> Any:
        """The app's result backend; under our pool it does not block the loop."""
        found = super().backend
        return _OffLoop(found) if event_loop.is_here() else found

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value


class _OffLoop:
    """A result backend whose writes happen in a thread, while the loop serves other tasks."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in _WORDS_OF_BACKENDS:
            return found

        def write(*args: Any, **kwargs: Any) -> Any:
            return event_loop.run(asyncio.to_thread(found, *args, **kwargs))

        return write


def make_task(app: Celery, registration: Registration, host: Host) -> StrategyTask:
    """Register the task of a strategy with an app."""
    name = f"{STRATEGY_PREFIX}{registration.name}"
    app.tasks.pop(name, None)  # its module was imported again
    members = {
        "name": name,
        "registration": registration,
        "host": host,
        "__doc__": registration.factory.__doc__,
        "__module__": registration.factory.__module__,
    }
    task: StrategyTask = type(registration.name, (StrategyTask,), members)()
    return app.register_task(task)


def message_of(place: ItemPlace) -> dict[str, Any]:
    """What our messages of one item have beside Celery's own options."""
    return {
        "headers": {ITEMS_HEADER: 1},
        "argsrepr": show_items(place.batch_id, [place.index]),
        "kwargsrepr": "",
    }


def reference(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ItemPlace | None:
    """The item that a message names; None where it names none."""
    match args:
        case (str(batch_id), [int(index)]) if not kwargs:
            return ItemPlace(batch_id, index)
    return None


def send_again(app: Celery, place: ItemPlace, task: bytes) -> None:
    """Send the message of a Celery task again: its item is done, and nobody has told it."""
    told = json.loads(task)
    app.send_task(
        told["name"],
        args=(place.batch_id, [place.index]),
        task_id=told["id"],
        **told["options"],
        **message_of(place),
    )


# -- signatures that wait in other tasks' messages


async def _store(services: Services, arguments: Any) -> str:
    token = uuid()
    client: Any = services.connection.client
    key, ttl = services.keys.sealed(token), services.settings.result_ttl_seconds
    data = json.dumps(arguments)
    await services.connection.patiently(lambda: client.set(key, data, ex=ttl))
    return token


async def unseal(services: Services, token: str) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a signature that waited in a message.

    Raises:
        UsageError: they are kept no longer.
    """
    client: Any = services.connection.client
    key = services.keys.sealed(token)
    data = await services.connection.patiently(lambda: client.get(key))
    if data is None:
        raise UsageError("the arguments of this signature have expired, or could not be stored")
    args, kwargs = json.loads(data)
    return args, kwargs


def seal(
    value: Any, services_of: Callable[[Mapping[str, Any]], Services | None], depth: int = 0
) -> Any:
    """A copy of what a message embeds, in which no strategy's signature has its arguments in clear.

    Args:
        value: callbacks, a chain, a chord's body, or any part of them.
        services_of: of a signature: None for one that is no strategy's.
        depth: of `value` in the message.
    """
    if depth > 40:
        return value
    if isinstance(value, list | tuple):
        return [seal(one, services_of, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    name = value.get("task")
    services = services_of(value) if isinstance(name, str) else None
    if services is None or "args" not in value:
        return {key: seal(one, services_of, depth + 1) for key, one in value.items()}
    sealed = dict(value)
    for key in ("options", "chord_size"):
        if key in sealed:
            sealed[key] = seal(sealed[key], services_of, depth + 1)
    if _is_clear(value):
        sealed["args"], sealed["kwargs"] = [{SEALED: _sealed(services, value)}], {}
    return sealed


def _is_clear(signature: Mapping[str, Any]) -> bool:
    args = signature.get("args") or ()
    sealed = all(isinstance(one, dict) and set(one) == {SEALED} for one in args)
    return bool(not sealed or signature.get("kwargs"))


def _sealed(services: Services, signature: Mapping[str, Any]) -> str:
    arguments = [list(signature.get("args") or ()), dict(signature.get("kwargs") or {})]
    try:
        return event_loop.run(_store(services, arguments))
    except Exception as error:  # its task fails and says so; the prompt does not travel
        logger.error("task.not_sealed task=%s error=%s", signature["task"], describe(error))
        return ""


def _priority(value: Any) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or not 0 <= value <= 9:
        raise UsageError(f"priority must be 0 (usual) to 9 (urgent), not {value!r}")
    return value


def _moment(seconds: Any, moment: Any, now: float) -> float:
    """Unix time of so many seconds from now, or of a datetime or ISO text."""
    if isinstance(seconds, int | float) and math.isfinite(seconds):
        return now + seconds
    if isinstance(moment, str):
        moment = maybe_iso8601(moment)
    if isinstance(moment, datetime.datetime):
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        return float(moment.timestamp())
    return now


def lane_of(app: Celery, queue: str | None) -> str:
    """The queue of the fleet that an app's queue is."""
    return DEFAULT_QUEUE if queue in (None, app.conf.task_default_queue) else str(queue)
