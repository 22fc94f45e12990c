"""What kills or hangs every worker that meets it: it is passed over in the end, and the front end gets its answers.

The faults are put into the device before it is forked: a release that kills or hangs, a message that does.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev import births, post, succession, worker
from hostdev.balloon import MAX_DEADLY
from hostdev.discard import Discarder
from hostdev.driver import DEADLINE, Buffer
from hostdev.fds import Fd
from hostdev.frontend import Frontend, start_device
from hostdev.memory import Region
from hostdev.options import Options
from hostdev.session import Session
from hostdev.vrings import Vrings
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import PFN_STRUCT, Config, Role
from hostdev.wire.vhost_user import Request
from tests.catalogue.acts import is_read
from tests.clock import KeepersClock
from tests.control_process import controlled, state
from tests.device_program import program, serves, wait_ended, wait_for, works
from tests.in_process import MIB, PAGE
from tests.killing import is_idle
from tests.upgradable import Edit, upgradable

DEADLY = 16 * MIB


def die(*_arguments: object) -> None:
    signal.raise_signal(signal.SIGKILL)


def hang(*_arguments: object) -> None:
    """As a process does that waits for what never comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    select.poll().poll()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Successors do not wait their turn, and nobody's last words are of interest."""
    monkeypatch.setattr(births, "STARTS_SECONDS", 0.0)
    monkeypatch.setattr(logging.getLogger("hostdev"), "level", logging.CRITICAL)


def deadly_release(monkeypatch: pytest.MonkeyPatch, act: Callable[..., None]) -> None:
    release = Discarder.release

    def released(self: Discarder, region: Region, offset: int, length: int) -> None:
        if offset >= DEADLY:
            act()
        release(self, region, offset, length)

    monkeypatch.setattr(Discarder, "release", released)


def offer(front: Frontend, address: int) -> int:
    """Report a page. Returns the used length, once it is answered."""
    ring = front.rings[Role.REPORTING]
    front.memory.write(address, b"\xaa" * PAGE)
    return ring.wait_used(ring.offer([Buffer(address, PAGE, writable=True)]))


