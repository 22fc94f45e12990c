"""A guest modelled by pageblocks, under any order of growing, shrinking and clearing its holdings, and of waiting.

1. Each page of the zones is free or held by one holding, by the sums of both.
2. The host holds what is in use at least, and the zones at most.
3. shrink() frees what it was asked for, or all there is, and less than the largest piece more.
4. At the end, with everything given up and the reporting done, all is free and the zones are in order.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from guest_images.block_model import BlockGuest
from guest_images.free_lists import PAGE_SIZE, PAGEBLOCK_PAGES
from guest_images.page_reporting import Parameters
from guest_images.workloads import HUGE, SMALL, hold

MIB = 1 << 20
SIZE = 64 * MIB
ZONES = SIZE - 4 * MIB

ACTS = st.tuples(
    st.sampled_from(["grow", "small", "mixed", "shrink", "clear", "adopt", "wait"]),
    st.integers(0, 1),
    st.integers(1, 20 * MIB // PAGE_SIZE),
)


@settings(max_examples=60)
@given(st.lists(ACTS, max_size=30), st.integers(0, 100), st.sampled_from([9, 10]))
def test_a_life(acts: list[tuple[str, int, int]], seed: int, order: int) -> None:
    guest = BlockGuest(SIZE, Parameters(order=order, capacity=1), seed=seed)
    holdings = [hold(guest), hold(guest)]
    for act, which, pages in acts:
        held, other = holdings[which], holdings[1 - which]
        if act in ("grow", "small"):
            held.grow(pages * PAGE_SIZE, HUGE if act == "grow" else SMALL)
        elif act == "mixed":
            held.grow_mixed(pages * PAGE_SIZE)
        elif act == "shrink":
            before = held.bytes
            freed = held.shrink(pages * PAGE_SIZE)
            assert freed == before - held.bytes
            assert min(before, pages * PAGE_SIZE) <= freed < (pages + PAGEBLOCK_PAGES) * PAGE_SIZE
        elif act == "clear":
            held.clear()
        elif act == "adopt":
            held.adopt(other)
        else:
            guest.run_until(guest.loop.now + 2)
        used = sum(one.bytes for one in holdings)
        assert guest.free_bytes + used == ZONES
        assert used <= guest.footprint_bytes <= ZONES
    for held in holdings:
        held.clear()
    guest.run_until(guest.loop.now + 200)
    assert guest.free_bytes == ZONES
    guest.verify()
    assert guest.footprint_bytes < ZONES / 2
