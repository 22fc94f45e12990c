"""A device's state as its record has it: gathered from the session and the model, and put back into new ones.

What is not here is made anew: mappings and queues from the memory table and the rings' addresses, indices from the rings
themselves, roles from features and rings. Commands that wait are asked again by the control process. The layout is
wire/record.py's, when it is written down journal.py's business. Used by worker.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hostdev.backend_channel import BackendChannel
from hostdev.balloon import Balloon
from hostdev.commands import Commands
from hostdev.errors import RecordError
from hostdev.fds import Fd, stream_socket
from hostdev.memory import MemoryTable, Region
from hostdev.metrics import Metrics, Sample
from hostdev.rings import Standing
from hostdev.session import Session
from hostdev.target import Target
from hostdev.virtqueue import RingLayout
from hostdev.vrings import Ring
from hostdev.wire import record as wire
from hostdev.wire.record import (
    DeviceRecord,
    RegionRecord,
    RingPlace,
    RingRecord,
    SessionRecord,
    StatisticsRecord,
    Tag,
    section,
    unpack,
)
from hostdev.wire.vhost_user import F_PROTOCOL_FEATURES, MemoryRegion, ProtocolFeature, VringAddress

_NANOSECONDS = 1_000_000_000
# What there is room for in an image. A time comes near it only in a record that somebody made up, and floats round up.
_MAX_WORD = (1 << 64) - 1
_IS_SIZE, _IS_PERCENT = 1, 2


@dataclass(frozen=True, slots=True)
class Done:
    """The last message that took effect: its number, the reply to it, and whether the connection is to be closed."""

    number: int = 0
    reply: bytes = b""
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """The objects of one device."""

    session: Session
    balloon: Balloon
    commands: Commands
    metrics: Metrics


# Gathering


def gather(parts: Parts, done: Done) -> bytes:
    """Return an image of the state as it is now."""
    session, balloon = parts.session, parts.balloon
    return b"".join(
        (
            section(Tag.SESSION, wire.SESSION_STRUCT.pack(*_session(session, done))),
            *(
                section(Tag.REGION, wire.REGION_STRUCT.pack(*_region(each)))
                for each in session.memory.regions
            ),
            *(
                section(Tag.RING, wire.RING_STRUCT.pack(*_ring(index, ring, balloon.rings.standing(index))))
                for index, ring in enumerate(session.rings)
            ),
            section(Tag.DEVICE, wire.DEVICE_STRUCT.pack(*_device(balloon, parts.commands))),
            section(Tag.STATISTICS, wire.STATISTICS_STRUCT.pack(*_statistics(balloon))),
            section(Tag.FIGURES, balloon.statistics.encoded()),
            section(Tag.INERT, balloon.giver.why_inert.encode()),
            section(Tag.REPLY, done.reply),
            section(Tag.SAMPLES, _names(parts.metrics)),
        )
    )


def _session(session: Session, done: Done) -> SessionRecord:
    channel = session.backend_channel
    token = 0 if channel is None or channel.is_broken else channel.token
    protocol = int(session.protocol_features)
    return SessionRecord(done.number, session.features, protocol, token, int(done.closing))


def _region(region: Region) -> RegionRecord:
    return RegionRecord(
        region.fd.token, region.guest_address, region.size, region.user_address, region.file_offset
    )


def _ring(index: int, ring: Ring, standing: Standing) -> RingRecord:
    at = ring.addresses or VringAddress(index, 0, 0, 0, 0, 0)
    return RingRecord(
        ring=index,
        size=ring.size,
        first=ring.base,
        has_addresses=int(ring.addresses is not None),
        flags=at.flags,
        descriptor=at.descriptor,
        used=at.used,
        available=at.available,
        log=at.log,
        kick=_token(ring.kick),
        call=_token(ring.call),
        error=_token(ring.error),
        enabled=int(ring.enabled),
        started=int(ring.started),
        place=standing.place,
        base=standing.base,
        held=standing.held,
    )


def _token(fd: Fd | None) -> int:
    return 0 if fd is None else fd.token


def _device(balloon: Balloon, commands: Commands) -> DeviceRecord:
    space, giver, target = balloon.space, balloon.giver, balloon.space.pending
    config = space.config
    is_size = target is not None and target.size is not None
    return DeviceRecord(
        num_pages=config.num_pages,
        actual=config.actual,
        poison_val=config.poison_val,
        changed=int(space.changed),
        has_all_memory=int(balloon.has_all_memory),
        inhibited=int(giver.inhibited),
        host_errors=giver.host_errors,
        pending=0 if target is None else _IS_SIZE if is_size else _IS_PERCENT,
        target=0 if target is None else target.size or target.percent or 0,
        hint_id=balloon.hinting.last_id,
        hinting=int(balloon.hinting.is_open),
        told=commands.told_actual,
        keeps_off=int(balloon.keeps_off),
    )


def _statistics(balloon: Balloon) -> StatisticsRecord:
    statistics = balloon.statistics
    due = 0 if statistics.due is None else min(max(1, int(statistics.due * _NANOSECONDS)), _MAX_WORD)
    return StatisticsRecord(statistics.interval, due, statistics.last_update, statistics.updates & _MAX_WORD)


def _names(metrics: Metrics) -> bytes:
    """The names of the counters, in the order in which the tally has them: family and labels, one a line."""
    return "\n".join("\t".join((family, *labels)) for family, labels in metrics.samples).encode()


# Putting back


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the state, taken apart."""

    session: SessionRecord
    regions: tuple[RegionRecord, ...]
    rings: tuple[RingRecord, ...]
    device: DeviceRecord
    statistics: StatisticsRecord
    figures: bytes
    why_inert: str
    reply: bytes
    samples: tuple[Sample, ...]

    @property
    def done(self) -> Done:
        """The last message that took effect."""
        return Done(self.session.number, self.reply, bool(self.session.closing))


