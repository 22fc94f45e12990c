"""Properties of the layouts.

1. A lowered layout packs to the bytes that the construct declaration builds, for any values of its fields.
2. A lowered layout unpacks from any bytes what the declaration parses.
3. Every value of every message comes back from its bytes.
4. Any bytes are decoded or refused with LayoutError; what was decoded encodes to the same bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.wire import balloon, virtqueue
from hostdev.wire import vhost_user as wire
from hostdev.wire.layout import Layout, LayoutError, lower

LOWERED: dict[str, Layout[Any]] = {
    "descriptor": virtqueue.DESCRIPTOR,
    "used element": virtqueue.USED_ELEMENT,
    "ring header": virtqueue.RING_HEADER,
    "config": balloon.CONFIG,
    "statistic": balloon.STATISTIC,
    "header": wire.HEADER,
    "region": wire.REGION,
    "single region": wire.SINGLE_REGION,
    "ring address": wire.VRING_ADDRESS,
}

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
REGIONS = st.builds(wire.MemoryRegion, U64, U64, U64, U64)
VALUES: dict[Layout[Any], st.SearchStrategy[Any]] = {
    wire.NOTHING: st.just(wire.Nothing()),
    wire.U64_PAYLOAD: st.builds(wire.U64, U64),
    wire.VRING_STATE: st.builds(wire.VringState, U32, U32),
    wire.VRING_ADDRESS: st.builds(wire.VringAddress, U32, U32, U64, U64, U64, U64),
    wire.SINGLE_REGION: st.builds(wire.SingleRegion, U64, REGIONS),
    wire.MEMORY_TABLE: st.lists(REGIONS, max_size=8).flatmap(
        lambda regions: st.builds(wire.MemoryTable, st.just(len(regions)), U32, st.just(tuple(regions)))
    ),
    wire.CONFIG_ACCESS: st.binary(max_size=256).flatmap(
        lambda data: st.builds(wire.ConfigAccess, U32, st.just(len(data)), U32, st.just(data))
    ),
}


def _flat(value: object) -> list[int]:
    """The integers of a decoded value, in the order of their declaration."""
    if isinstance(value, int):
        return [value]
    assert dataclasses.is_dataclass(value)
    return [number for field in dataclasses.fields(value) for number in _flat(getattr(value, field.name))]


@pytest.mark.parametrize("layout", LOWERED.values(), ids=LOWERED.keys())
@given(data=st.data())
def test_lowered_is_the_declaration(layout: Layout[Any], data: st.DataObject) -> None:
    lowered = lower(layout.declaration)
    raw = data.draw(st.binary(min_size=lowered.size, max_size=lowered.size))
    value = layout.decode(raw)
    assert list(lowered.unpack(raw)) == _flat(value)
    assert lowered.pack(*_flat(value)) == layout.encode(value) == raw


@pytest.mark.parametrize("request_", wire.MESSAGES, ids=lambda request: request.name)
@given(data=st.data())
def test_every_message_comes_back(request_: wire.Request, data: st.DataObject) -> None:
    layout = wire.MESSAGES[request_].payload
    value = data.draw(VALUES[layout])
    payload = layout.encode(value)
    whole = wire.message(request_, wire.FLAG_NEED_REPLY, payload)
    header = wire.HEADER.decode(whole[: wire.HEADER_SIZE])
    assert header == wire.Header(request_, wire.VERSION | wire.FLAG_NEED_REPLY, len(payload))
    assert layout.decode(whole[wire.HEADER_SIZE :]) == value


@pytest.mark.parametrize("layout", VALUES, ids=lambda layout: layout._value.__name__)
@given(raw=st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(layout: Layout[Any], raw: bytes) -> None:
    try:
        value = layout.decode(raw)
    except LayoutError:
        return
    assert layout.encode(value) == raw
