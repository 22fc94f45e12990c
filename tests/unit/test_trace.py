"""The trace: what is written, that it is written before the act, and that it survives whatever ends the writer."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from balloonlab import cli
from balloonlab.decode import Record, describe, read_trace
from balloonlab.errors import UsageError
from balloonlab.trace_check import violations
from hostdev.balloon import Balloon
from hostdev.discard import Discarder
from hostdev.driver import Buffer
from hostdev.errors import SetupError
from hostdev.frontend import Frontend, start_device
from hostdev.memory import Region
from hostdev.metrics import Metrics
from hostdev.options import Options
from hostdev.trace import GROWTH, MAX_ENTRIES, MAX_RECORD, MAX_TRACE, TraceFile, begin_trace
from hostdev.wire import trace as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, Role
from hostdev.wire.trace import Cause, Kind
from hostdev.wire.virtqueue import Descriptor
from tests.in_process import InProcess

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("patience")


def kinds(path: Path) -> list[Kind]:
    return [record.kind for record in read_trace(path)]


def test_each_record_is_read_back(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t")
    trace.guest()
    trace.message(11, bytes(range(100)), 2)
    trace.ring(3, started=True, size=128, base=5)
    trace.chain(4, Role.REPORTING, 17, (Descriptor(MIB, 4 * MIB, 2, 0), Descriptor(2 * MIB, 1, 3, 4)))
    trace.release(4, Cause.REPORT, MIB, 4 * MIB, withheld=False)
    trace.release(0, Cause.INFLATE, 0, 4096, withheld=True)
    trace.answer(4, 17)
    trace.fault(None, "no more")
    trace.ring(3, started=False, size=0, base=6)
    trace.close()
    values = [(record.kind, record.ring, record.value) for record in read_trace(tmp_path / "t")]
    assert values == [
        (Kind.GUEST, None, wire.Guest(os.getpid())),
        (Kind.MESSAGE, None, wire.Message(11, 100, 2, bytes(range(76)))),
        (Kind.RING_STARTED, 3, wire.RingEvent(128, 5)),
        (Kind.CHAIN, 4, wire.Chain(17, 4, (wire.Entry(MIB, 4 * MIB, 2), wire.Entry(2 * MIB, 1, 3)))),
        (Kind.RELEASE, 4, wire.Release(MIB, 4 * MIB, Cause.REPORT)),
        (Kind.WITHHOLD, 0, wire.Release(0, 4096, Cause.INFLATE)),
        (Kind.ANSWER, 4, wire.Answer(17)),
        (Kind.FAULT, None, wire.Fault(b"no more")),
        (Kind.RING_STOPPED, 3, wire.RingEvent(0, 6)),
    ]


def test_sizes_are_those_that_the_writer_relies_on() -> None:
    assert wire.TRACE_HEADER.declaration.sizeof() == wire.TRACE_HEADER_SIZE
    before_used = wire.TRACE_HEADER.encode(wire.TraceHeader(wire.MAGIC, 1, 0, 0, 0))
    after = wire.TRACE_HEADER.encode(wire.TraceHeader(wire.MAGIC, 1, 0, 0, 1))
    assert [n for n in range(len(after)) if after[n] != before_used[n]] == [wire.USED_OFFSET]
    assert wire.USED_OFFSET % 8 == 0


def test_a_later_writer_goes_on_and_begin_starts_anew(tmp_path: Path) -> None:
    for _ in range(2):
        trace = TraceFile(tmp_path / "t")
        trace.answer(1, 2)
        trace.close()
    assert kinds(tmp_path / "t") == [Kind.ANSWER, Kind.ANSWER]
    begin_trace(tmp_path / "t")
    assert kinds(tmp_path / "t") == []


def test_it_grows_and_then_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostdev.trace.GROWTH", 256)
    monkeypatch.setattr("hostdev.trace.MAX_TRACE", 1024)
    monkeypatch.setattr("hostdev.trace.MAX_RECORD", 100)
    assert MAX_TRACE > 1024
    trace = TraceFile(tmp_path / "t")
    for head in range(200):
        trace.answer(1, head)
    trace.close()
    heads = [record.value.head for record in read_trace(tmp_path / "t")]
    assert heads == list(range(len(heads)))
    assert len(heads) == (1024 - 100 - wire.TRACE_HEADER_SIZE) // (wire.RECORD_HEADER_SIZE + 2) + 1


def test_what_is_mapped_is_on_the_disk(tmp_path: Path) -> None:
    """All of it, after each growth: a worker that writes where a full disk has no block dies of SIGBUS."""
    path = tmp_path / "t"
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), MIB)
        sparse = os.fstat(file.fileno()).st_blocks
        os.posix_fallocate(file.fileno(), 0, MIB)
        if sparse * 512 >= MIB or os.fstat(file.fileno()).st_blocks * 512 < MIB:
            pytest.skip(
                "not run: the file system under the folder for temporary files does not tell of holes"
            )
    path.unlink()
    trace = TraceFile(path)
    for steps in (1, 2, 3):
        while trace._size < steps * GROWTH:
            trace.chain(4, Role.REPORTING, 1, (Descriptor(MIB, MIB, 2, 0),) * MAX_ENTRIES)
        status = path.stat()
        assert status.st_size == trace._size == steps * GROWTH
        assert status.st_blocks * 512 >= status.st_size
    trace.close()


def test_a_full_trace_has_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a record was left out, no smaller one is written after it, by this process or a later one."""
    monkeypatch.setattr("hostdev.trace.GROWTH", 256)
    monkeypatch.setattr("hostdev.trace.MAX_TRACE", 1024)
    monkeypatch.setattr("hostdev.trace.MAX_RECORD", 100)
    for _ in range(2):
        trace = TraceFile(tmp_path / "t")
        for number in range(100):
            trace.fault(number, "x" * 60)
            trace.answer(number, number)
        trace.close()
    told = [(record.ring, record.kind) for record in read_trace(tmp_path / "t")]
    whole = [(number, kind) for number in range(100) for kind in (Kind.FAULT, Kind.ANSWER)]
    assert told == whole[: len(told)]
    assert len(told) > 10


