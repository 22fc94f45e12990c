"""Properties of the checker of traces, on those of a model device that serves rings, and whose workers are killed.

1. It finds nothing wrong with what the model does: chains taken, given back in pieces and returned; bad chains faulted and
   returned; rings stopped and started; workers killed between any two records, their successors going on from the used
   index, which may be one behind the last answer.
2. Each of many single changes that a broken device would make is found, wherever it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from balloonlab.decode import Record
from balloonlab.trace_check import TraceCheck, violations
from hostdev.wire import trace as wire
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Cause, Kind

MIB = 1 << 20
PAGE = 4096
WRITABLE = 2
ROLES = {0: Role.INFLATE, 2: Role.STATISTICS, 4: Role.REPORTING}
CAUSES = {Role.INFLATE: Cause.INFLATE, Role.REPORTING: Cause.REPORT}


@dataclass
class Model:
    """Writes the trace of a device that does all right. used: published indices, which outlive a worker."""

    draw: st.DataObject
    records: list[Record] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def tell(self, kind: Kind, ring: int | None, value: Any) -> None:  # noqa: ANN401
        self.records.append(Record(len(self.records) / 1e6, kind, ring, value))

    def pick(self, limit: int) -> int:
        return self.draw.draw(st.integers(0, limit - 1))

    def message(self) -> None:
        self.tell(Kind.MESSAGE, None, wire.Message(1, 0, 0, b""))

    def begin(self) -> None:
        self.tell(Kind.GUEST, None, wire.Guest(1))
        self.message()
        for ring in ROLES:
            self.used[ring] = self.pick(1 << 16)
            self.start(ring)

    def start(self, ring: int) -> None:
        self.tell(Kind.RING_STARTED, ring, wire.RingEvent(128, self.used[ring]))

    def stop(self, ring: int) -> None:
        self.tell(Kind.RING_STOPPED, ring, wire.RingEvent(0, self.used[ring]))
        self.held.pop(ring, None)

    def restart(self) -> None:
        self.message()
        ring = self.draw.draw(st.sampled_from(list(ROLES)))
        self.stop(ring)
        self.used[ring] = self.draw.draw(st.sampled_from([0, self.used[ring]]))
        self.start(ring)

    def answer(self, ring: int, head: int) -> None:
        self.tell(Kind.ANSWER, ring, wire.Answer(head))
        self.used[ring] = (self.used[ring] + 1) & 0xFFFF

    def serve(self) -> None:
        """One chain, to its end or to the death of the worker."""
        ring = self.draw.draw(st.sampled_from(list(ROLES)))
        role, head = ROLES[ring], self.pick(100) + 2 * (self.held.get(ring) or 0)
        steps = list(self.steps(ring, role, head))
        alive = self.pick(4) or self.pick(len(steps) + 1) == len(steps)
        for step in steps if alive else steps[: self.pick(len(steps) + 1)]:
            step()
        if not alive:
            self.die()

    def steps(self, ring: int, role: Role, head: int) -> Iterator[Callable[[], None]]:
        if self.pick(6) == 0:
            yield lambda: self.tell(Kind.FAULT, ring, wire.Fault(b"a chain that cannot be used"))
            if ring in self.held:
                yield lambda: self.answer(ring, self.held.pop(ring))
            yield lambda: self.answer(ring, head)
            return
        entries = tuple(wire.Entry(MIB * (8 + 4 * n), MIB, WRITABLE) for n in range(1 + self.pick(3)))
        yield lambda: self.tell(Kind.CHAIN, ring, wire.Chain(head, role, entries))
        if role is Role.STATISTICS:
            previous = self.held.get(ring)
            if previous is not None:
                yield lambda: self.answer(ring, previous)
            yield lambda: self.held.update({ring: head})
            return
        for entry in entries:
            piece = wire.Release(entry.address + PAGE, entry.length - PAGE, CAUSES[role])
            yield lambda piece=piece: self.tell(Kind.RELEASE, ring, piece)  # type: ignore[misc]
        yield lambda: self.answer(ring, head)

    def die(self) -> None:
        """The worker was killed: maybe between its last answer's record and the act."""
        last = self.records[-1]
        if last.kind is Kind.ANSWER and last.ring is not None and self.pick(2):
            self.used[last.ring] = (self.used[last.ring] - 1) & 0xFFFF
        self.held.clear()
        for _ in range(1 + self.pick(2)):
            self.tell(Kind.GUEST, None, wire.Guest(2))
        for ring in ROLES:
            self.start(ring)

    def end(self) -> None:
        for ring in ROLES:
            self.stop(ring)


@st.composite
def _model(draw: st.DrawFn) -> list[Record]:
    model = Model(draw(st.data()))
    model.begin()
    for _ in range(draw(st.integers(1, 25))):
        if draw(st.integers(0, 9)):
            model.serve()
        else:
            model.restart()
    model.end()
    return model.records


TRACES = _model()


@given(TRACES)
def test_what_a_right_device_does_is_right(trace: list[Record]) -> None:
    check = TraceCheck()
    assert violations(trace, check) == []
    assert check.releases == sum(record.kind is Kind.RELEASE for record in trace)