def parse(image: bytes) -> Image:
    """Take an image apart. Raises RecordError if there is not enough in it to go on with."""
    found: dict[int, list[bytes]] = {}
    for tag, payload in wire.sections(image):
        found.setdefault(tag, []).append(payload)
    single = {tag: payloads[0] for tag, payloads in found.items()}
    if Tag.SESSION not in single or Tag.DEVICE not in single:
        raise RecordError("the record of a guest is damaged")
    return Image(
        session=SessionRecord(*unpack(wire.SESSION_STRUCT, single[Tag.SESSION])),
        regions=tuple(RegionRecord(*unpack(wire.REGION_STRUCT, each)) for each in found.get(Tag.REGION, ())),
        rings=tuple(RingRecord(*unpack(wire.RING_STRUCT, each)) for each in found.get(Tag.RING, ())),
        device=DeviceRecord(*unpack(wire.DEVICE_STRUCT, single[Tag.DEVICE])),
        statistics=StatisticsRecord(*unpack(wire.STATISTICS_STRUCT, single.get(Tag.STATISTICS, b""))),
        figures=single.get(Tag.FIGURES, b""),
        why_inert=single.get(Tag.INERT, b"").decode(errors="replace"),
        reply=single.get(Tag.REPLY, b""),
        samples=tuple(_parse_names(single.get(Tag.SAMPLES, b""))),
    )


def _parse_names(text: bytes) -> Iterable[Sample]:
    for line in text.decode(errors="replace").splitlines():
        family, *labels = line.split("\t")
        yield family, tuple(labels)


def restore(parts: Parts, image: Image, held: Mapping[int, Fd], *, keeps_off: bool = False) -> None:
    """Put a state back into a device that has served nobody yet.

    held: descriptors by token; those that are needed are taken over. keeps_off: a predecessor died of a touch of guest
    memory. Raises RequestError if memory or rings cannot be set up as they were, KeyError if a descriptor is missing.
    """
    _check_owners(image)
    if keeps_off or image.device.keeps_off or _is_cut_short(image, held):
        parts.balloon.keep_off()
    _restore_model(parts, image)
    _restore_session(parts.session, image, held)
    _restore_rings(parts, image, held)


