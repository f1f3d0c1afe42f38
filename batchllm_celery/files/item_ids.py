"""A set of item ids, in bounded memory."""

from __future__ import annotations

from array import array

_MASK = 2**64 - 1
_EMPTY = 0


class SeenIds:
    """A set of ids that keeps a 64-bit hash of each in an open-addressing table.

    An id takes 16 to 32 bytes, an id that is the row's index one bit. Ten million ids take at most
    270 MB; a set of strings takes 1.3 GB. The probability that two of ten million ids have the same
    hash is 3e-6.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0
        self._indexes = bytearray()

    def add_index(self, index: int) -> bool:
        """Add `str(index)`. Returns False if it is in the set. Indexes must rise."""
        if self._find(str(index))[1]:
            return False
        missing = index // 8 + 1 - len(self._indexes)
        if missing > 0:
            self._indexes.extend(bytes(missing))
        self._indexes[index // 8] |= 1 << index % 8
        return True

    def add(self, item_id: str) -> bool:
        """Add `item_id`. Returns False if it is in the set."""
        if self._is_index(item_id):
            return False
        slot, found = self._find(item_id)
        if found:
            return False
        self._slots[slot] = _fingerprint(item_id)
        self._count += 1
        if self._count * 2 > len(self._slots):
            self._grow()
        return True

    def _is_index(self, item_id: str) -> bool:
        if not (item_id.isascii() and item_id.isdigit()) or len(item_id) > 18:
            return False
        index = int(item_id)
        if str(index) != item_id or index // 8 >= len(self._indexes):
            return False
        return bool(self._indexes[index // 8] >> index % 8 & 1)

    def _find(self, item_id: str) -> tuple[int, bool]:
        wanted = _fingerprint(item_id)
        slot = _free_or_equal(self._slots, wanted)
        return slot, self._slots[slot] == wanted

    def _grow(self) -> None:
        larger = array("Q", bytes(16 * len(self._slots)))
        for fingerprint in self._slots:
            if fingerprint != _EMPTY:
                larger[_free_or_equal(larger, fingerprint)] = fingerprint
        self._slots = larger


def _fingerprint(item_id: str) -> int:
    # Python's own keyed string hash is 64 bits wide; 0 marks a free slot.
    return hash(item_id) & _MASK or 1


def _free_or_equal(slots: array[int], fingerprint: int) -> int:
    last = len(slots) - 1
    slot = fingerprint & last
    while slots[slot] not in (_EMPTY, fingerprint):
        slot = (slot + 1) & last
    return slot
