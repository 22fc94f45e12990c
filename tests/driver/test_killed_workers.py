"""A worker that is killed at any single line of what it does: the outcome is the one without the kill.

A scenario is a round of something that guest, front end or people ask of the device, and what there is to be seen of it. It
runs once unharmed, which tells how many lines it takes, and then once for each of them with the worker killed there. Seen
are used rings, memory, config space, replies, the counters and what a successor would go on with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostdev.driver import DEADLINE, Buffer, FrontendError
from hostdev.metrics import Sample
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import COMMAND_ID_STRUCT, PFN_STRUCT, STATISTIC_STRUCT, Config, Role
from hostdev.wire.vhost_user import Request
from tests.dying import NEVER, Mortal, mortal
from tests.in_process import MIB, PAGE

# None is late but who died: traced, and on a machine with more to do, others take their time.
pytestmark = pytest.mark.usefixtures("patience")

Scenario = Callable[[Mortal], object]

# Kills of one scenario in the default tier, spread over it; all of them in the full tier.
SOME = 40

FILL = b"\xaa" * PAGE
AT = 8 * MIB


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN201
    with mortal(monkeypatch, tmp_path) as device:
        device.guest.start()
        _offer_statistics(device, 1)
        yield device
    assert list(tmp_path.iterdir()) == []


# Scenarios


def _held(device: Mortal, addresses: list[int]) -> list[bool]:
    """Which of these pages still have what was written to them."""
    return [device.guest.memory.read(address, PAGE) == FILL for address in addresses]


def _fill(device: Mortal, addresses: list[int]) -> None:
    for address in addresses:
        device.guest.memory.write(address, FILL)


def report(device: Mortal) -> object:
    """Two ranges, the second of them with live neighbours."""
    pages = [AT, AT + 2 * MIB - PAGE, AT + 3 * MIB, AT + 4 * MIB, AT + 4 * MIB + PAGE]
    _fill(device, pages)
    ring = device.guest.rings[Role.REPORTING]
    head = ring.offer([Buffer(AT, 2 * MIB, writable=True), Buffer(AT + 4 * MIB, PAGE, writable=True)])
    return ring.wait_used(head), _held(device, pages)


def inflate(device: Mortal) -> object:
    """More scattered pages than one slice has, then some of them given back to the guest."""
    pages = [AT + 2 * PAGE * index for index in range(300)]
    _fill(device, pages)
    pfns = b"".join(PFN_STRUCT.pack(page // PAGE) for page in pages)
    device.guest.memory.write(MIB * 4, pfns)
    inflating, deflating = (device.guest.rings[role] for role in (Role.INFLATE, Role.DEFLATE))
    inflated = inflating.wait_used(inflating.offer([Buffer(MIB * 4, len(pfns))]))
    deflated = deflating.wait_used(deflating.offer([Buffer(MIB * 4, 40)]))
    return inflated, deflated, any(_held(device, pages))


def broken_chain(device: Mortal) -> object:
    """A chain that breaks the rules, between two that do not."""
    ring = device.guest.rings[Role.INFLATE]
    wrong = ring.offer([Buffer(1 << 60, 4)])
    return ring.wait_used(wrong), report(device)


def _offer_statistics(device: Mortal, value: int) -> None:
    device.guest.memory.write(5 * MIB, STATISTIC_STRUCT.pack(4, value))
    device.guest.rings[Role.STATISTICS].offer([Buffer(5 * MIB, 10)])


def _asked(device: Mortal, name: str, play: Callable[[], None], **arguments: object) -> Any:  # noqa: ANN401
    """Have a client ask, and play the guest until it is answered: one whose worker dies may be asked twice."""
    device.client.send(name, **arguments)
    device.client.connection.setblocking(False)
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end:
            play()
            with contextlib.suppress(BlockingIOError):
                return device.client.answer()["return"]
    finally:
        device.client.connection.settimeout(DEADLINE)
    raise FrontendError("no answer")


def statistics(device: Mortal) -> object:
    """A client asks, the guest gets its buffer back, and answers."""
    ring = device.guest.rings[Role.STATISTICS]
    lengths = set()

    def play() -> None:
        for _head, length in ring.take_used():
            lengths.add(length)
            _offer_statistics(device, 77)

    answer = _asked(device, "query-balloon-stats", play, refresh=True)
    return lengths, answer["stats"]["stat-free-memory"], answer["unknown"]


def hinting(device: Mortal) -> object:
    """A round of hints: opened by a client, begun and ended by the guest."""
    ring = device.guest.rings[Role.FREE_PAGE_HINT]
    seen = {device.guest.read_config().free_page_hint_cmd_id}

    def play() -> None:
        shown = device.guest.read_config().free_page_hint_cmd_id
        device.told()
        if shown > 1 and shown not in seen:
            seen.add(shown)
            ring.wait_used(ring.offer([_id(device, shown)]))
            ring.wait_used(ring.offer([Buffer(AT, 4 * MIB, writable=True)]))
            ring.wait_used(ring.offer([_id(device, 0)]))

    answer = _asked(device, "estimate-free", play)
    device.told()
    return (
        answer["bytes"],
        answer["blocks"],
        answer["complete"],
        device.guest.read_config().free_page_hint_cmd_id,
    )


def _id(device: Mortal, value: int) -> Buffer:
    device.guest.memory.write(6 * MIB, COMMAND_ID_STRUCT.pack(value))
    return Buffer(6 * MIB, 4)


def target(device: Mortal) -> object:
    """A client sets a target; the front end is told, reads it, and the driver says that it has followed."""
    _answer, told = device.ask("set-target", size=60 * MIB)
    config = device.guest.read_config()
    told += device.told()
    device.guest.write_config(Config(config.num_pages, config.num_pages, 0, 0))
    after = device.guest.read_config()
    device.ask("set-target", size=64 * MIB)
    device.guest.write_config(Config(0, 0, 0, 0))
    return config.num_pages, 2 in told, after.actual == config.num_pages


def pause(device: Mortal) -> object:
    """Stop every ring, take the memory away and give it back, and go on."""
    guest = device.guest
    before = [ring.used_index for ring in guest.rings]
    bases = guest.stop()
    region = guest.memory.regions[0]
    removed = guest.request(Request.REM_MEM_REG, wire.SingleRegion(0, region), need_reply=True)
    again = guest.request(Request.REM_MEM_REG, wire.SingleRegion(0, region), need_reply=True)
    guest.add_memory()
    guest.resume(bases=bases)
    ahead = [(bases[ring.index] - used) & 0xFFFF for ring, used in zip(guest.rings, before, strict=True)]
    return removed, again, ahead, report(device)


def beginning(device: Mortal) -> object:
    """All that QEMU sends from the first message on, once more: SET_OWNER begins a session anew."""
    guest = device.guest
    bases = guest.stop()
    guest.negotiate()
    device.told()
    guest.resume(bases=bases, first=True)
    return sorted(bases), report(device)


def succession(device: Mortal) -> object:
    """A worker is killed with a chain and a message in hand, and so is its successor, from its first line on."""
    pages = [AT, AT + 2 * MIB]
    _fill(device, pages)
    worker = device.worker()
    os.kill(worker, signal.SIGSTOP)
    ring = device.guest.rings[Role.REPORTING]
    head = ring.offer([Buffer(AT, 2 * MIB, writable=True)])
    device.guest.send_raw(wire.message(Request.GET_QUEUE_NUM, 0, b""))
    os.kill(worker, signal.SIGKILL)
    reply = device.guest.receive()
    return reply, ring.wait_used(head), _held(device, pages)


# What each of them comes to: a scenario in which nothing happens would survive anything.
_REPORTED = (0, [False, False, True, False, True])
SCENARIOS: dict[Scenario, object] = {
    report: _REPORTED,
    inflate: (0, 0, False),
    broken_chain: (0, _REPORTED),
    statistics: ({0}, 77, []),
    hinting: (4 * MIB, 1, True, 1),
    target: (1024, True, True),
    pause: (0, 1, [0] * 5, _REPORTED),
    beginning: ([0, 1, 2, 3, 4], _REPORTED),
    succession: ((wire.Header(Request.GET_QUEUE_NUM, 5, 8), (5).to_bytes(8, "little")), 0, [False, True]),
}


def _settled(device: Mortal) -> tuple[dict[tuple[str, tuple[str, ...]], int], object]:
    """The counters, and the state as far as it is the same after each round."""
    device.guest.read_config()
    seen = device.seen()
    image = seen.image
    rings = [(ring.enabled, ring.started, ring.place, ring.base) for ring in image.rings]
    state = (
        image.session.features,
        image.session.protocol_features,
        len(image.regions),
        rings,
        image.why_inert,
        image.device.inhibited,
        image.device.hinting,
        image.figures,
    )
    return seen.counters, state


# As many as it takes: looks at config space, and what a guest that is asked twice answers.
_VARYING = (
    ("messages_total", ("GET_CONFIG",)),
    *(
        (family, (queue,))
        for family in ("buffers_total", "chains_total")
        for queue in ("statistics", "free_page_hint")
    ),
)


@dataclass(frozen=True)
class Round:
    """All that there is to be seen of one."""

    outcome: object
    counters: dict[Sample, int]
    state: object


def _round(device: Mortal, scenario: Scenario, line: int) -> tuple[list[int], Round]:
    """Run a scenario once with a kill at a line. Returns the places of the lines that there were, and what was seen."""
    before, _state = _settled(device)
    device.doom.arm(line)
    outcome = scenario(device)
    lines = device.doom.disarm()
    after, state = _settled(device)
    # What a pause has dropped begins again.
    grown = {
        sample: count - before.get(sample, 0)
        for sample, count in after.items()
        if sample not in _VARYING and sample[0] not in ("ring_chains", "region_bytes")
    }
    return lines, Round(outcome, {sample: count for sample, count in grown.items() if count}, state)


def _steps(places: list[int]) -> list[int]:
    """Where to kill: before the first, the second and the last of each place's lines."""
    found: dict[int, list[int]] = {}
    for line, place in enumerate(places, 1):
        found.setdefault(place, []).append(line)
    return sorted({line for lines in found.values() for line in (*lines[:2], lines[-1])})


def _walk(device: Mortal, scenario: Scenario, most: int = NEVER) -> int:
    """Kill at each step, or at so many of them, and compare. Returns how many there were."""
    _round(device, scenario, NEVER)  # the first round may find what later ones do not
    places, unharmed = _round(device, scenario, NEVER)
    assert unharmed.outcome == SCENARIOS[scenario]
    steps = _steps(places)
    steps = steps[:: -(-len(steps) // most)]
    for line in steps:
        _places, seen = _round(device, scenario, line)
        assert seen == unharmed, f"killed at line {line} of {len(places)}"
    return len(steps)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_killed_at_many_lines(device: Mortal, scenario: Scenario) -> None:
    steps = _walk(device, scenario, SOME)
    # Not as many: a round that goes another way has fewer lines.
    assert device.doom.kills > 0.5 * steps > 10


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_killed_at_every_line(
    device: Mortal, scenario: Scenario, record_property: Callable[[str, object], None]
) -> None:
    steps = _walk(device, scenario)
    record_property("kills", device.doom.kills)
    assert device.doom.kills > 0.5 * steps > 10
