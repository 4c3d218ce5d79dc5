"""A model of PyTorch's caching allocator: what `torch.cuda.max_memory_reserved` would show for a list of events.

Sizes and rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings and one stream: blocks of 512
bytes; a small pool (up to 1 MiB) fed by segments of 2 MiB; a large pool fed by 20 MiB below 10 MiB and by multiples of
2 MiB above; the smallest block that fits; a rest is split off from 512 bytes (small) or above 1 MiB (large). With
`expandable_segments` a pool is one growing range of pages. Not modelled: garbage collection and roundup settings.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import ClassVar

KIB, MIB = 2**10, 2**20


@dataclass(slots=True)
class _Block:
    size: int
    large: bool
    free: bool = True
    previous: int | None = None
    following: int | None = None


class CachingAllocator:
    """Bytes in and out: `allocated` and `reserved`, now."""

    SMALL: ClassVar = MIB
    SEGMENT: ClassVar = (2 * MIB, 20 * MIB)  # of the small and of the large pool

    def __init__(self, expandable: bool = False, max_split: int | None = None) -> None:
        """`max_split`: blocks above it (bytes) are never split and only serve about their own size."""
        self.allocated = 0
        self.reserved = 0
        self._expandable = expandable
        self._max_split = max_split
        self._blocks: dict[int, _Block] = {}
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._last: list[int | None] = [None, None]  # the end of each pool's range, if it can grow
        self._next = 0

    def malloc(self, size: int) -> int:
        """Take a block of at least `size` bytes; returns its name."""
        size = max(512, (size + 511) // 512 * 512)
        large = size > self.SMALL
        name = self._found(size, large)
        if name is None:
            name = self._grown(size, large) if self._expandable else self._segment(size, large)
        block = self._blocks[name]
        self._split(name, block, size)
        block.free = False
        self.allocated += block.size
        return name

    def release(self, name: int) -> None:
        """Give a block back to its pool, joined with free neighbours."""
        block = self._blocks[name]
        self.allocated -= block.size
        block.free = True
        name = self._join(block.previous, name) if self._is_free(block.previous) else name
        block = self._blocks[name]
        if self._is_free(block.following):
            self._join(name, block.following)
        insort(self._free[block.large], (self._blocks[name].size, name))

    def empty_cache(self) -> None:
        """Give whole segments without a used block, or whole free pages, back to the card (torch.cuda.empty_cache)."""
        for large in (False, True):
            for size, name in list(self._free[large]):
                block = self._blocks[name]
                if self._expandable:
                    self._unmap(name, block)
                elif block.previous is None and block.following is None:
                    self._take(name, block)
                    del self._blocks[name]
                    self.reserved -= size

    def _found(self, size: int, large: bool) -> int | None:
        pool = self._free[large]
        place = bisect_left(pool, (size, -1))
        if place == len(pool):
            return None
        found, name = pool[place]
        if self._max_split is not None and large:
            oversize = size >= self._max_split
            if (not oversize and found >= self._max_split) or (oversize and found >= size + 20 * MIB):
                return None
        pool.pop(place)
        return name

    def _segment(self, size: int, large: bool) -> int:
        if not large:
            room = self.SEGMENT[0]
        elif size < 10 * MIB:
            room = self.SEGMENT[1]
        else:
            room = (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        self.reserved += room
        return self._new(_Block(room, large))

    def _grown(self, size: int, large: bool) -> int:
        """Map more pages at the end of the pool's range, after a free rest that may be there."""
        page, last = self.SEGMENT[large], self._last[large]
        rest = self._blocks[last].size if last is not None and self._blocks[last].free else 0
        pages = (size - rest + page - 1) // page * page
        self.reserved += pages
        if last is not None and rest:
            self._take(last, self._blocks[last])
            self._blocks[last].size += pages
            return last
        name = self._new(_Block(pages, large, previous=last))
        if last is not None:
            self._blocks[last].following = name
        self._last[large] = name
        return name

    def _unmap(self, name: int, block: _Block) -> None:
        """Give the whole pages of a free block of a growing range back; what is mapped later comes at its end."""
        pages = block.size // self.SEGMENT[block.large] * self.SEGMENT[block.large]
        if not pages:
            return
        self._take(name, block)
        self.reserved -= pages
        block.size -= pages
        if block.size:
            insort(self._free[block.large], (block.size, name))
            return
        for neighbour, side in ((block.previous, "following"), (block.following, "previous")):
            if neighbour is not None:
                setattr(self._blocks[neighbour], side, None)
        if self._last[block.large] == name:
            self._last[block.large] = block.previous
        del self._blocks[name]

    def _split(self, name: int, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest <= MIB if block.large else rest < 512:
            return
        if self._max_split is not None and block.large and size >= self._max_split:
            return
        new = self._new(_Block(rest, block.large, previous=name, following=block.following))
        if block.following is not None:
            self._blocks[block.following].previous = new
        block.following, block.size = new, size
        if self._last[block.large] == name:
            self._last[block.large] = new
        insort(self._free[block.large], (rest, new))

    def _join(self, first: int | None, second: int | None) -> int:
        """Merge two neighbours into the first; whichever of them is in the pool leaves it."""
        assert first is not None and second is not None
        left, right = self._blocks[first], self._blocks[second]
        for name, block in ((first, left), (second, right)):
            self._take(name, block)
        left.size += right.size
        left.following = right.following
        if right.following is not None:
            self._blocks[right.following].previous = first
        if self._last[left.large] == second:
            self._last[left.large] = first
        del self._blocks[second]
        return first

    def _take(self, name: int, block: _Block) -> None:
        pool = self._free[block.large]
        place = bisect_left(pool, (block.size, name))
        if place < len(pool) and pool[place] == (block.size, name):
            pool.pop(place)

    def _new(self, block: _Block) -> int:
        self._next += 1
        self._blocks[self._next] = block
        return self._next

    def _is_free(self, name: int | None) -> bool:
        return name is not None and self._blocks[name].free
