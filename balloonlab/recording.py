"""What a real guest did after a free, as passes of its page reporting, and what it looked like when it began.

A recording is all that a model needs to repeat it, and all that it is judged by: fidelity.py makes one, compares, and
keeps it beside its result; tests keep a few small ones. Times are seconds since the free was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from balloonlab.decode import TraceReader
from balloonlab.errors import UsageError
from guest_images.free_lists import PAGE_SIZE
from guest_images.guest_pages import AccountedPages
from guest_images.modelled_guest import ModelledGuest
from guest_images.page_reporting import Parameters, Pass
from guest_images.proc_state import ProcState, zones_after
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind

SCHEMA = 1
# How long the model lives: no guest is watched for longer.
MODEL_SECONDS = 120.0


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A real guest around a free.

    order, delay (seconds): what its page reporting said of itself. before, after: its free lists with nothing left to
    report, and right after the free. footprint: what the host held, as pairs of seconds and bytes.
    """

    schema: int
    suite: str
    kernel: str
    memory_bytes: int
    filled_bytes: int
    fill_kind: str
    order: int
    delay: float
    before: ProcState
    after: ProcState
    passes: list[Pass]
    footprint: list[tuple[float, int]] = []

    @property
    def parameters(self) -> Parameters:
        """The model's parameters: the guest's own order and delay, the constants of its kernel."""
        return Parameters(order=self.order, delay=self.delay)


def read_recording(path: Path) -> Recording:
    """Read a recording. Raises UsageError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Recording)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: name a recording.json of balloonlab fidelity") from error
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{path} is no recording ({error}): name a recording.json of balloonlab fidelity"
        ) from error


def modelled_passes(recording: Recording, parameters: Parameters) -> list[Pass]:
    """Run the model from where the guest was, with nothing but counted pages. Raises LayoutError.

    The guest was idle before the free, so its delayed work starts with the free, as the model's does when it registers.
    """
    zones = zones_after(recording.before, recording.after, parameters)
    guest = ModelledGuest(zones, parameters, AccountedPages(zones[-1].end_pfn * PAGE_SIZE))
    guest.run_until(MODEL_SECONDS)
    return [one for one in guest.passes if one.bytes]


def traced_passes(trace: Path, since: float, gap: float) -> list[Pass]:
    """Read the passes since a moment off a device's trace. Raises UsageError.

    since: seconds since the epoch. gap: seconds without a report that separate two passes.
    """
    reader = TraceReader(trace)
    offset = since - reader.header().started / 1e9
    chains = [
        (record.seconds - offset, [entry.length for entry in record.value.entries])
        for record in reader.records()
        if record.kind is Kind.CHAIN and record.value.role == Role.REPORTING and record.seconds >= offset
    ]
    return group(chains, gap)


def group(reports: Sequence[tuple[float, Sequence[int]]], gap: float) -> list[Pass]:
    """Put reports, as pairs of their moment and the sizes of their blocks, together into passes. Pure."""
    passes: list[Pass] = []
    last = 0.0
    for seconds, sizes in reports:
        one = Pass(seconds, 1, len(sizes), sum(sizes))
        if passes and seconds - last < gap:
            begun = passes.pop()
            one = Pass(begun.time, begun.reports + 1, begun.blocks + one.blocks, begun.bytes + one.bytes)
        passes.append(one)
        last = seconds
    return passes
