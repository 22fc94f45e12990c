"""Gives a part of guest memory back, or says why not, and keeps count of both.

Between balloon.py, which knows what the guest asked for, and discard.py, which knows how the host takes memory. It knows
when nothing may be given: the device is inert or inhibited, the guest's pages are poisoned, the backing does not allow it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from hostdev.discard import Discarder, Method
from hostdev.errors import HostError
from hostdev.memory import Part, Region
from hostdev.metrics import Metrics, worth_logging
from hostdev.pages import Span, align_inward, slices
from hostdev.trace import Tracer
from hostdev.wire.trace import Cause

log = logging.getLogger(__name__)

# One slice: 16 huge pages' worth takes about 3 ms when all of it is resident in 4 KiB pages.
SLICE_BYTES = 32 << 20
# After this many refusals in a row the host will not change its mind: stop asking.
MAX_HOST_ERRORS = 8
# What became of bytes of a region, beside the causes of a release.
WITHHELD = "withheld"


class Giver:
    """The last room before the host.

    poisoned: the guest's free pages hold a pattern that a hole would not. inhibited: somebody asked for it. why_inert: in
    words, empty while the device is not. host_errors: refusals of the host in a row.
    """

    def __init__(self, discarder: Discarder, metrics: Metrics, trace: Tracer) -> None:
        self._discarder = discarder
        self._metrics = metrics
        self._trace = trace
        self.host_errors = 0
        self.why_inert = ""
        self.poisoned = False
        self.inhibited = False
        self._regions: tuple[Region, ...] = ()

    @property
    def inert(self) -> bool:
        """True once nothing is given any more."""
        return bool(self.why_inert)

    def adopt(self, regions: Collection[Region]) -> None:
        """Work on these regions from now on; the counts of those that were there before go on."""
        fresh = tuple(regions)
        self._discarder.adopt(fresh)
        for region in self._regions:
            if region not in fresh:
                self._metrics.drop("region_bytes", _name(region))
        self._regions = fresh

    def released(self, region: Region, cause: Cause) -> int:
        """Bytes given back of a region of the current table."""
        return self._metrics.value("region_bytes", _name(region), cause.name.lower())

    def withheld(self, region: Region) -> int:
        """Bytes of a region that the guest named and that were not given back."""
        return self._metrics.value("region_bytes", _name(region), WITHHELD)

    def make_inert(self, why: str) -> None:
        """Give nothing from now on."""
        if not self.inert:
            log.error("the device is inert from now on, it answers and releases nothing: %s", why)
            self._trace.fault(None, why)
        self.why_inert = self.why_inert or why
        self._metrics.gauges["inert"] = 1

    def inhibit(self, *, inhibited: bool) -> None:
        """Give nothing until told otherwise; everything is still answered."""
        if inhibited != self.inhibited:
            log.warning(
                "releasing is %s by the control socket", "inhibited" if inhibited else "allowed again"
            )
        self.inhibited = inhibited
        self._metrics.gauges["inhibited"] = int(inhibited)

    def give(self, index: int, cause: Cause, part: Part) -> None:
        """Give one part of whole pages back, for a chain of ring index. Whatever happens, it is counted."""
        reason = self._reason_to_withhold(cause, part)
        address = part.region.guest_address + part.offset
        self._trace.release(index, cause, address, part.length, withheld=bool(reason))
        if not reason:
            reason = self._release(cause, part)
        if reason:
            self._metrics.add("region_bytes", part.length, _name(part.region), WITHHELD)
            self._metrics.add("withheld_bytes_total", part.length, cause.name.lower(), reason)

    def _release(self, cause: Cause, part: Part) -> str:
        """Release a part. Returns why it was not, nothing if it was."""
        try:
            self._discarder.release(part.region, part.offset, part.length)
        except HostError as error:
            self._count_host_error(error)
            return "host-error"
        self.host_errors = 0
        self._metrics.add("region_bytes", part.length, _name(part.region), cause.name.lower())
        method = self._discarder.method(part.region).value
        self._metrics.add("released_bytes_total", part.length, cause.name.lower(), method)
        return ""

    def _reason_to_withhold(self, cause: Cause, part: Part) -> str:
        if self.inert:
            return "inert"
        if self.inhibited:
            return "inhibited"
        # A page that the guest poisoned must keep its poison (virtio 1.3, 5.5.6.5): a hole reads as zeroes.
        if cause is Cause.REPORT and self.poisoned:
            return "poison"
        return "method-none" if self._discarder.method(part.region) is Method.NONE else ""

    def _count_host_error(self, error: HostError) -> None:
        self.host_errors += 1
        cause = error.__cause__
        code = str(cause.errno) if isinstance(cause, OSError) else "unknown"
        if worth_logging(self._metrics.add("host_errors_total", 1, code)):
            log.warning("%s", error)
        if self.host_errors >= MAX_HOST_ERRORS:
            self.make_inert(f"{self.host_errors} refusals in a row: {error}")


def _name(region: Region) -> str:
    return hex(region.guest_address)


def whole_pages(part: Part) -> list[Part]:
    """Shrink a part to whole pages, aligned on the file offset, and cut it into slices, of one page at the least."""
    base = part.region.file_offset
    inside = align_inward(Span(base + part.offset, part.length), part.region.page_size)
    pieces = slices(inside, max(SLICE_BYTES, part.region.page_size))
    return [Part(part.region, piece.start - base, piece.length) for piece in pieces]
