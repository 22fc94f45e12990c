"""What a chain asks for, as a job: the parts of guest memory that are to be given back for it, often none.

Used by balloon.py, which does the job. What is in a chain is chains.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hostdev import chains
from hostdev.giver import whole_pages
from hostdev.hinting import Hinting
from hostdev.memory import MemoryTable, Part
from hostdev.metrics import Metrics
from hostdev.pages import Span, spans_of_pfns
from hostdev.rings import Job
from hostdev.virtqueue import Chain
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Cause


class Jobs:
    """Makes them, and counts on the way what is only to be counted."""

    def __init__(self, metrics: Metrics, hinting: Hinting) -> None:
        self._metrics = metrics
        self._hinting = hinting

    def of(self, role: Role | None, chain: Chain, memory: MemoryTable) -> Job:
        """Turn a chain into its job. Raises ChainError for a buffer outside memory."""
        if role is Role.REPORTING:
            return _job(chain.head, Cause.REPORT, chains.reported(chain), memory)
        if role is Role.INFLATE:
            return _job(chain.head, Cause.INFLATE, spans_of_pfns(self._pfns(chain, memory)), memory)
        if role is Role.DEFLATE:
            self._metrics.add("deflated_pages_total", len(self._pfns(chain, memory)))
        if role is Role.FREE_PAGE_HINT:
            self._hint(chain, memory)
        return Job(chain.head, Cause.NONE, iter(()))

    def _pfns(self, chain: Chain, memory: MemoryTable) -> tuple[int, ...]:
        if chains.has_too_many(chain):
            self._metrics.add("guest_errors_total", 1, "pfn-limit")
        return chains.page_frame_numbers(memory, chain)

    def _hint(self, chain: Chain, memory: MemoryTable) -> None:
        """Count hints. They are answered and never released: the guest may take such pages back at any moment."""
        value = chains.command_id(memory, chain)
        if value is not None:
            self._hinting.take_id(value)
        for size in chains.hinted(memory, chain):
            self._hinting.take_block(size)


def _job(head: int, cause: Cause, spans: Iterable[Span], memory: MemoryTable) -> Job:
    return Job(head, cause, _pieces(spans, memory))


def _pieces(spans: Iterable[Span], memory: MemoryTable) -> Iterator[Part | None]:
    """Yield what is to be given back, None for a range that holds no whole page of memory."""
    for span in spans:
        pieces = [piece for part in memory.split(*span) for piece in whole_pages(part)]
        yield from pieces or (None,)
