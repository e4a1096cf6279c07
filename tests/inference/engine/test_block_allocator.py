"""Pages under random use: no page has two owners, none is lost, and a page that is found holds the right tokens."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.inference.engine.block_allocator import BlockAllocator, page_hashes

SIZE = 4


def test_keys_tell_pages_apart_by_all_that_came_before():
    a, b = list(range(12)), [9, *range(1, 12)]
    assert len(list(page_hashes(a[:11], SIZE))) == 2
    keys = list(page_hashes(a, SIZE))
    assert keys[:2] == list(page_hashes(a[:9], SIZE))
    assert not set(keys) & set(page_hashes(b, SIZE))
    assert keys[2:] == list(page_hashes(a[8:], SIZE, keys[1]))


@pytest.mark.parametrize("seed", range(5))
def test_random_use(seed):
    rng = np.random.default_rng(seed)
    allocator, held, holds, found_some, evicted = BlockAllocator(12), [], {}, 0, 0
    for _ in range(400):
        if held and rng.random() < 0.5:
            allocator.release(held.pop(rng.integers(len(held)))[1])
        else:
            keys = list(page_hashes(rng.integers(0, 2, rng.integers(4, 21)).tolist(), SIZE))
            found = allocator.acquire_prefix(keys)
            assert [holds[page] for page in found] == keys[: len(found)]
            found_some += bool(found)
            before = allocator.available
            own = allocator.allocate(len(keys) - len(found))
            assert (own is None) == (len(keys) - len(found) > before)
            if own is None:
                allocator.release(found)
                continue
            others = {page for _, pages in held for page in pages} | set(found)
            assert not others & set(own) and len(set(own)) == len(own) and 0 not in own
            evicted += any(page in holds for page in own)
            for page, key in zip(own, keys[len(found) :], strict=True):
                holds[page] = key
                allocator.register(page, key)
            held.append((keys, found + own))
        assert allocator.used == len({page for _, pages in held for page in pages})
        assert allocator.used + allocator.available == 12
    assert found_some > 20 and evicted > 20


def test_the_page_longest_out_of_use_goes_first_and_the_end_of_a_text_before_its_beginning():
    allocator = BlockAllocator(4)
    texts = [list(page_hashes([i] * 2 * SIZE, SIZE)) for i in range(2)]
    for keys in texts:
        pages = allocator.allocate(2)
        for page, key in zip(pages, keys, strict=True):
            allocator.register(page, key)
        allocator.release(pages)
    taken = allocator.allocate(1)
    assert len(allocator.acquire_prefix(texts[0])) == 1 and len(allocator.acquire_prefix(texts[1])) == 2
    assert allocator.allocate(1) is None and allocator.used == 4
    allocator.release(taken)
    assert allocator.available == 1
