"""Which messages a worker takes, and which waiting item goes next: without Celery and Redis."""

from __future__ import annotations

import asyncio

from batchllm_celery.models import StrategySpec
from batchllm_celery.worker.admission import Admission
from batchllm_celery.worker.slots import Slots
from batchllm_celery.worker.unrunnable import LAST_TRIES, Faults


async def test_urgent_items_take_the_next_free_slot() -> None:
    """The highest priority goes first, and first come first served within one."""
    slots, order = Slots(1), []

    async def use(name: str, priority: int) -> None:
        await slots.take(priority)
        order.append(name)
        await asyncio.sleep(0)
        slots.give()

    await slots.take()
    waiting = [
        asyncio.create_task(use(name, priority))
        for name, priority in (("usual", 0), ("later", 0), ("urgent", 9))
    ]
    await asyncio.sleep(0)
    slots.give()
    await asyncio.gather(*waiting)
    assert order == ["urgent", "usual", "later"]


async def test_about_four_items_a_slot_are_admitted() -> None:
    """A process takes messages until four times its slots are admitted, not more; before it has
    seen one it takes each to be large."""
    admission = Admission(50, Faults())
    room = admission.room_for_messages
    assert [room(n) for n in (0, 1, 2)] == [2, 1, 0]  # of a hundred items each
    message = await admission.enter(50)
    # One is known; those that are on their way are of fifty, too.
    assert [room(n) for n in (1, 3, 4)] == [3, 1, 0]
    message.end()
    assert room(3) == 1
    admission.close()
    assert room(0) == 0


async def test_a_message_waits_until_a_neighbours_items_end() -> None:
    """Not until the whole message before it has ended: one slow item holds nobody up."""
    admission = Admission(1, Faults())
    rooms: list[int] = []
    first = await admission.enter(4)
    second = asyncio.create_task(admission.enter(4))
    await asyncio.sleep(0)
    assert not second.done()
    admission.on_room = lambda: rooms.append(admission.room_for_messages(1))
    first.leave_one(None)
    message = await asyncio.wait_for(second, 5)
    assert rooms == [1]
    first.end()
    message.end()
    assert admission.room_for_messages(0) == 1


async def test_items_that_left_are_not_counted_off_twice() -> None:
    """After an error some of a message's items end when all of them have left."""
    admission = Admission(25, Faults())
    message = await admission.enter(100)
    message.end()
    message.leave_one(None)
    other = await admission.enter(100)
    assert admission.room_for_messages(1) == 0
    other.end()


async def test_a_message_that_waits_for_room_sees_the_drain() -> None:
    """It must not wait for calls that may take minutes."""
    admission = Admission(1, Faults())
    first = await admission.enter(4)
    second = asyncio.create_task(admission.enter(4))
    await asyncio.sleep(0)
    admission.close()
    (await asyncio.wait_for(second, 5)).end()
    first.end()


async def test_a_process_that_runs_nothing_takes_one_message_at_most() -> None:
    """After ten items in a row that it could not run; and none until the next try is due."""
    now = 0.0
    faults = Faults(lambda: now)
    admission = Admission(50, faults)
    for index in range(LAST_TRIES):
        faults.add(StrategySpec(name="absent"), f"missing {index}", "b", called=False)
    assert admission.room_for_messages(0) == 0
    now = 100.0
    assert [admission.room_for_messages(n) for n in (0, 1)] == [1, 0]
