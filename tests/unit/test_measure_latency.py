"""How long reports took, from the records of a trace."""

from __future__ import annotations

import pytest

from balloonlab.decode import Record
from balloonlab.measure.latency import BOUNDS, Latencies, histogram, quantile
from hostdev.wire import trace as wire
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Cause, Kind


def chain(seconds: float, head: int, role: Role = Role.REPORTING, ring: int = 4) -> Record:
    return Record(seconds, Kind.CHAIN, ring, wire.Chain(head, role, ()))


def answer(seconds: float, head: int, ring: int = 4) -> Record:
    return Record(seconds, Kind.ANSWER, ring, wire.Answer(head))


def taken(*records: Record) -> Latencies:
    latencies = Latencies()
    for record in records:
        latencies.take(record)
    return latencies


def test_a_report_takes_from_its_chain_to_its_answer() -> None:
    release = Record(1.2, Kind.RELEASE, 4, wire.Release(0, 4096, Cause.REPORT))
    latencies = taken(chain(1.0, 7), release, answer(1.5, 7), chain(2.0, 7), answer(2.25, 7))
    assert latencies.seconds == [pytest.approx(0.5), pytest.approx(0.25)]
    assert latencies.released_bytes == 4096


def test_other_queues_do_not_count() -> None:
    assert taken(chain(1.0, 7, Role.INFLATE, 0), answer(1.5, 7, 0)).seconds == []


def test_what_a_predecessor_had_in_hand_is_forgotten() -> None:
    guest = Record(1.1, Kind.GUEST, None, wire.Guest(1))
    assert taken(chain(1.0, 7), guest, answer(9.0, 7)).seconds == []
    started = Record(1.1, Kind.RING_STARTED, 4, wire.RingEvent(128, 0))
    assert taken(chain(1.0, 7), started, answer(9.0, 7)).seconds == []
    other = Record(1.1, Kind.RING_STARTED, 3, wire.RingEvent(128, 0))
    assert taken(chain(1.0, 7), other, answer(2.0, 7)).seconds == [pytest.approx(1.0)]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3.0], 0.5, 3.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0), ([4.0, 1.0, 3.0, 2.0], 0.99, 4.0),
     ([float(n) for n in range(1, 101)], 0.99, 99.0), ([1.0, 2.0], 1.0, 2.0)],
)  # fmt: skip
def test_a_quantile_is_a_value_that_so_many_do_not_exceed(
    values: list[float], share: float, expected: float | None
) -> None:
    assert quantile(values, share) == expected


def test_each_value_is_counted_once_below_its_bound() -> None:
    counted = histogram([0.0, BOUNDS[0], 0.00015, 0.3, 5.0])
    assert counted.bounds == list(BOUNDS)
    assert counted.counts[0] == 1
    assert counted.counts[1] == 2
    assert counted.counts[BOUNDS.index(0.5)] == 1
    assert counted.counts[-1] == 1
    assert sum(counted.counts) == 5
