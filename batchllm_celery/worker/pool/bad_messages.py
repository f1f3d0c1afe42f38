"""Messages that nobody can run: dropped, counted, logged, and acknowledged so that none comes back.

Whoever may write to the broker can put anything into its queues. Celery takes what it reads for
well formed: an odd message ends the worker, comes back, and ends the next one. So each message is
checked before Celery's own code sees it, whichever transport brought it.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any

from celery import signals
from celery.worker import state as worker_state
from kombu import Message
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from redis.exceptions import DataError

from batchllm_celery.queue import RUN_ITEMS

logger = logging.getLogger("batchllm_celery")

#: Items that one of our messages names at most, and the bytes that its body needs for them.
MOST_ITEMS = 1000
MOST_BYTES = 100_000
#: One more than the largest index: a Redis bitmap has no more bits.
INDEX_END = 2**32
#: A flood of bad messages must not become a flood of log lines; each line tells the sum.
LOG_SECONDS = 1.0
#: Celery logs the headers of a message whose task it does not know; larger ones are dropped.
MOST_HEADER_CHARACTERS = 4000

#: What reading an odd message raises: no JSON, no UTF-8, too deep, a number too long, no text.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, DataError)


class BadMessageError(ValueError):
    """Why a message can't be run, in words that quote nothing of it."""


class DroppedMessages:
    """How many messages this process has dropped, and the log lines that say so."""

    def __init__(self) -> None:
        self.count = 0
        self._logged_at = float("-inf")

    def add(self, reason: str) -> None:
        """Count one. At most one line a second is logged.

        Args:
            reason: without any of the message's content.
        """
        self.count += 1
        now = time.monotonic()
        if now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            logger.warning("broker.message_dropped total=%d reason=%s", self.count, reason[:200])


dropped = DroppedMessages()


def where(error: BaseException) -> str:
    """An error that nobody foresaw, without its text: that may quote the message."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {at.name} ({at.filename[-80:]}:{at.lineno})"


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("is not printable")
    return text


_Name = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_printable)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class _Headers(BaseModel):
    """The headers that Celery's worker reads, as Celery's own clients write them."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    id: _Name
    task: _Name
    shadow: str | None = None
    eta: str | None = None
    expires: str | Annotated[float, Field(allow_inf_nan=False)] | None = None
    retries: Annotated[int, Field(ge=0, le=10**9)] | None = None
    timelimit: Annotated[list[_Seconds], Field(min_length=2, max_length=2)] | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    origin: str | None = None
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None


class _Ours(_Headers):
    items: Annotated[int, Field(ge=1, le=MOST_ITEMS)] | None = None  # queue.ITEMS_HEADER
    argsrepr: Annotated[str, Field(max_length=1000)] | None = None
    kwargsrepr: Annotated[str, Field(max_length=1000)] | None = None
    shadow: Annotated[str, Field(max_length=255)] | None = None  # the strategy's name
    eta: None = None


class _Properties(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    priority: Annotated[int, Field(ge=0, le=255)] | None = None
    reply_to: str | None = None
    correlation_id: str | None = None


_Index = Annotated[int, Field(ge=0, lt=INDEX_END)]


class _Arguments(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    args: tuple[
        Annotated[str, Field(min_length=1, max_length=100)],
        Annotated[list[_Index], Field(min_length=1, max_length=MOST_ITEMS)],
    ]


def check(message: Message) -> None:
    """Whether Celery can take the message, and, if it is for our task, whether that can run. A time
    limit of Celery's in a message for our task is taken out of it.

    Raises:
        BadMessageError: it can't.
    """
    headers: Any = message.headers
    if not isinstance(headers, dict):
        raise BadMessageError("its headers are no object")
    _validate(_Properties, message.properties, "properties")
    if "task" not in headers:  # the protocol of Celery 3: only other apps' tasks use it
        payload = _payload(message)
        if not isinstance(payload, dict) or payload.get("task") in (None, RUN_ITEMS):
            raise BadMessageError("it has no header `task`")
        return
    if headers["task"] != RUN_ITEMS:
        _validate(_Headers, headers, "headers")
        return
    _validate(_Ours, headers, "headers")
    if len(message.body or b"") > MOST_BYTES:
        raise BadMessageError(f"its body has more than {MOST_BYTES} bytes")
    match _payload(message):
        case [list() | tuple() as args, dict() as kwargs, dict() as embedded]:
            if kwargs or any(embedded.values()):
                raise BadMessageError("it has more than the two arguments of our task")
            _validate(_Arguments, {"args": tuple(args)}, "body")
            # A limit in the message would beat our task's: it would cut off calls that are paid
            # for, message after message. What bounds a call is its attempt's time limit.
            headers["timelimit"] = [None, None]
        case _:
            raise BadMessageError("its body is not that of a task")


def _payload(message: Message) -> Any:
    try:
        return message.payload
    except Exception as error:  # its content type chooses the decoder
        raise BadMessageError(f"its body can't be decoded: {type(error).__name__}") from None


def _validate(model: type[BaseModel], values: Any, part: str) -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(str(name)[:40] for name in (part, *first["loc"]))
        raise BadMessageError(f"{field}: {first['type']}") from None


def guarded(consumer: type[Any], *, only_ours: Callable[[], bool]) -> type[Any]:
    """A Celery consumer class whose process no message can end.

    Args:
        consumer: the class that the worker would use.
        only_ours: whether the app has no tasks but ours. Celery's own answer to an unknown task
            (its failure goes to the result backend) then serves nobody.
    """

    class Guarded(consumer):
        loop: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            run_loop: Any = self.loop
            self._run_loop, self.loop = run_loop, self._guard_loop

        def _guard_loop(self, *args: Any) -> Any:
            """kombu's own transports raise what they could not parse, at which Celery ends. A new
            connection begins behind that message."""
            try:
                return self._run_loop(*args)
            except UNREADABLE as error:
                dropped.add(f"the transport could not read it: {where(error)}")
                raise ConnectionError("a message that the transport could not read") from None

        def create_task_handler(self, *args: Any, **options: Any) -> Any:
            handle = super().create_task_handler(*args, **options)

            def on_message(message: Message) -> None:
                try:
                    check(message)
                    handle(message)
                except BadMessageError as error:
                    self._drop(message, str(error))
                except self.connection_errors:
                    raise
                except Exception as error:
                    headers: Any = message.headers
                    worker_state.requests.pop(headers.get("id"), None)
                    self._drop(message, where(error))

            return on_message

        def _drop(self, message: Message, reason: str) -> None:
            dropped.add(reason)
            if not message.acknowledged:
                message.ack_log_error(logger, self.connection_errors)

        def on_decode_error(self, message: Message, exc: Exception) -> None:
            self._drop(message, f"its body can't be decoded: {type(exc).__name__}")

        def on_unknown_message(self, body: Any, message: Message) -> None:
            self._drop(message, "it is not that of a task")
            signals.task_rejected.send(sender=self, message=message, exc=None)

        def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
            self._drop(message, f"Celery refuses it: {type(exc).__name__}")
            signals.task_rejected.send(sender=self, message=message, exc=exc)

        def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
            if only_ours() or len(repr(message.headers)) > MOST_HEADER_CHARACTERS:
                self._drop(message, "its task is not registered here")
            else:
                super().on_unknown_task(body, message, exc)

    return Guarded
