"""One item of a standing batch: its handle, and the options of asking."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Generic

from typing_extensions import TypedDict

from batchllm_celery.ledger import Outcome, Payload
from batchllm_celery.ledger.standing import ItemPlace
from batchllm_celery.models import (
    BatchSpec,
    ProcessorConfig,
    StrategySpec,
    TOutput,
    WorkItemResult,
)
from batchllm_celery.producer.outputs import Outputs
from batchllm_celery.producer.rows import with_params
from batchllm_celery.producer.session import Session
from batchllm_celery.producer.steps import awaitable, blocking

#: Seconds for which an item that nobody waits for any more is told so.
CANCEL_SECONDS = 5.0


class AskOptions(TypedDict, total=False):
    """What `ask` and `enqueue` take besides prompt and strategy.

    Args:
        params: parameters of the strategy's factory.
        item_id: of the result; the same id within an hour is the same item. Default: a new one.
        context: any JSON value; comes back with the result.
        quota: name of the quota to draw on; default: the strategy's own.
        config: attempts and time limits.
        queue: a queue of the fleet.
        priority: 0 (usual) to 9 (urgent).
    """

    params: dict[str, Any] | None
    item_id: str | None
    context: Any
    quota: str | None
    config: ProcessorConfig | None
    queue: str
    priority: int


class Question:
    """One prompt with its options, checked."""

    def __init__(
        self,
        prompt: Any,
        strategy: StrategySpec,
        params: dict[str, Any] | None = None,
        item_id: str | None = None,
        context: Any = None,
        quota: str | None = None,
        config: ProcessorConfig | None = None,
        queue: str = "default",
        priority: int = 0,
    ) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt is text, not {type(prompt).__name__}")
        self.prompt = prompt
        self.item_id = item_id
        self.context = context
        self.template = BatchSpec(
            batch_id="standing",
            strategy=with_params(strategy, params),
            quota=quota,
            config=config or ProcessorConfig(),
            queue=queue,
            priority=priority,
        )

    async def store(self, session: Session) -> ItemPlace:
        """Put it into the ledger."""
        payload = Payload(self.item_id or "item", self.prompt, self.context)
        standing = session.services.ledger.standing
        return await standing.append(self.template, payload, item_id=self.item_id)

    def publish(self, session: Session, place: ItemPlace) -> None:
        """Send its message; blocks."""
        template = self.template
        session.publish(
            place.batch_id,
            [place.index],
            template.queue,
            template.priority,
            strategy=template.strategy.name,
        )

    async def answer(self, session: Session, timeout: float | None) -> Outcome:
        """Store it, send it, and wait for its outcome; an item that nobody waits for is ended."""
        standing = session.services.ledger.standing
        place = await self.store(session)
        waiting = asyncio.ensure_future(standing.wait(place, fresh=self.item_id is None))
        try:
            await asyncio.to_thread(self.publish, session, place)
            async with asyncio.timeout(timeout):
                return await waiting
        except TimeoutError as error:
            await _cancel(session, place)
            raise TimeoutError(f"item {place}: no outcome within {timeout:g} s") from error
        except asyncio.CancelledError:
            await asyncio.shield(_cancel(session, place))
            raise
        finally:
            waiting.cancel()


async def _cancel(session: Session, place: ItemPlace) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CANCEL_SECONDS):
            await session.services.ledger.standing.cancel(place.batch_id, place.index)


class ItemSteps(Generic[TOutput]):
    """What an item's handle does, as coroutines of steps."""

    def __init__(self, session: Session, place: ItemPlace, output_type: Any = Any) -> None:
        self.id = str(place)
        """Finds it again: `producer.item(id)`."""
        self._session = session
        self._place = place
        self._outputs = Outputs(output_type)

    async def _result(self, timeout: float | None = None) -> WorkItemResult[TOutput, Any]:
        """The item's result, when it is there; a failure is a result too.

        Raises:
            TimeoutError: after `timeout` seconds; the item goes on.
            BatchNotFoundError: it is kept no longer (`settings.item_ttl_seconds`).
        """

        async def wait(session: Session) -> Outcome:
            async with asyncio.timeout(timeout):
                return await session.services.ledger.standing.wait(self._place)

        try:
            outcome = await self._session.step(wait)
        except TimeoutError as error:
            raise TimeoutError(f"item {self.id}: no outcome within {timeout:g} s") from error
        return self._outputs.read(outcome.line)

    async def _done(self) -> bool:
        """Whether it has its outcome.

        Raises:
            BatchNotFoundError: it is kept no longer.
        """
        place = self._place
        found = await self._session.step(
            lambda session: session.services.ledger.standing.look(place.batch_id, [place.index])
        )
        return found[0].outcome is not None

    async def _cancel(self) -> bool:
        """End it as `cancelled`, unless a worker runs it; whether it has ended now."""
        place = self._place
        reply = await self._session.step(
            lambda session: session.services.ledger.standing.cancel(place.batch_id, place.index)
        )
        return bool(reply)


class Item(ItemSteps[TOutput]):
    """One item that was enqueued. Get one from `Producer.enqueue` or `Producer.item`."""

    result = blocking(ItemSteps[TOutput]._result)
    done = blocking(ItemSteps._done)
    cancel = blocking(ItemSteps._cancel)


class AsyncItem(ItemSteps[TOutput]):
    """The same for event loops, from an `AsyncProducer`."""

    result = awaitable(ItemSteps[TOutput]._result)
    done = awaitable(ItemSteps._done)
    cancel = awaitable(ItemSteps._cancel)
