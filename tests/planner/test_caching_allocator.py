"""The model of PyTorch's caching allocator: segments, splitting, merging, and an emptied cache."""

from dreambooth.planner.caching_allocator import MIB, CachingAllocator


def test_small_blocks_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.malloc(500 * 1024)
    assert (allocator.allocated, allocator.reserved) == (4 * 500 * 1024, 2 * MIB)


def test_a_released_block_merges_with_its_neighbours_and_is_reused() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(6 * MIB), allocator.malloc(6 * MIB)
    allocator.release(first)
    allocator.release(second)
    allocator.malloc(20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_large_segments_are_multiples_of_two_mebibytes_and_are_freed_by_empty_cache() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(11 * MIB)
    assert allocator.reserved == 12 * MIB
    allocator.release(block)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_expandable_segments_reduce_fragmentation() -> None:
    def reserved(expandable: bool) -> int:
        allocator = CachingAllocator(expandable)
        for size in (30, 45, 60, 80):
            allocator.release(allocator.malloc(size * MIB))
        return allocator.reserved

    assert reserved(True) < reserved(False)


def test_empty_cache_returns_the_free_pages_of_an_expandable_segment() -> None:
    allocator = CachingAllocator(expandable=True)
    used, released = allocator.malloc(20 * MIB), allocator.malloc(100 * MIB)
    allocator.release(released)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.release(used)
