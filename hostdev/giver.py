"""Gives a part of guest memory back, or says why not, and keeps count of both.

Between balloon.py, which knows what the guest asked for, and discard.py, which knows how the host takes memory. It knows
when nothing may be given: the device is inert, the guest's pages are poisoned, the backing does not allow it.
"""

from __future__ import annotations

import logging

from hostdev.discard import Discarder, Method
from hostdev.errors import HostError
from hostdev.memory import Part
from hostdev.metrics import Metrics, worth_logging
from hostdev.pages import Span, align_inward, slices
from hostdev.trace import Tracer
from hostdev.wire.trace import Cause

log = logging.getLogger(__name__)

# One slice: 16 huge pages' worth takes about 3 ms when all of it is resident in 4 KiB pages.
SLICE_BYTES = 32 << 20
# After this many refusals in a row the host will not change its mind: stop asking.
MAX_HOST_ERRORS = 8


class Giver:
    """The last room before the host. ``poisoned``: the guest's free pages hold a pattern that a hole would not."""

    def __init__(self, discarder: Discarder, metrics: Metrics, trace: Tracer) -> None:
        self._discarder = discarder
        self._metrics = metrics
        self._trace = trace
        self._host_errors = 0
        self.inert = False
        self.poisoned = False

    def make_inert(self, why: str) -> None:
        """Give nothing from now on."""
        if not self.inert:
            log.error("the device is inert from now on, it answers and releases nothing: %s", why)
            self._trace.fault(None, why)
        self.inert = True
        self._metrics.gauges["inert"] = 1

    def give(self, index: int, cause: Cause, part: Part) -> None:
        """Give one part of whole pages back, for a chain of ring index. Whatever happens, it is counted."""
        reason = self._reason_to_withhold(cause, part)
        address = part.region.guest_address + part.offset
        self._trace.release(index, cause, address, part.length, withheld=bool(reason))
        if not reason:
            reason = self._release(cause, part)
        if reason:
            self._metrics.add("withheld_bytes_total", part.length, cause.name.lower(), reason)

    def _release(self, cause: Cause, part: Part) -> str:
        """Release a part. Returns why it was not, nothing if it was."""
        try:
            self._discarder.release(part.region, part.offset, part.length)
        except HostError as error:
            self._count_host_error(error)
            return "host-error"
        self._host_errors = 0
        method = self._discarder.method(part.region).value
        self._metrics.add("released_bytes_total", part.length, cause.name.lower(), method)
        return ""

    def _reason_to_withhold(self, cause: Cause, part: Part) -> str:
        if self.inert:
            return "inert"
        # A page that the guest poisoned must keep its poison (virtio 1.3, 5.5.6.5): a hole reads as zeroes.
        if cause is Cause.REPORT and self.poisoned:
            return "poison"
        return "method-none" if self._discarder.method(part.region) is Method.NONE else ""

    def _count_host_error(self, error: HostError) -> None:
        self._host_errors += 1
        cause = error.__cause__
        code = str(cause.errno) if isinstance(cause, OSError) else "unknown"
        if worth_logging(self._metrics.add("host_errors_total", 1, code)):
            log.warning("%s", error)
        if self._host_errors >= MAX_HOST_ERRORS:
            self.make_inert(f"{self._host_errors} refusals in a row: {error}")


def whole_pages(part: Part) -> list[Part]:
    """Shrink a part to whole pages, aligned on the file offset, and cut it into slices."""
    base = part.region.file_offset
    inside = align_inward(Span(base + part.offset, part.length), part.region.page_size)
    return [Part(part.region, piece.start - base, piece.length) for piece in slices(inside, SLICE_BYTES)]
