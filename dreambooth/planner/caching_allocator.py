"""A model of PyTorch's caching CUDA allocator: it computes the reserved memory for a sequence of allocations.

The result corresponds to `torch.cuda.memory_reserved`. Sizes and rules are those of c10/cuda/CUDACachingAllocator.cpp
with its default settings and one stream:

- Block sizes are multiples of 512 bytes.
- The small pool serves blocks up to 1 MiB from segments of 2 MiB. The large pool serves blocks below 10 MiB from
  segments of 20 MiB, and larger blocks from segments of their own, whose size is a multiple of 2 MiB.
- A request takes the smallest free block that is large enough. The remainder is split off if it has at least 512 bytes
  (small pool) or more than 1 MiB (large pool).
- With `expandable_segments` each pool is one growing range of pages.

Garbage collection and roundup settings are not modelled.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import ClassVar

KIB, MIB = 2**10, 2**20


@dataclass(slots=True)
class _Block:
    """A part of a segment of the large pool (if `large`) or of the small pool.

    `previous` and `following` are the numbers of the neighbouring blocks in the segment.
    """

    size: int
    large: bool
    free: bool = True
    previous: int | None = None
    following: int | None = None


class CachingAllocator:
    """Simulates PyTorch's allocator. `allocated` and `reserved` are the allocated and the reserved bytes at present."""

    SMALL: ClassVar = MIB
    SEGMENT: ClassVar = (2 * MIB, 20 * MIB)  # bytes of a segment of the small and of the large pool

    def __init__(self, expandable: bool = False, max_split: int | None = None, full: bool = False) -> None:
        """Create an allocator without segments.

        Args:
            expandable: PyTorch's setting expandable_segments.
            max_split: PyTorch's setting max_split_size_mb, converted to bytes. Blocks of at least this size are never
                split, and serve only requests of about their own size. None: all blocks may be split.
            full: whether the card is full, so that unused segments are given back before each new one.
        """
        self.allocated = 0
        self.reserved = 0
        self._expandable = expandable
        self._max_split = max_split
        self._full = full
        self._blocks: dict[int, _Block] = {}
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._last: list[int | None] = [None, None]  # the last block of each pool's range, with expandable segments
        self._next = 0

    def malloc(self, size: int) -> int:
        """Allocate a block of at least `size` bytes; return its number."""
        size = max(512, (size + 511) // 512 * 512)
        large = size > self.SMALL
        number = self._take_free_block(size, large)
        if number is None:
            if self._full:
                self.empty_cache()
            number = self._extend_range(size, large) if self._expandable else self._new_segment(size, large)
        block = self._blocks[number]
        self._split(number, block, size)
        block.free = False
        self.allocated += block.size
        return number

    def release(self, number: int) -> None:
        """Return a block to its pool, merged with its free neighbours."""
        block = self._blocks[number]
        self.allocated -= block.size
        block.free = True
        number = self._join(block.previous, number) if self._is_free(block.previous) else number
        block = self._blocks[number]
        if self._is_free(block.following):
            self._join(number, block.following)
        insort(self._free[block.large], (self._blocks[number].size, number))

    def empty_cache(self) -> None:
        """Give the card back all unused segments. With expandable_segments, give back all unused whole pages.

        This corresponds to torch.cuda.empty_cache.
        """
        for large in (False, True):
            for size, number in list(self._free[large]):
                block = self._blocks[number]
                if self._expandable:
                    self._unmap(number, block)
                elif block.previous is None and block.following is None:
                    self._remove_from_pool(number, block)
                    del self._blocks[number]
                    self.reserved -= size

    def _take_free_block(self, size: int, large: bool) -> int | None:
        """Remove the smallest suitable free block from its pool, and return the number of the block.

        Return None if no free block is suitable. `large` chooses the pool.
        """
        pool = self._free[large]
        index = bisect_left(pool, (size, -1))
        if index == len(pool):
            return None
        block_size, number = pool[index]
        if self._max_split is not None and large:
            oversize = size >= self._max_split
            if (not oversize and block_size >= self._max_split) or (oversize and block_size >= size + 20 * MIB):
                return None
        pool.pop(index)
        return number

    def _new_segment(self, size: int, large: bool) -> int:
        """Reserve a segment for a block of `size` bytes; return the number of its only block."""
        if not large:
            reserved = self.SEGMENT[0]
        elif size < 10 * MIB:
            reserved = self.SEGMENT[1]
        else:
            reserved = (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        self.reserved += reserved
        return self._new(_Block(reserved, large))

    def _extend_range(self, size: int, large: bool) -> int:
        """Map more pages at the end of the pool's range; return the number of the new block.

        A free block at the end of the range becomes part of the new block.
        """
        page, last = self.SEGMENT[large], self._last[large]
        rest = self._blocks[last].size if last is not None and self._blocks[last].free else 0
        pages = (size - rest + page - 1) // page * page
        self.reserved += pages
        if last is not None and rest:
            self._remove_from_pool(last, self._blocks[last])
            self._blocks[last].size += pages
            return last
        number = self._new(_Block(pages, large, previous=last))
        if last is not None:
            self._blocks[last].following = number
        self._last[large] = number
        return number

    def _unmap(self, number: int, block: _Block) -> None:
        """Give the card back all whole pages that lie in a free block of an expandable range.

        Pages that are mapped later are added at the end of the range.
        """
        pages = block.size // self.SEGMENT[block.large] * self.SEGMENT[block.large]
        if not pages:
            return
        self._remove_from_pool(number, block)
        self.reserved -= pages
        block.size -= pages
        if block.size:
            insort(self._free[block.large], (block.size, number))
            return
        for neighbour, side in ((block.previous, "following"), (block.following, "previous")):
            if neighbour is not None:
                setattr(self._blocks[neighbour], side, None)
        if self._last[block.large] == number:
            self._last[block.large] = block.previous
        del self._blocks[number]

    def _split(self, number: int, block: _Block, size: int) -> None:
        """Cut a block to `size` bytes, and put the remainder into the block's pool.

        Do nothing if the remainder is too small, or if `max_split` forbids the split.
        """
        rest = block.size - size
        if rest <= MIB if block.large else rest < 512:
            return
        if self._max_split is not None and block.large and size >= self._max_split:
            return
        new = self._new(_Block(rest, block.large, previous=number, following=block.following))
        if block.following is not None:
            self._blocks[block.following].previous = new
        block.following, block.size = new, size
        if self._last[block.large] == number:
            self._last[block.large] = new
        insort(self._free[block.large], (rest, new))

    def _join(self, first: int | None, second: int | None) -> int:
        """Remove two neighbouring blocks from their pool, and merge them into the block `first`. Return `first`."""
        assert first is not None and second is not None
        left, right = self._blocks[first], self._blocks[second]
        for number, block in ((first, left), (second, right)):
            self._remove_from_pool(number, block)
        left.size += right.size
        left.following = right.following
        if right.following is not None:
            self._blocks[right.following].previous = first
        if self._last[left.large] == second:
            self._last[left.large] = first
        del self._blocks[second]
        return first

    def _remove_from_pool(self, number: int, block: _Block) -> None:
        """Remove a block from its pool, if the pool contains it."""
        pool = self._free[block.large]
        index = bisect_left(pool, (block.size, number))
        if index < len(pool) and pool[index] == (block.size, number):
            pool.pop(index)

    def _new(self, block: _Block) -> int:
        self._next += 1
        self._blocks[self._next] = block
        return self._next

    def _is_free(self, number: int | None) -> bool:
        return number is not None and self._blocks[number].free