def _check_owners(image: Image) -> None:
    """Raises RecordError for a descriptor that two would own: one of them would close it for the other."""
    tokens = [each.token for each in image.regions] + [image.session.channel]
    tokens += [token for each in image.rings for token in (each.kick, each.call, each.error)]
    if any(count > 1 for token, count in Counter(tokens).items() if token):
        raise RecordError("the record of a guest is damaged")


def _is_cut_short(image: Image, held: Mapping[int, Fd]) -> bool:
    """True if a file has become shorter than a region of it."""
    return any(
        os.fstat(held[each.token].fileno()).st_size < each.mmap_offset + each.size for each in image.regions
    )


def _restore_model(parts: Parts, image: Image) -> None:
    balloon, device = parts.balloon, image.device
    target = Target(size=device.target) if device.pending == _IS_SIZE else Target(percent=device.target)
    balloon.space.restore(
        num_pages=device.num_pages,
        actual=device.actual,
        poison_val=device.poison_val,
        pending=target if device.pending else None,
        changed=bool(device.changed),
    )
    balloon.giver.inhibit(inhibited=bool(device.inhibited))
    balloon.giver.host_errors = device.host_errors
    if image.why_inert:
        balloon.giver.make_inert(image.why_inert)
    schedule = image.statistics
    balloon.statistics.restore(
        image.figures,
        interval=schedule.interval,
        due=schedule.due / _NANOSECONDS if schedule.due else None,
        last_update=schedule.last_update,
        updates=schedule.updates,
    )
    balloon.hinting.restore(device.hint_id)
    if device.hinting:
        # Whoever opened it died, and the guest is without its free memory until it reads DONE.
        balloon.space.changed = True
    parts.commands.told_actual = device.told


def _restore_session(session: Session, image: Image, held: Mapping[int, Fd]) -> None:
    session.protocol_features = ProtocolFeature(image.session.protocol_features)
    session.features = image.session.features
    if session.features:
        session.device.set_features(session.features & ~F_PROTOCOL_FEATURES)
    regions = [
        Region(
            MemoryRegion(each.guest_address, each.size, each.user_address, each.mmap_offset),
            held[each.token],
            mapped=not session.device.keeps_off,
        )
        for each in image.regions
    ]
    session.memory = MemoryTable(regions)
    session.device.set_memory(session.memory)
    if image.session.channel:
        token = image.session.channel
        sock = stream_socket(held[token])
        session.backend_channel = None if sock is None else BackendChannel(sock, token, session.journal)


def _check_rings(image: Image, count: int) -> None:
    """Raise RecordError for a ring that there is none of, or twice, or that is nowhere that is known."""
    numbers = [each.ring for each in image.rings]
    places = {each.place for each in image.rings}
    if len({*numbers}) != len(numbers) or max(numbers, default=0) >= count or places - {*RingPlace}:
        raise RecordError("the record of a guest is damaged")


def _restore_rings(parts: Parts, image: Image, held: Mapping[int, Fd]) -> None:
    session, balloon = parts.session, parts.balloon
    _check_rings(image, len(session.rings))
    for each in image.rings:
        ring = session.rings[each.ring]
        ring.size, ring.base = each.size, each.first
        if each.has_addresses:
            ring.addresses = VringAddress(
                each.ring, each.flags, each.descriptor, each.used, each.available, each.log
            )
        ring.kick, ring.call, ring.error = (held.get(token) for token in (each.kick, each.call, each.error))
        ring.enabled, ring.started = bool(each.enabled), bool(each.started)
        layout = RingLayout(each.size, each.descriptor, each.available, each.used)
        standing = Standing(RingPlace(each.place), each.base, each.held)
        balloon.rings.resume(each.ring, layout, standing, session.memory, balloon.features)
    balloon.has_all_memory = bool(image.device.has_all_memory)
