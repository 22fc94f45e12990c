"""What the query commands of the control socket answer: the state of one guest's device as plain values.

Looks and changes nothing. Used by commands.py; the shapes are declared in schema.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hostdev.balloon import Balloon
from hostdev.memory import Region
from hostdev.rings import RingState
from hostdev.session import Session
from hostdev.statistics import Statistics
from hostdev.target import logical_size
from hostdev.vrings import Ring
from hostdev.wire.balloon import names
from hostdev.wire.trace import Cause

Values = dict[str, Any]


def guest_stats(statistics: Statistics) -> Values:
    """Return what QEMU's property guest-stats has. last-update: seconds since the epoch, 0 for never."""
    return {"stats": statistics.named(), "last-update": statistics.last_update}


def all_statistics(statistics: Statistics) -> Values:
    """Return the same, and what has no name yet."""
    unknown = [{"tag": tag, "value": value} for tag, value in sorted(statistics.unnamed().items())]
    return guest_stats(statistics) | {"unknown": unknown}


def status(balloon: Balloon) -> Values:
    """Return the device at a glance. Sizes in bytes: memory of the guest, target and actual as logical sizes."""
    memory, config, giver = balloon.known_memory(), balloon.config, balloon.giver
    values: Values = {
        "connected": True,
        "running": balloon.is_running,
        "inhibited": giver.inhibited,
        "inert": giver.inert,
        "features": names(balloon.offered),
        "negotiated": names(balloon.features),
        "poison-value": config.poison_val,
        "hinting": balloon.hinting.state.value,
        "worker": os.getpid(),
        "released": balloon.metrics.value("released_bytes_total"),
    }
    if giver.inert:
        values["reason"] = giver.why_inert
    if memory:
        values["memory"] = memory
        values["target"] = logical_size(memory, config.num_pages)
        values["actual"] = logical_size(memory, config.actual)
    return values


def rings(session: Session, balloon: Balloon) -> list[Values]:
    """Return each ring: what the front end said of it, and where it stands if it is started."""
    states = balloon.rings.states()
    return [_ring(index, ring, states.get(index)) for index, ring in enumerate(session.rings)]


def _ring(index: int, ring: Ring, state: RingState | None) -> Values:
    values: Values = {
        "index": index,
        "size": ring.size,
        "enabled": ring.enabled,
        "started": state is not None,
        "next-available": state.next_available if state else ring.base,
        "used": state.used if state else 0,
        "outstanding": state.outstanding if state else 0,
        "chains": state.returned if state else 0,
    }
    if state is not None and state.role is not None:
        values["role"] = state.role.name.lower().replace("_", "-")
    return values


def memory(balloon: Balloon, held: Mapping[Region, int]) -> list[Values]:
    """Return each region in order of guest addresses. held: bytes that the host holds of each, where that is known."""
    return [_region(balloon, region, held.get(region)) for region in balloon.memory.regions]


def _region(balloon: Balloon, region: Region, footprint: int | None) -> Values:
    giver = balloon.giver
    values: Values = {
        "guest-address": region.guest_address,
        "size": region.size,
        "page-size": region.page_size,
        "backing": balloon.discarder.backing(region).value,
        "method": balloon.discarder.method(region).value,
        "released-report": giver.released(region, Cause.REPORT),
        "released-inflate": giver.released(region, Cause.INFLATE),
        "withheld": giver.withheld(region),
    }
    if footprint is not None:
        values["footprint"] = footprint
    return values