# Single changes. Each takes a trace and the place of a record of its kind.


def drop(trace: list[Record], at: int) -> None:
    del trace[at]


def double(trace: list[Record], at: int) -> None:
    trace.insert(at, trace[at])


def shift(trace: list[Record], at: int) -> None:
    value = trace[at].value
    trace[at] = replace(trace[at], value=replace(value, address=value.address - 2 * PAGE))


def lengthen(trace: list[Record], at: int) -> None:
    value = trace[at].value
    trace[at] = replace(trace[at], value=replace(value, length=value.length + PAGE))


def other_ring(trace: list[Record], at: int) -> None:
    trace[at] = replace(trace[at], ring=2)


def other_cause(trace: list[Record], at: int) -> None:
    value = trace[at].value
    trace[at] = replace(trace[at], value=replace(value, cause=3 - value.cause))


def no_cause(trace: list[Record], at: int) -> None:
    trace[at] = replace(trace[at], value=replace(trace[at].value, cause=0))


def late(trace: list[Record], at: int) -> None:
    """Given back only after the chain was returned."""
    answer = next((n for n in range(at, len(trace)) if trace[n].kind is Kind.ANSWER), None)
    is_same = answer is not None and all(trace[n].kind is Kind.RELEASE for n in range(at, answer))
    assume(is_same and answer is not None)
    trace.insert(answer or 0, trace.pop(at))


def other_base(trace: list[Record], at: int) -> None:
    value = trace[at].value
    trace[at] = replace(trace[at], value=replace(value, base=(value.base + 1) & 0xFFFF))


def early_base(trace: list[Record], at: int) -> None:
    value = trace[at].value
    trace[at] = replace(trace[at], value=replace(value, base=(value.base - 2) & 0xFFFF))


def other_head(trace: list[Record], at: int) -> None:
    trace[at] = replace(trace[at], value=wire.Answer(trace[at].value.head ^ 0x4000))


def read_only(trace: list[Record], at: int) -> None:
    """The driver says what it has, it does not offer it."""
    value = trace[at].value
    entries = tuple(replace(entry, flags=0) for entry in value.entries)
    trace[at] = replace(trace[at], value=replace(value, entries=entries))


def is_reported(trace: list[Record], at: int) -> bool:
    return trace[at].kind is Kind.RELEASE and trace[at].ring == Role.REPORTING


def is_released(trace: list[Record], at: int) -> bool:
    return trace[at].kind is Kind.RELEASE


def is_answered(trace: list[Record], at: int) -> bool:
    """An answer that certainly happened, for its worker went on; and of a chain that was taken."""
    follows = trace[at + 1].kind is not Kind.GUEST if at + 1 < len(trace) else False
    return trace[at].kind is Kind.ANSWER and follows and not is_bad(trace, at)


def is_bad(trace: list[Record], at: int) -> bool:
    """Of a chain that could not be used, or near one: the checker lets one such answer pass."""
    return any(record.kind is Kind.FAULT for record in trace[max(0, at - 2) : at])


def is_stopped(trace: list[Record], at: int) -> bool:
    return trace[at].kind is Kind.RING_STOPPED


def is_resumed(trace: list[Record], at: int) -> bool:
    begins = [n for n in range(at) if trace[n].kind in (Kind.GUEST, Kind.MESSAGE)]
    return trace[at].kind is Kind.RING_STARTED and bool(begins) and trace[begins[-1]].kind is Kind.GUEST


def is_answered_chain(trace: list[Record], at: int) -> bool:
    return trace[at].kind is Kind.CHAIN and at + 1 < len(trace) and trace[at + 1].kind is Kind.RELEASE


def is_released_chain(trace: list[Record], at: int) -> bool:
    return is_answered_chain(trace, at) and trace[at].ring == Role.REPORTING


CHANGES = [
    (drop, is_answered),
    (drop, is_answered_chain),
    (drop, is_stopped),
    (double, is_answered),
    (double, is_answered_chain),
    (double, is_stopped),
    (other_head, is_answered),
    (shift, is_reported),
    (lengthen, is_reported),
    (other_ring, is_released),
    (other_cause, is_released),
    (no_cause, is_released),
    (late, is_released),
    (other_base, is_stopped),
    (other_base, is_resumed),
    (early_base, is_resumed),
    (read_only, is_released_chain),
]


@pytest.mark.parametrize(("change", "suits"), CHANGES, ids=lambda part: part.__name__)
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(TRACES, st.data())
def test_every_single_fault_is_found(
    change: Callable[[list[Record], int], None],
    suits: Callable[[list[Record], int], bool],
    trace: list[Record],
    data: st.DataObject,
) -> None:
    places = [at for at in range(len(trace)) if suits(trace, at)]
    # A ring that stops at the end of the trace may as well go on: dropping that is no fault.
    if (change, suits) == (drop, is_stopped):
        places = [at for at in places if trace[at + 1 :] and trace[at + 1].kind is Kind.RING_STARTED]
    assume(places)
    change(trace, data.draw(st.sampled_from(places)))
    assert violations(trace) != []
