"""The guest's statistics: how a buffer is read, when the guest is asked, what is told of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hostdev.driver import Buffer
from hostdev.statistics import ABSENT
from hostdev.wire.balloon import STATISTIC, STATISTIC_NAMES, Role, Statistic
from tests.qtest.bench import FREE, LIST, PAGE, Bench

ALL = [(tag, 1000 + tag) for tag in range(len(STATISTIC_NAMES))]
AWAY = LIST + 2 * PAGE


def encoded(pairs: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(STATISTIC.encode(Statistic(*pair)) for pair in pairs)


def offer(bench: Bench, data: bytes, cuts: Sequence[int] = ()) -> int:
    """Queue a statistics buffer, cut into descriptors at the given bytes, and wait until the device has seen it."""
    buffers = []
    for number, (start, end) in enumerate(zip((0, *cuts), (*cuts, len(data)), strict=True)):
        at = AWAY + number * PAGE
        bench.qtest.write(at, data[start:end])
        buffers.append(Buffer(at, end - start))
    head = bench.rings[Role.STATISTICS].offer(buffers)
    # Rings are served in order, so that an answer on the first one says that the third was looked at.
    bench.send_pages(Role.INFLATE, [FREE])
    bench.send_pages(Role.INFLATE, [FREE])
    return head


def named(pairs: Sequence[tuple[int, int]]) -> dict[str, int]:
    known = {STATISTIC_NAMES[tag]: value for tag, value in pairs if tag < len(STATISTIC_NAMES)}
    return dict.fromkeys(STATISTIC_NAMES, ABSENT) | known


def is_asked(bench: Bench, head: int) -> int:
    """Wait until the buffer comes back: the device asks. Returns its used length."""
    ring = bench.rings[Role.STATISTICS]
    bench.wait_until(lambda: _step(bench) or bool(ring.used_index), "the guest is not asked")
    return ring.wait_used(head)


def _step(bench: Bench) -> bool:
    bench.pass_time(0.001)
    return False


def test_before_any_answer(bench: Bench) -> None:
    bench.drive()
    assert set(bench.statistics()) == set(STATISTIC_NAMES)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(ALL), ALL),
        (encoded(list(reversed(ALL))), ALL),
        (encoded([(4, 1), (5, 2), (4, 3)]), [(4, 3), (5, 2)]),
        (encoded([(16, 1), (0xFFFF, 2), (0, 3)]), [(0, 3)]),
        (encoded([(4, 1), (5, 2)]) + b"\4\0rest", [(4, 1), (5, 2)]),
        (encoded([(4, ABSENT), (5, 0)]), [(4, ABSENT), (5, 0)]),
        (b"\4\0\1", []),
    ],
    ids=[
        "all",
        "in another order",
        "a tag twice",
        "unknown tags",
        "an odd length",
        "extremes",
        "less than one",
    ],
)
def test_how_a_buffer_is_read(bench: Bench, data: bytes, expected: list[tuple[int, int]]) -> None:
    bench.drive()
    offer(bench, data)
    assert bench.statistics() == named(expected)


@pytest.mark.parametrize("cut", [1, 2, 10, 15])
def test_a_buffer_in_pieces(bench: Bench, cut: int) -> None:
    bench.drive()
    offer(bench, encoded(ALL[:3]), [cut])
    assert bench.statistics() == named(ALL[:3])


def test_what_an_answer_leaves_out_is_no_longer_known(bench: Bench) -> None:
    bench.drive()
    offer(bench, encoded(ALL))
    offer(bench, encoded(ALL[3:5]))
    assert bench.statistics() == named(ALL[3:5])


def test_polling(bench: Bench) -> None:
    bench.drive()
    first = offer(bench, encoded(ALL[:2]))
    assert bench.rings[Role.STATISTICS].used_index == 0
    assert bench.command("qom-set", bench.set_interval(1)) == {}
    bench.pass_time(0.001)
    assert is_asked(bench, first) == 0
    second = offer(bench, encoded(ALL))
    assert bench.statistics() == named(ALL)
    bench.pass_time(1.001)
    assert bench.rings[Role.STATISTICS].wait_used(second) == 0


def test_polling_waits_for_the_guest(bench: Bench) -> None:
    """Without an answer there is no second question, however long it takes."""
    bench.drive()
    first = offer(bench, encoded(ALL))
    bench.command("qom-set", bench.set_interval(1))
    is_asked(bench, first)
    bench.pass_time(5)
    bench.send_pages(Role.INFLATE, [FREE])
    assert bench.rings[Role.STATISTICS].used_index == 1
    assert bench.statistics() == named(ALL)


def test_polling_goes_on_after_a_pause(bench: Bench) -> None:
    bench.drive()
    head = offer(bench, encoded(ALL))
    bench.qmp("stop")
    bench.command("qom-set", bench.set_interval(1))
    bench.qmp("cont")
    assert is_asked(bench, head) == 0


def test_the_last_answer_outlives_polling_and_reset(bench: Bench) -> None:
    bench.drive()
    bench.command("qom-set", bench.set_interval(1))
    is_asked(bench, offer(bench, encoded(ALL)))
    bench.command("qom-set", bench.set_interval(0))
    bench.device.reset()
    assert bench.statistics() == named(ALL)


def test_polling_goes_on_after_a_reset(bench: Bench) -> None:
    bench.drive()
    bench.command("qom-set", bench.set_interval(1))
    is_asked(bench, offer(bench, encoded(ALL)))
    bench.device.reset()
    bench.drive()
    head = offer(bench, encoded(ALL[:1]))
    bench.pass_time(1.001)
    assert is_asked(bench, head) == 0
    assert bench.statistics() == named(ALL[:1])


@pytest.mark.parametrize("value", [-1, -(1 << 62), 1 << 32, 1 << 62, 1 << 70, "2", 1.5, True, None, [], {}])
def test_intervals_refused_in_the_same_words(bench: Bench, value: object) -> None:
    name = "guest-stats-polling-interval"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        small = "timer value must be greater than zero"
        expected = small if value < 0 else "timer value is too big"
    else:
        expected = f"Invalid parameter type for '{name}', expected: integer"
    assert bench.refused("qom-set", bench.set_interval(value)) == f"GenericError: {expected}"


def test_the_largest_interval(bench: Bench) -> None:
    assert bench.command("qom-set", bench.set_interval((1 << 32) - 1)) == {}
    arguments = bench.set_interval(0)
    del arguments["value"]
    assert bench.command("qom-get", arguments) == (1 << 32) - 1
