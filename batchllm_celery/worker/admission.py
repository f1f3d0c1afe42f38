"""How many items a process takes from the broker at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from batchllm_celery.worker.unrunnable import Faults

#: Items admitted for each slot. A slow item must not hold up its neighbours in the message.
ADMITTED_PER_SLOT = 4
#: Items that a message is taken to name until the first one has come. A process that takes more
#: than it can run keeps the rest from its neighbours.
LARGE_MESSAGE = 100


class Admission:
    """Lets messages in while fewer items than four times the slots are admitted.

    Used on the event loop, but for `room_for_messages` and `expect`.

    Args:
        slots: items in flight at most.
        faults: the strategies that this process can't run; it takes few messages meanwhile.
    """

    def __init__(self, slots: int, faults: Faults) -> None:
        self._limit = ADMITTED_PER_SLOT * slots
        self._faults = faults
        self._items = self._messages = 0
        self._message_items = LARGE_MESSAGE
        self._room = asyncio.Event()
        self.closed = False
        self.on_room: Callable[[], None] = lambda: None
        """Called when another message may be taken."""

    def room_for_messages(self, in_hand: int) -> int:
        """How many more messages may be taken; asked by the pool, from its thread.

        Messages that have not been admitted yet count with the size of the last one that was.

        Args:
            in_hand: messages taken from the broker that have not ended.
        """
        if self.closed:
            return 0
        if self._faults.found and (few := self._faults.messages()) is not None:
            return 0 if in_hand else few
        on_the_way = max(0, in_hand - self._messages) * self._message_items
        free = self._limit - self._items - on_the_way
        return max(0, math.ceil(free / self._message_items))

    def expect(self, items: int) -> None:
        """A message of so many items is on its way to this process; safe from any thread."""
        self._message_items = max(1, items)

    async def enter(self, items: int) -> AdmittedMessage:
        """Wait for room, then admit a message of so many items. Call its `end` afterwards."""
        while self._items >= self._limit and not self.closed:
            self._room.clear()
            await self._room.wait()
        self._items += items
        self._messages += 1
        if items != self._message_items:
            self._message_items = max(1, items)
            self.on_room()
        return AdmittedMessage(self, items)

    def close(self) -> None:
        """Take no further message; those that wait for room go on, to see that it is closed."""
        self.closed = True
        self._room.set()


class AdmittedMessage:
    """The items of one message that have not ended."""

    __slots__ = ("_admission", "_items")

    def __init__(self, admission: Admission, items: int) -> None:
        self._admission = admission
        self._items = items

    def leave(self, items: int) -> None:
        """Items have ended, or were not this process's to run: the next message need not wait for
        the slowest of their neighbours."""
        items = min(items, self._items)  # after an error some end when all have left
        if not items:
            return
        admission = self._admission
        was_full = admission._items >= admission._limit
        self._items -= items
        admission._items -= items
        if was_full and admission._items < admission._limit:
            admission._room.set()
            admission.on_room()

    def leave_one(self, _: object) -> None:
        """For `Task.add_done_callback`."""
        self.leave(1)

    def end(self) -> None:
        """The message is done with."""
        admission = self._admission
        admission._messages -= 1
        self.leave(self._items)
        admission._room.set()
        admission.on_room()