def test_a_chain_that_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers die with it; then it is returned, nothing of it is released, and the next one is as ever."""
    deadly_release(monkeypatch, die)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        assert offer(front, DEADLY) == 0
        assert front.memory.read(DEADLY, PAGE) == b"\xaa" * PAGE
        works(front)


def test_chains_that_kill_on_two_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ring's is counted for itself, whichever of them it was that killed."""
    deadly_release(monkeypatch, die)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        inflating, reporting = front.rings[Role.INFLATE], front.rings[Role.REPORTING]
        front.memory.write(MIB, PFN_STRUCT.pack(DEADLY // PAGE))
        heads = (
            inflating.add([Buffer(MIB, 4)]),
            reporting.add([Buffer(DEADLY + MIB, PAGE, writable=True)]),
        )
        inflating.notify()
        reporting.notify()
        assert inflating.wait_used(heads[0]) == reporting.wait_used(heads[1]) == 0
        works(front)


def test_several_chains_that_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have in common is us: the device becomes inert, and stays so for every worker to come."""
    deadly_release(monkeypatch, die)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        for number in range(MAX_DEADLY):
            assert offer(front, DEADLY + number * MIB) == 0
        for _ in range(2):
            assert offer(front, 8 * MIB) == 0
            assert front.memory.read(8 * MIB, PAGE) == b"\xaa" * PAGE
            os.kill(device.workers()[0], signal.SIGKILL)


def test_a_chain_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has sent a message, so nobody waits for an answer: the worker itself has its time, of which little is left."""

    def hang_late(*_arguments: object) -> None:
        left, _interval = signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, min(left, 0.01))
        hang()

    deadly_release(monkeypatch, hang_late)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        assert offer(front, DEADLY) == 0
        assert front.memory.read(DEADLY, PAGE) == b"\xaa" * PAGE
        works(front)


def test_a_message_meets_a_chain_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered by a successor; QEMU holds its big lock for as long as that takes."""
    monkeypatch.setattr(post, "ANSWER_SECONDS", 0.3)
    deadly_release(monkeypatch, hang)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        ring = front.rings[Role.REPORTING]
        head = ring.offer([Buffer(DEADLY, PAGE, writable=True)])
        for _ in range(4):
            assert front.read_config().num_pages == 0
        assert ring.wait_used(head) == 0


@pytest.mark.parametrize("act", [die, hang])
def test_a_message_that_kills(monkeypatch: pytest.MonkeyPatch, act: Callable[..., None]) -> None:
    """Three workers die with it; then it is refused unread, once, and the device releases nothing any more."""
    monkeypatch.setattr(post, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(Session, "_get_queue_num", act)
    with start_device() as device, Frontend(device.connect()) as front:
        front.request(Request.SET_PROTOCOL_FEATURES, wire.U64(0x8208 | 1))
        assert front.request(Request.GET_QUEUE_NUM) == 0
        front.request(Request.GET_FEATURES)
        assert front.request(Request.GET_QUEUE_NUM) == 0
        front.connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            front.connection.recv(1)


# Stopped


@pytest.mark.parametrize("has_message", [False, True])
def test_a_stopped_worker_is_replaced(monkeypatch: pytest.MonkeyPatch, has_message: bool) -> None:
    """Noticed though nothing is asked of it: its guest waits for an answer that would not come."""
    monkeypatch.setattr(post, "ANSWER_SECONDS", 0.3)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        (worker,) = device.workers()
        with Fd(os.pidfd_open(worker)) as ended:
            os.kill(worker, signal.SIGSTOP)
            ring = front.rings[Role.REPORTING]
            head = ring.offer([Buffer(8 * MIB, PAGE, writable=True)])
            if has_message:
                assert front.read_config().num_pages == 0
            assert ring.wait_used(head) == 0
            wait_ended(ended)
        assert device.workers() != [worker]


@pytest.mark.usefixtures("patience")
def test_a_worker_that_was_stopped_for_a_moment_goes_on() -> None:
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        (worker,) = device.workers()
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: state(worker) == "T", "the stop")
        os.kill(worker, signal.SIGCONT)
        works(front)
        assert device.workers() == [worker]


@pytest.mark.usefixtures("patience")
def test_a_device_that_was_stopped_as_a_whole_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-Z does: when it goes on, nobody is late, however long it took."""
    clock = KeepersClock(monkeypatch)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        (worker,) = device.workers()
        os.kill(worker, signal.SIGSTOP)
        front.send_raw(wire.message(Request.GET_FEATURES, 0, b""))
        wait_for(lambda: is_read(front.connection), "the message to be passed on")
        os.kill(device.pid, signal.SIGSTOP)
        wait_for(lambda: state(device.pid) == "T" == state(worker), "the stop")
        clock.skip(3600)
        os.kill(device.pid, signal.SIGCONT)
        wait_for(lambda: state(device.pid) == "S", "the keeper's look at who is late")
        os.kill(worker, signal.SIGCONT)
        assert front.receive()[0].request == Request.GET_FEATURES
        works(front)
        assert device.workers() == [worker]


# Those that cannot even begin


def test_workers_that_die_before_they_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few a second are started, for as long as it takes; what waits is answered when one of them lives."""
    monkeypatch.setattr(births, "STARTS_SECONDS", 0.2)
    healed, born = tmp_path / "healed", tmp_path / "born"
    start = worker.start

    def stillborn(*arguments: object) -> int:
        if not healed.exists():
            with born.open("a") as file:
                file.write(".")
            die()
        return start(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "start", stillborn)
    begun = time.monotonic()
    with start_device() as device, Frontend(device.connect()) as front:
        front.send_raw(wire.message(Request.GET_FEATURES, 0, b""))
        wait_for(lambda: born.exists() and born.stat().st_size >= 12, "twelve deaths")
        # 5 at once, then 5 in each 0.2 s.
        assert time.monotonic() - begun > 0.3
        healed.touch()
        assert front.receive()[0].request == Request.GET_FEATURES
        front.start()
        assert offer(front, 8 * MIB) == 0
        # So many deaths in a row say that something is wrong with us.
        assert front.memory.read(8 * MIB, PAGE) == b"\xaa" * PAGE


# The end, with a VM that lives


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "balloon.sock"
    assert list(tmp_path.iterdir()) == []


def test_told_to_end_it_waits_for_the_front_end(path: Path) -> None:
    """Inert, workers to come included, and nobody else is let in; it ends when the front end has gone."""
    with program(path) as device:
        with Frontend(device.connect()) as front:
            front.start()
            device.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not path.exists(), "the socket's removal")
            front.read_config()  # the worker may be about to look at its rings, and hears of it before this
            for _ in range(2):
                assert offer(front, 8 * MIB) == 0
                assert front.memory.read(8 * MIB, PAGE) == b"\xaa" * PAGE
                os.kill(device.worker(), signal.SIGKILL)
            front.read_config()
        status, said = device.wait()
    assert (status, "Traceback" in said) == (0, False)
    assert "QEMU does not survive that its device goes" in said


def test_its_sockets_go_when_nothing_is_released_any_more(tmp_path: Path) -> None:
    """Who waits for that may rely on it, however long the keeper takes for what comes next: here it stands still."""
    removal = "== self.identity:\n            Path(self._path).unlink()\n"
    stops: Edit = ("listening.py", removal, removal + "            os.kill(os.getpid(), 19)\n")
    with upgradable(tmp_path, edits=(stops,)) as device:
        with Frontend(device.connect()) as front:
            front.start()
            wait_for(lambda: is_idle(device.worker()), "nothing more to do")
            device.process.send_signal(signal.SIGTERM)
            wait_for(lambda: state(device.pid) == "T", "the socket's removal")
            assert offer(front, 8 * MIB) == 0
            assert front.memory.read(8 * MIB, PAGE) == b"\xaa" * PAGE
            os.kill(device.pid, signal.SIGCONT)
        assert device.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("options", [("--term-timeout=0.3",), ("--term-timeout=0",), ("--on-term=now",)])
def test_it_does_not_wait_for_ever(path: Path, options: tuple[str, ...]) -> None:
    with program(path, *options) as device, Frontend(device.connect()) as front:
        front.start()
        status, said = device.end()
    assert (status, "Traceback" in said) == (0, False)
    assert "ending while a front end is connected" in said


def test_a_second_signal_ends_it_at_once(path: Path) -> None:
    with program(path) as device, Frontend(device.connect()) as front:
        front.start()
        device.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not path.exists(), "the socket's removal")
        assert device.end(signal.SIGINT)[0] == 0


def test_without_a_front_end_it_ends_at_once(path: Path) -> None:
    with program(path) as device:
        serves(device.connect())
        assert device.end()[0] == 0


# A ring that is to stop and cannot


def test_a_stop_that_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front end takes the ring for stopped and gives its memory to others: it is, and its base is the right one."""
    monkeypatch.setattr(Vrings, "_get_base", die)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        for _ in range(3):
            works(front)
        bases = front.stop([Role.REPORTING])
        assert bases == {Role.REPORTING: 3}
        front.resume([Role.REPORTING], bases)
        assert offer(front, 8 * MIB) == 0


# What a successor needs and does not find


class Shortage:
    """In memory that workers share with the test: they can look at no file."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    @property
    def is_there(self) -> bool:
        return self._memory[0] != 0

    def begin(self) -> None:
        self._memory[0] = 1

    def end(self) -> None:
        self._memory[0] = 0


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Shortage:
    """While it is there no successor finds the memory to take over with."""
    shortage, succeed = Shortage(), succession.succeed

    def fails(*arguments: object, **options: object) -> object:
        if shortage.is_there:
            raise OSError(errno.ENOMEM, "no memory")
        return succeed(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "succeed", fails)
    return shortage


def test_a_shortage_that_passes(monkeypatch: pytest.MonkeyPatch, shortage: Shortage) -> None:
    """Successors that cannot take over write nothing: when it has passed, all is as it was."""
    clock = KeepersClock(monkeypatch)
    # Not tried again before it has passed: five that die in a row make the next one inert.
    monkeypatch.setattr(post, "MAKESHIFT_SECONDS", 3600.0)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        front.write_config(Config(0, 5, 0, 0))
        shortage.begin()
        os.kill(device.workers()[0], signal.SIGKILL)
        assert front.read_config().actual == 0  # it is answered all the same
        ring = front.rings[Role.REPORTING]
        front.memory.write(8 * MIB, b"\xaa" * PAGE)
        head = ring.offer([Buffer(8 * MIB, PAGE, writable=True)])
        shortage.end()
        clock.skip(3601)
        front.read_config()  # and the keeper looks at its clock
        assert ring.wait_used(head) == 0
        assert front.memory.read(8 * MIB, PAGE) == bytes(PAGE)
        assert front.read_config().actual == 5


def test_what_changes_in_a_shortage_is_not_taken_back(
    monkeypatch: pytest.MonkeyPatch, shortage: Shortage
) -> None:
    """A makeshift has said that the ring stopped: no successor may go on with a record in which it runs."""
    monkeypatch.setattr(post, "MAKESHIFT_SECONDS", 0.1)
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        works(front)
        shortage.begin()
        os.kill(device.workers()[0], signal.SIGKILL)
        front.stop()
        shortage.end()
        ring = front.rings[Role.REPORTING]
        before = ring.used_index
        ring.offer([Buffer(8 * MIB, PAGE, writable=True)])
        for _ in range(3):
            (pid,) = device.workers()
            with Fd(os.pidfd_open(pid)) as ended:
                os.kill(pid, signal.SIGKILL)
                wait_ended(ended)
            # Twice: with the second the turn of the first is over, in which a worker looks at every ring that runs.
            for _ in range(2):
                front.read_config()
            assert ring.used_index == before


def test_a_trace_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """It is what keeps successors from serving, so the sixth leaves it, and takes over everything else."""
    trace = tmp_path / "trace"
    with start_device(Options(trace_file=trace)) as device, Frontend(device.connect()) as front:
        front.start()
        works(front)
        trace.write_bytes(b"something else, and long enough to be no header of a trace")
        for actual in (7, 8):
            os.kill(device.workers()[0], signal.SIGKILL)
            front.write_config(Config(0, actual, 0, 0))
            assert offer(front, 8 * MIB) == 0
            assert front.read_config().actual == actual
        os.kill(device.workers()[0], signal.SIGKILL)
        assert front.read_config().actual == 8


@pytest.mark.parametrize("at", [0, 4096], ids=["header", "state"])
def test_a_record_that_is_damaged(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Nothing can be taken over, and messages are answered all the same: QEMU waits for each under its big lock."""
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        for entry in Path(f"/proc/{device.pid}/fd").iterdir():
            if "balloon-record" in str(entry.readlink()):
                with Fd(os.open(entry, os.O_RDWR)) as record:
                    os.pwrite(record.fileno(), b"\xff" * 128 * 1024, at)
        os.kill(device.workers()[0], signal.SIGKILL)
        assert front.read_config() == Config()
        bases = front.stop()
        assert bases.keys() == set(range(5))


def test_no_guest_is_added_to_a_device_that_is_ending(path: Path, tmp_path: Path) -> None:
    with controlled(tmp_path) as device, device.client() as client:
        with Frontend(device.device.connect()) as front:
            front.start()
            device.device.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not path.exists(), "the socket's removal")
            added = client.execute("guest-add", **{"socket-path": str(tmp_path / "more.sock")})
            assert added["error"]["desc"] == "the device is ending"
            assert not (tmp_path / "more.sock").exists()
        assert device.device.wait()[0] == 0


def test_a_guest_that_is_not_added_leaves_no_socket(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with controlled(tmp_path) as device, device.client() as client:
        refused = client.execute("guest-add", **{"socket-path": str(tmp_path / "other" / "balloon.sock")})
        assert "already" in refused["error"]["desc"]
        assert list((tmp_path / "other").iterdir()) == []
        assert device.device.end()[0] == 0
