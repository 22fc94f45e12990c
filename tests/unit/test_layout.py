"""Layouts: the sizes that the specifications give, and that nothing but exactly one value is accepted."""

from __future__ import annotations

from typing import Any

import construct
import pytest

from hostdev.wire import balloon, channel, virtqueue
from hostdev.wire import vhost_user as wire
from hostdev.wire.layout import Layout, LayoutError, lower

FIXED_SIZES = {
    "vhost-user header": (wire.HEADER, 12),
    "u64": (wire.U64_PAYLOAD, 8),
    "vring state": (wire.VRING_STATE, 8),
    "vring address": (wire.VRING_ADDRESS, 40),
    "memory region": (wire.REGION, 32),
    "single region": (wire.SINGLE_REGION, 40),
    "no payload": (wire.NOTHING, 0),
    "virtq_desc": (virtqueue.DESCRIPTOR, 16),
    "virtq_used_elem": (virtqueue.USED_ELEMENT, 8),
    "ring header": (virtqueue.RING_HEADER, 4),
    "virtio_balloon_config": (balloon.CONFIG, 16),
    "virtio_balloon_stat": (balloon.STATISTIC, 10),
}


@pytest.mark.parametrize(("layout", "size"), FIXED_SIZES.values(), ids=FIXED_SIZES.keys())
def test_size_of_the_specification(layout: Layout[Any], size: int) -> None:
    assert layout.declaration.sizeof() == size
    assert len(layout.encode(layout.decode(bytes(size)))) == size


@pytest.mark.parametrize(("layout", "size"), FIXED_SIZES.values(), ids=FIXED_SIZES.keys())
def test_trailing_and_missing_bytes_are_errors(layout: Layout[Any], size: int) -> None:
    with pytest.raises(LayoutError):
        layout.decode(bytes(size + 1))
    if size:
        with pytest.raises(LayoutError):
            layout.decode(bytes(size - 1))


def test_field_order_of_a_descriptor() -> None:
    data = bytes.fromhex("0807060504030201 0d0c0b0a 0300 1000")
    assert virtqueue.DESCRIPTOR.decode(data) == virtqueue.Descriptor(0x0102030405060708, 0x0A0B0C0D, 3, 0x10)


def test_field_order_of_a_ring_address() -> None:
    """The used ring's address comes before the available ring's."""
    data = wire.VRING_ADDRESS.encode(wire.VringAddress(1, 2, 3, 4, 5, 6))
    assert data == b"".join(
        number.to_bytes(width, "little")
        for number, width in zip(range(1, 7), (4, 4, 8, 8, 8, 8), strict=True)
    )


def test_memory_table_holds_as_many_regions_as_it_says() -> None:
    region = wire.MemoryRegion(0, 4096, 0, 0)
    table = wire.MemoryTable(2, 0, (region, region))
    data = wire.MEMORY_TABLE.encode(table)
    assert len(data) == 8 + 2 * 32
    assert wire.MEMORY_TABLE.decode(data) == table
    for wrong in (data[:-1], data + b"\0", data[:40], (9).to_bytes(4, "little") + bytes(4 + 9 * 32)):
        with pytest.raises(LayoutError):
            wire.MEMORY_TABLE.decode(wrong)


def test_config_access_holds_as_many_bytes_as_it_says() -> None:
    for size in (0, 1, 16, wire.MAX_CONFIG_SIZE):
        access = wire.ConfigAccess(0, size, 0, bytes(size))
        assert wire.CONFIG_ACCESS.decode(wire.CONFIG_ACCESS.encode(access)) == access
    for size, data in ((257, bytes(257)), (16, bytes(15)), (16, bytes(17)), (2**32 - 1, b"")):
        with pytest.raises(LayoutError):
            wire.CONFIG_ACCESS.decode(
                b"".join(number.to_bytes(4, "little") for number in (0, size, 0)) + data
            )


def test_values_that_do_not_fit_are_errors() -> None:
    with pytest.raises(LayoutError):
        wire.VRING_STATE.encode(wire.VringState(1 << 32, 0))
    with pytest.raises(LayoutError):
        virtqueue.DESCRIPTOR.encode(virtqueue.Descriptor(-1, 0, 0, 0))


@pytest.mark.parametrize(
    "declaration",
    [
        construct.Int32ub,
        construct.Struct("a" / construct.Bytes(4)),
        construct.Struct("a" / construct.Array(2, construct.Int8ul)),
        wire.MEMORY_TABLE.declaration,
    ],
)
def test_only_plain_little_endian_integers_are_lowered(
    declaration: construct.Construct[object, object],
) -> None:
    with pytest.raises(TypeError):
        lower(declaration)


def test_every_request_has_a_shape() -> None:
    assert set(wire.MESSAGES) == set(wire.Request)


def test_no_request_is_longer_than_the_bound() -> None:
    longest = max(
        len(wire.MEMORY_TABLE.encode(wire.MemoryTable(8, 0, (wire.MemoryRegion(0, 0, 0, 0),) * 8))),
        len(wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 256, 0, bytes(256)))),
    )
    assert longest == 268
    assert longest <= wire.MAX_PAYLOAD


def test_the_keepers_channel_has_room_for_every_message() -> None:
    longest = channel.Frame(channel.ToWorker.MESSAGE, 255, 2**64 - 1, bytes(12 + wire.MAX_PAYLOAD))
    assert len(channel.FRAME.encode(longest)) <= channel.MAX_DATAGRAM
    assert channel.FRAME.decode(channel.FRAME.encode(longest)) == longest
    answer = channel.Answer(channel.ToKeeper.HOLDING, bytes(12 + 12 + 256), tuple(range(32 + 15 + 1)))
    assert len(channel.ANSWER.encode(answer)) <= channel.MAX_DATAGRAM
    assert channel.ANSWER.decode(channel.ANSWER.encode(answer)) == answer


def test_ring_parts_have_the_sizes_of_the_specification() -> None:
    """virtio 1.3, 2.7: 16 * size, 6 + 2 * size and 6 + 8 * size, the last two without their event field."""
    for size in (1, 128, 32768):
        assert virtqueue.descriptor_table_bytes(size) == 16 * size
        assert virtqueue.available_ring_bytes(size) == 6 + 2 * size - 2
        assert virtqueue.used_ring_bytes(size) == 6 + 8 * size - 2