def test_a_full_disk_is_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Room is made on the disk before it is mapped, where its lack is an error and no SIGBUS. What was written stays."""
    trace = TraceFile(tmp_path / "t")
    trace.answer(1, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (GROWTH + 4096, before[1]))
    try:
        while "the trace is full" not in caplog.text:
            trace.fault(None, "a fault that takes its place")
        trace.answer(1, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trace.close()
    assert (tmp_path / "t").stat().st_size <= GROWTH
    found = kinds(tmp_path / "t")
    assert (found[0], set(found[1:])) == (Kind.ANSWER, {Kind.FAULT})
    assert len(caplog.records) == 1


def test_the_longest_record_is_no_longer_than_that(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t")
    trace.chain(4, Role.REPORTING, 1, (Descriptor(MIB, MIB, 2, 0),) * (MAX_ENTRIES + 1))
    trace.close()
    used = (tmp_path / "t").stat().st_size - wire.TRACE_HEADER_SIZE
    assert used == wire.RECORD_HEADER_SIZE + 3 + MAX_ENTRIES * wire.ENTRY_STRUCT.size
    assert used <= MAX_RECORD


@pytest.mark.parametrize("content", [b"something else entirely, and long enough for a header", b"short"])
def test_what_is_no_trace_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(SetupError, match="no trace"):
        begin_trace(tmp_path / "t")
    with pytest.raises(UsageError, match="no trace"):
        list(read_trace(tmp_path / "t"))
    assert (tmp_path / "t").read_bytes() == content


def test_damage_is_named(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t")
    trace.answer(1, 2)
    trace.close()
    data = bytearray((tmp_path / "t").read_bytes())
    data[wire.TRACE_HEADER_SIZE] = 200
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        list(read_trace(tmp_path / "t"))


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Kind.RELEASE, wire.RELEASE.encode(wire.Release(0, 4096, 3))),
        (Kind.CHAIN, wire.CHAIN.encode(wire.Chain(0, 5, ()))),
    ],
)
def test_a_cause_or_a_role_that_there_is_none_of_is_damage(
    tmp_path: Path, kind: Kind, payload: bytes
) -> None:
    trace = TraceFile(tmp_path / "t")
    trace._write(kind, 0, payload)
    trace.close()
    with pytest.raises(UsageError, match="damaged"):
        list(read_trace(tmp_path / "t"))


@pytest.mark.parametrize("used", [0, wire.TRACE_HEADER_SIZE - 1, wire.TRACE_HEADER_SIZE + 1, (1 << 64) - 1])
def test_a_trace_that_lies_of_its_length_is_not_gone_on_with(tmp_path: Path, used: int) -> None:
    header = wire.TraceHeader(wire.MAGIC, wire.FORMAT, 0, 0, used)
    (tmp_path / "t").write_bytes(wire.TRACE_HEADER.encode(header))
    with pytest.raises(SetupError, match="damaged"):
        TraceFile(tmp_path / "t")


def test_a_fault_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t")
    trace.fault(0, "\x1b[2J\n\u00e9")
    trace.close()
    (line,) = (describe(record) for record in read_trace(tmp_path / "t"))
    assert line.endswith("fault: \\x1b[2J\\n\u00e9")


def report(path: Path, *, kill: bool) -> list[Record]:
    with start_device(Options(trace_file=path)) as device, Frontend(device.connect()) as frontend:
        frontend.start()
        ring = frontend.rings[Role.REPORTING]
        for _ in range(2):
            head = ring.offer(
                [Buffer(8 * MIB, 4 * MIB, writable=True), Buffer(16 * MIB, 2 * MIB, writable=True)]
            )
            assert ring.wait_used(head) == 0
        if kill:
            for worker in device.workers():
                os.kill(worker, signal.SIGKILL)
            frontend.read_config()  # its successor answers
    return list(read_trace(path))


@pytest.mark.parametrize("kill", [False, True])
def test_the_story_of_each_report_is_told(tmp_path: Path, *, kill: bool) -> None:
    """Chain, its releases, its answer: in this order, and all there when the writer was killed after the answer.

    Its successor goes on in the same file.
    """
    records = report(tmp_path / "t", kill=kill)
    story = [(record.kind, record.value) for record in records if record.ring == Role.REPORTING]
    assert story.pop() == (Kind.RING_STOPPED, wire.RingEvent(0, 2))
    if kill:
        assert story.pop() == (Kind.RING_STARTED, wire.RingEvent(128, 2))
    assert story[0] == (Kind.RING_STARTED, wire.RingEvent(128, 0))
    one = [
        Kind.CHAIN,
        Kind.RELEASE,
        Kind.RELEASE,
        Kind.ANSWER,
    ]
    assert [kind for kind, _value in story[1:]] == one * 2
    releases = [value for kind, value in story if kind is Kind.RELEASE]
    assert releases[:2] == [wire.Release(8 * MIB, 4 * MIB, 1), wire.Release(16 * MIB, 2 * MIB, 1)]
    requests = [record.value.request for record in records if record.kind is Kind.MESSAGE]
    assert requests[:3] == [1, 15, 16]
    text = "\n".join(describe(record) for record in records)
    assert "reporting: chain 0, 2 buffers, 6.0 MiB" in text
    assert "release  0x000000800000 + 4.0 MiB (report)" in text
    assert "GET_FEATURES (1), 0 bytes" in text


class Looking(Discarder):
    """Looks into the trace before it gives anything back."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.seen: list[int] = []

    def release(self, region: Region, offset: int, length: int) -> None:
        self.seen.append(kinds(self.path).count(Kind.RELEASE))
        super().release(region, offset, length)


