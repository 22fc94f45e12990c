"""The second proof of --verify: no hole belongs to a page that the guest has in use and must have written.

The guest's /proc/kpageflags is read, its machine paused, the holes are read, the machine goes on, and the flags are read
again. Judged are pages that both readings call *written*: in use, of a kind whose contents were put there before the flags
said so (Linux, Documentation/admin-guide/mm/pagemap.rst and fs/proc/page.c):

    UPTODATE and LRU     anonymous pages and page cache: cleared, copied or read in before they are marked (mm/memory.c,
                         mm/filemap.c, mm/shmem.c)
    THP and ANON         any page of an anonymous huge page; older kernels give its tails no other flags
    PGTABLE              a page table: allocated with __GFP_ZERO

A page that was written and is a hole was lost, unless it was given up, released and taken and written anew between the two
readings. That needs a release in between, so a page that the trace has as released between the first reading and the pause
is not judged; nor is one that the readings call differently. Both are counted as churn, and if that is too much the readings
are made again. Where there is no trace, a page that was released and is back within the moment cannot be told apart.

With init_on_free the kernel trusts that a free page is zeroed, does not clear it when it is taken, and a hole reads as
zeroes: only page cache is surely written then.

What this proves: no page of these kinds was a hole at the pause, whoever released it and whenever, before the first look as
well. What it does not prove: anything about pages that may be in use and never written, or that do not say whether they are
in use. Kernel memory without flags (stacks, vmalloc, drivers, the kernel itself) cannot be told from a page in a per-CPU list,
which is free and may be a hole; a page of a slab may not have been written yet, for newer kernels do not always link a new
slab's objects; a reserved page may never have been touched. Their holes are counted.

Pure. verify.py is its user; its properties are in tests/property/test_verify_pages.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from balloonlab.measure.ranges import PAGE, Places, counted, intersect, subtract, total
from balloonlab.measure.report import Check
from balloonlab.sizes import human
from hostdev.pages import Span, merge

NAME = "verify-pageflags"

# Linux, uapi/linux/kernel-page-flags.h. OFFLINE is what a balloon's pages are marked with.
LRU, UPTODATE, SLAB, BUDDY, ANON = 1 << 5, 1 << 3, 1 << 7, 1 << 10, 1 << 12
HUGE, HWPOISON, NOPAGE, THP, OFFLINE = 1 << 17, 1 << 19, 1 << 20, 1 << 22, 1 << 23
ZERO_PAGE, PGTABLE, RESERVED = 1 << 24, 1 << 26, 1 << 32
# Where one of these is set the others may mean something else: a slab's page has been seen with ANON, a free one with
# UPTODATE, for the kernel uses bits again.
_SAYS_NOTHING = SLAB | HUGE | HWPOISON | NOPAGE | ZERO_PAGE | RESERVED
# Between two readings half a second apart a guest at rest changes some hundred of 131,072 pages.
CHURN_SHARE = 0.1


class Use(Enum):
    """What a page is used for, as far as that matters here."""

    FREE = "free"
    BALLOON = "in the balloon"
    WRITTEN = "in use and written"
    OTHER = "of other kinds"


def use_of(flags: int, *, init_on_free: bool = False) -> Use:
    """Return what a page with these flags is used for. init_on_free: the guest does not clear pages that it takes."""
    if flags & BUDDY:
        return Use.FREE
    if flags & OFFLINE:
        return Use.BALLOON
    if flags & _SAYS_NOTHING:
        return Use.OTHER
    is_cached = flags & (UPTODATE | LRU) == UPTODATE | LRU
    if init_on_free:
        return Use.WRITTEN if is_cached and not flags & (ANON | THP | PGTABLE) else Use.OTHER
    is_huge = flags & (THP | ANON) == THP | ANON
    return Use.WRITTEN if is_cached or is_huge or flags & PGTABLE else Use.OTHER


@dataclass(frozen=True)
class Flags:
    """The flags of some page frames that follow on each other, read twice. first: number of the first one."""

    first: int
    before: Sequence[int]
    after: Sequence[int]


@dataclass(frozen=True)
class Pages:
    """The judgement, in bytes. lost: places of written pages that were holes. holes: by use, of pages that kept it."""

    judged: int
    lost: tuple[Span, ...]
    churn: int
    holes: dict[Use, int]

    @property
    def is_restless(self) -> bool:
        """True if so many pages changed that too few were judged."""
        return self.churn > CHURN_SHARE * (self.judged + self.churn)


class _Uses(dict[int, Use]):
    """Flags to their use, each worked out once: there are some dozens of values for millions of pages."""

    def __init__(self, *, init_on_free: bool) -> None:
        super().__init__()
        self._init_on_free = init_on_free

    def __missing__(self, flags: int) -> Use:
        self[flags] = use = use_of(flags, init_on_free=self._init_on_free)
        return use


def survey(readings: Iterable[Flags], *, init_on_free: bool = False) -> dict[Use | None, list[Span]]:
    """Return the guest addresses of pages by their use; None: of those whose use differs between the readings."""
    uses = _Uses(init_on_free=init_on_free)
    found: dict[Use | None, list[Span]] = {None: []} | {use: [] for use in Use}
    for reading in readings:
        for use, span in _runs(reading, uses):
            found[use].append(span)
    return {use: merge(spans) for use, spans in found.items()}


def _runs(reading: Flags, uses: _Uses) -> Iterator[tuple[Use | None, Span]]:
    address = reading.first * PAGE
    pairs = zip(map(uses.__getitem__, reading.before), map(uses.__getitem__, reading.after), strict=True)
    for (one, other), run in groupby(pairs):
        length = sum(1 for _ in run) * PAGE
        yield one if one is other else None, Span(address, length)
        address += length


def judge_pages(
    found: dict[Use | None, list[Span]], held: Sequence[Span], released: Sequence[Span], places: Places
) -> Pages:
    """Judge a survey. held: places that were data at the pause. released: guest addresses, from the first reading to it."""
    written = places.of(found[Use.WRITTEN])
    back = intersect(written, places.of(released))
    judged = subtract(written, back)
    holes = Counter({use: total(subtract(places.of(spans), held)) for use, spans in found.items() if use})
    return Pages(
        judged=total(judged),
        lost=tuple(subtract(judged, held)),
        churn=total(found[None]) + total(back),
        holes=dict(holes),
    )


def check_pages(pages: Pages, places: Places) -> Check:
    """Say what was found."""
    told = (
        f"{counted(pages.judged)} ({human(pages.judged)}) in use and written, {counted(pages.churn)} of churn not judged; "
        f"holes: {_holes(pages)}"
    )
    if pages.lost:
        what = f"holes that the guest has in use and has written: {places.describe(pages.lost)}"
        return Check(name=NAME, outcome="fail", message=f"{what}; {told}")
    if not pages.judged and not pages.churn:
        return Check(
            name=NAME,
            outcome="skip",
            message=f"nothing could be judged, no page is in use and written: {told}",
        )
    if pages.is_restless or not pages.judged:
        return Check(name=NAME, outcome="skip", message=f"the guest is too restless to be judged: {told}")
    return Check(name=NAME, outcome="pass", message=told)


def _holes(pages: Pages) -> str:
    return ", ".join(
        f"{pages.holes.get(use, 0) // PAGE:,} {use.value}" for use in Use if use is not Use.WRITTEN
    )
