"""A worker inside its sandbox: from before its first look at a guest, whoever it succeeds, and with all that it may hold."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev import births, landlock, sandbox, succession, worker
from hostdev.driver import GuestMemory
from hostdev.frontend import Frontend, start_device
from hostdev.message_end import MessageEnd
from hostdev.sandbox import MAX_WORKER_DESCRIPTORS, Role
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import Request
from tests.confined import Act, outcome
from tests.control_process import controlled
from tests.device_program import descriptors, wait_for, works

REGIONS = 32
pytestmark = pytest.mark.usefixtures("patience")


@pytest.fixture
def filters(unmet: Callable[[str], None]) -> None:
    if not sandbox._has_filters():
        unmet("a kernel with seccomp filters")


def opens_a_file() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except PermissionError:
        return False
    return True


# Before the first look


@pytest.mark.usefixtures("filters")
def test_a_worker_is_locked_in_before_it_takes_over_or_looks_at_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first and its successor: what is in record, rings and messages comes from a guest and its front end."""
    looks = mmap.mmap(-1, 2)  # by who is not confined, by who is; shared with the workers

    def looked(act: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(act)
        def before(*arguments: object, **options: object) -> object:
            looks[int(not opens_a_file())] += 1
            return act(*arguments, **options)

        return before

    monkeypatch.setattr(worker, "succeed", looked(succession.succeed))
    monkeypatch.setattr(MessageEnd, "say_ready", looked(MessageEnd.say_ready))
    monkeypatch.setattr(MessageEnd, "serve", looked(MessageEnd.serve))
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        assert (looks[0], looks[1] > 2) == (0, True)
        seen = looks[1]
        os.kill(device.workers()[0], signal.SIGKILL)
        guest.read_config()
        assert (looks[0], looks[1] >= seen + 3) == (0, True)


@pytest.mark.usefixtures("filters")
def test_a_makeshift_worker_is_confined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    makeshifts = mmap.mmap(-1, 2)
    make_do = worker.Worker._make_do

    def counted(self: worker.Worker) -> None:
        makeshifts[int(not opens_a_file())] += 1
        make_do(self)

    monkeypatch.setattr(births, "STARTS_SECONDS", 0.0)
    monkeypatch.setattr(worker, "succeed", fails)
    monkeypatch.setattr(worker.Worker, "_make_do", counted)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.read_config()
        (pid,) = device.workers()
        assert "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()
        assert (makeshifts[0], makeshifts[1] > 0) == (0, True)


# All that it may hold


def test_no_core_has_guest_memory_in_it() -> None:
    """Of no worker, a successor included: each mapping of the guest's memory is marked "dd"."""
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        for _ in range(2):
            (pid,) = device.workers()
            flags = mapping_flags(pid, os.fstat(guest.memory.fd.fileno()))
            assert flags
            assert all("dd" in each for each in flags)
            os.kill(pid, signal.SIGKILL)
            works(guest)


def mapping_flags(pid: int, file: os.stat_result) -> list[list[str]]:
    """VmFlags of each mapping of a file (proc(5)). A file of another device may have its number."""
    its = [f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", str(file.st_ino)]
    found, is_of_it = [], False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            is_of_it = words[2:4] == its
        elif name == "VmFlags:" and is_of_it:
            found.append(words)
    return found


def test_a_worker_with_all_that_it_can_have_is_within_its_limit(tmp_path: Path) -> None:
    """32 regions and every option: the limit is twice what it comes to, as the comment at MAX_WORKER_DESCRIPTORS has it."""
    size = 16 << 20
    each = size // REGIONS
    regions = [wire.MemoryRegion(n * each, each, (1 << 46) + n * each, n * each) for n in range(REGIONS)]
    options = f"--metrics-file={tmp_path / 'metrics'}", f"--trace={tmp_path / 'trace'}"
    with controlled(tmp_path, *options) as device:
        with Frontend(device.device.connect(), memory=GuestMemory(size, regions)) as guest:
            guest.start()
            for ring in guest.rings:
                guest.request(Request.SET_VRING_ERR, wire.U64(ring.index), [ring.call], need_reply=True)
            works(guest)
            (pid,) = device.others()
            # Regions and rings, a record and a trace and their duplicates, 3 sockets, 3 standard descriptors.
            held = 64 + 15 + 4 + 6
            wait_for(lambda: len(descriptors(pid)) == held, "all of them, and the metrics are written")
            # And for a moment: another record and its duplicate, the metrics file, what a message brings.
            most = held + 2 + 1 + 16 + 8
            assert most == 116
            assert 2 * most <= MAX_WORKER_DESCRIPTORS < 3 * most
        assert device.device.end()[0] == 0


# Landlock: what the folder of the metrics is for


def _in_folder(act: Callable[[Path], object]) -> Act:
    def steps(folder: Path) -> Iterator[None]:
        metrics = folder / "metrics"
        (metrics / "more").mkdir(parents=True)
        (metrics / "m.prom").write_text("metrics")
        (metrics / "m.prom").chmod(0o700)
        yield
        act(metrics)

    return steps


def _write(metrics: Path) -> None:
    (metrics / "m.prom.new").write_text("new")
    (metrics / "m.prom.new").rename(metrics / "m.prom")


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (_write, ""),
        (lambda metrics: (metrics / "m.prom").read_bytes(), "EACCES"),
        (os.listdir, "EACCES"),
        (lambda metrics: os.execv(metrics / "m.prom", ["m.prom"]), "EACCES"),
        (lambda metrics: (metrics / "new").mkdir(), "EACCES"),
        (lambda metrics: (metrics / "more").rmdir(), "EACCES"),
        (lambda metrics: (metrics / "new").symlink_to("m.prom"), "EACCES"),
        (lambda metrics: os.mkfifo(metrics / "new"), "EACCES"),
        (lambda metrics: (metrics / "m.prom").rename(metrics.parent / "m.prom"), "EACCES"),
    ],
    ids=["replace", "read", "list", "execute", "mkdir", "rmdir", "symlink", "fifo", "move out"],
)
def test_the_folder_of_the_metrics_is_written_to_and_no_more(
    act: Callable[[Path], object],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    unmet: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """By Landlock alone: a filter would deny most of this before it is asked."""

    def no_filter(_program: bytes) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if landlock.abi() == 0:
        unmet("a kernel with Landlock")
    monkeypatch.setattr(sandbox, "_install", no_filter)
    free, confined = tmp_path / "free", tmp_path / "confined"
    confine = functools.partial(sandbox.confine, Role.WORKER, metrics_file=confined / "metrics" / "m.prom")
    # What is executed is no program, which is looked at after it was opened.
    assert outcome(_in_folder(act), free) in ("", "ENOEXEC")
    assert outcome(_in_folder(act), confined, confine) == error