def test_a_release_is_traced_before_it_happens(tmp_path: Path) -> None:
    """What is not in the trace has not happened: the discarder finds its own record there already."""
    discarder = Looking(tmp_path / "t")
    with InProcess() as guest:
        guest.start()
        layout = guest.balloon.rings.started[Role.REPORTING].layout
        trace = TraceFile(tmp_path / "t")
        balloon = Balloon(DEFAULT_FEATURES, discarder, Metrics(), trace)
        balloon.set_features(DEFAULT_FEATURES)
        balloon.set_memory(guest.session.memory)
        balloon.start_ring(Role.REPORTING, layout, 0)
        entries = [Buffer(8 * MIB, MIB, writable=True), Buffer(16 * MIB, MIB, writable=True)]
        guest.rings[Role.REPORTING].add(entries)
        while balloon.service(Role.REPORTING).more:
            pass
        balloon.stop_ring(Role.REPORTING)
        trace.close()
    assert discarder.seen == [1, 2]


@pytest.mark.parametrize("kill", [False, True])
def test_a_trace_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str], *, kill: bool) -> None:
    """A real one passes; with one entry of a chain moved it does not."""
    path = tmp_path / "t"
    report(path, kill=kill)
    assert cli.main(["decode", "--check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "2 chains returned, 12 MiB given back in 4 pieces" in said
    assert f"{1 + kill} worker processes: no violations" in said
    named = wire.ENTRY_STRUCT.pack(16 * MIB, 2 * MIB, 2)
    path.write_bytes(path.read_bytes().replace(named, wire.ENTRY_STRUCT.pack(24 * MIB, 2 * MIB, 2), 1))
    assert cli.main(["decode", "--check", str(path)]) == 1
    said = capsys.readouterr().out
    assert "ring 4: 0x1000000 + 0x200000 is in none of the buffers of a chain in hand" in said
    assert "1 violations" in said


def test_a_chain_that_cannot_be_used_is_faulted_before_it_is_returned(tmp_path: Path) -> None:
    with start_device(Options(trace_file=tmp_path / "t")) as device, Frontend(device.connect()) as frontend:
        frontend.start()
        ring = frontend.rings[Role.REPORTING]
        head = ring.add([Buffer(8 * MIB, MIB, writable=True)])
        ring.write_descriptor(head, Descriptor(8 * MIB, MIB, 1, head))
        ring.notify()
        assert ring.wait_used(head) == 0
    story = [record.kind for record in read_trace(tmp_path / "t") if record.ring == Role.REPORTING]
    assert story == [Kind.RING_STARTED, Kind.FAULT, Kind.ANSWER, Kind.RING_STOPPED]
    assert violations(read_trace(tmp_path / "t")) == []
