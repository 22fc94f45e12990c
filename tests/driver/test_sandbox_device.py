"""A device that is confined: everything works inside, an error does, and so does a kernel that has no sandbox."""

from __future__ import annotations

import errno
import functools
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from balloonlab.decode import read_trace
from hostdev import landlock, sandbox
from hostdev.balloon import Balloon
from hostdev.driver import DEADLINE, Buffer
from hostdev.frontend import Frontend, start_device
from hostdev.metrics import Metrics
from hostdev.options import Options
from hostdev.sandbox import MAX_KEEPER_FILTERS, MAX_WORKER_DESCRIPTORS, Role
from hostdev.wire.balloon import PFN_STRUCT
from hostdev.wire.balloon import Role as Ring
from hostdev.wire.trace import ENTRY_STRUCT, Kind
from hostdev.wire.vhost_user import HEADER_SIZE
from tests import confined_acts as acts
from tests.confined import Act, outcome
from tests.control_process import Controlled, controlled
from tests.device_program import wait_for, works
from tests.in_process import MIB, PAGE

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
pytestmark = pytest.mark.usefixtures("filters", "patience")
WHOLE = "seccomp+landlock" if landlock.abi() else "seccomp"


def status(pid: int) -> dict[str, int]:
    """What the kernel says of a process's sandbox."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = ("NoNewPrivs", "Seccomp", "Seccomp_filters")
    return {name: int(value) for name, _colon, value in lines if name in names}


def test_every_process_is_confined(tmp_path: Path) -> None:
    ours = status(os.getpid()).get("Seccomp_filters", 0)
    with controlled(tmp_path) as device, Frontend(device.device.connect()) as guest:
        guest.start()
        worker, control = served_by(device)
        for pid, filters in ((device.device.pid, 1), (worker, 2), (control, 2)):
            found = status(pid)
            assert (found["NoNewPrivs"], found["Seccomp"]) == (1, 2)
            assert found.get("Seccomp_filters", ours + filters) == ours + filters
            assert dumps_no_core(pid)
        most = MAX_WORKER_DESCRIPTORS
        assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (most, most)


def dumps_no_core(pid: int) -> bool:
    """True if it has the limit that no core is dumped with, or the one that nobody here may raise."""
    _soft, ours = resource.getrlimit(resource.RLIMIT_CORE)
    return resource.prlimit(pid, resource.RLIMIT_CORE) in ([(1, 1), (0, 0)] if ours == 0 else [(1, 1)])


def served_by(device: Controlled) -> tuple[int, int]:
    """Process ids of worker and control process."""
    with device.client() as client:
        worker = client.execute("query-status")["return"]["worker"]
    return worker, device.control_pid


def test_none_is_none(tmp_path: Path) -> None:
    with controlled(tmp_path, "--sandbox=none") as device, Frontend(device.device.connect()) as guest:
        guest.start()
        for pid in (device.device.pid, *served_by(device)):
            assert status(pid) == status(os.getpid())
        with device.client() as client:
            assert client.execute("query-status")["return"]["sandbox"] == sandbox.NONE


# What goes on inside


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """All that the device has said so far, on the one descriptor that its processes keep."""
    handler, logger = logging.StreamHandler(open(2, "w", closefd=False)), logging.getLogger("hostdev")  # noqa: SIM115
    logger.addHandler(handler)
    pieces: list[str] = []

    def all_so_far() -> str:
        pieces.append(capfd.readouterr().err)
        return "".join(pieces)

    yield all_so_far
    logger.removeHandler(handler)


def test_everything_works_inside(tmp_path: Path) -> None:
    """All options together: each ring, each query, a stop, a successor, another version; and nothing was denied."""
    metrics, trace = tmp_path / "metrics.prom", tmp_path / "trace"
    chains = 'chains_total{queue="inflate"} 4'
    options = f"--metrics-file={metrics}", f"--trace={trace}", "--log-level=debug", "--hugetlb-release"
    with controlled(tmp_path, *options, "--features=+deflate_on_oom") as device:
        with Frontend(device.device.connect()) as guest:
            guest.start()
            first, _control = served_by(device)
            use(guest, device, 1)
            for number in (signal.SIGSTOP, signal.SIGCONT):
                os.kill(first, number)
            use(guest, device, 2)
            os.kill(first, signal.SIGKILL)
            use(guest, device, 3)
            assert served_by(device)[0] != first
            with device.client() as client:
                assert client.execute("upgrade") == {"return": {}}
            use(guest, device, 4)
        wait_for(lambda: metrics.exists() and chains in metrics.read_text(), "the metrics")
        code, said = device.device.end()
    assert code == 0
    assert "PermissionError" not in said
    assert "Operation not permitted" not in said
    # Three chains each time.
    assert sum(record.kind is Kind.ANSWER for record in read_trace(trace)) == 12


def test_a_trace_grows_inside(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], str], tmp_path: Path
) -> None:
    """Past what was there when the worker began."""
    growth, trace = 4 * PAGE, tmp_path / "trace"
    monkeypatch.setattr("hostdev.trace.GROWTH", growth)
    entries, chains = [Buffer(1 << 40, PAGE, writable=True)] * 100, 0
    with start_device(Options(trace_file=trace)) as device, Frontend(device.connect()) as guest:
        guest.start()
        assert all(status(worker)["Seccomp"] == 2 for worker in device.workers())
        ring = guest.rings[Ring.REPORTING]
        while chains * len(entries) * ENTRY_STRUCT.size < 4 * growth:
            ring.wait_used(ring.offer(entries))
            chains += 1
    assert "the trace is full" not in said()
    assert sum(record.kind is Kind.ANSWER for record in read_trace(trace)) == chains


def use(guest: Frontend, device: Controlled, number: int) -> None:
    """Have everything done once that a guest or a client can ask for. number: which time it is."""
    works(guest)
    guest.memory.write(4 * MIB, PFN_STRUCT.pack(9 * MIB // PAGE))
    for role in (Ring.INFLATE, Ring.DEFLATE):
        ring = guest.rings[role]
        assert ring.wait_used(ring.offer([Buffer(4 * MIB, 4)])) == 0
    with device.client() as client:
        for query in ("query-memory", "query-rings", "query-balloon"):
            assert "return" in client.execute(query)
        assert client.execute("query-status")["return"]["sandbox"] == WHOLE
        client.send("set-target", size=guest.memory.size - number * MIB)
        hear_of_config(guest)
        assert client.answer() == {"return": {}}


def hear_of_config(guest: Frontend) -> None:
    """Take what a front end is told: a message of 12 bytes, and no more, or of 13 if the one before was cut off."""
    guest.backend_channel.settimeout(DEADLINE)
    taken = b""
    while len(taken) < HEADER_SIZE:
        taken += guest.backend_channel.recv(64)


def _defect(kind: type[Exception], balloon: Balloon) -> Exception:
    """One that the traceback makes a suggestion for, if it is of that kind."""
    if kind is AttributeError:
        return AttributeError("a defect", name="servise", obj=balloon)
    return NameError("a defect", name="balon") if kind is NameError else kind("a defect")


@pytest.mark.parametrize("kind", [NameError, AttributeError, RuntimeError])
def test_an_error_inside_has_its_traceback_and_the_guest_its_answer(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    def breaks(balloon: Balloon, _index: int) -> None:
        raise _defect(kind, balloon)

    monkeypatch.setattr(Balloon, "service", breaks)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        before = device.workers()
        guest.rings[Ring.REPORTING].notify()
        wait_for(lambda: "inert" in said(), "the word of it")
        assert guest.read_config().actual == 0
        assert device.workers() == before
    text = said()
    assert f"{kind.__name__}: a defect" in text
    assert f'File "{__file__}", line ' in text
    assert f'File "{Path(sandbox.__file__).with_name("worker.py")}", line ' in text


# Metrics: the one exception


def written(path: Path) -> Act:
    def act(folder: Path) -> Iterator[None]:
        (folder / "metrics").mkdir()
        (folder / "metrics" / "m.prom").touch()
        (folder / "there").touch()
        yield
        Metrics().write(folder / path)

    return act


def moved_out(folder: Path) -> Iterator[None]:
    (folder / "metrics").mkdir()
    (folder / "metrics" / "m.prom").touch()
    yield
    (folder / "metrics" / "m.prom").rename(folder / "there")


def read_back(folder: Path) -> Iterator[None]:
    (folder / "metrics").mkdir()
    (folder / "metrics" / "m.prom").touch()
    yield
    (folder / "metrics" / "m.prom").read_text()


IN, OUT = Path("metrics", "m.prom"), Path("m.prom")


def _worker(folder: Path) -> Callable[[], str]:
    return functools.partial(sandbox.confine, Role.WORKER, metrics_file=folder / IN)


@pytest.mark.parametrize(
    ("act", "error"),
    [(written(IN), ""), (written(OUT), "EACCES"), (moved_out, "EACCES"), (read_back, "EPERM")],
)
def test_a_worker_writes_its_metrics_and_nothing_else(
    act: Act, error: str, unmet: Callable[[str], None], tmp_path: Path
) -> None:
    if error == "EACCES" and landlock.abi() == 0:
        unmet("Landlock, since a filter sees no paths")
    for folder, confine, expected in (
        (tmp_path / "free", lambda: None, ""),
        (tmp_path / "in", _worker(tmp_path / "in"), error),
    ):
        folder.mkdir()
        assert outcome(act, folder, confine) == expected


def test_a_folder_that_has_gone_needs_no_exception(tmp_path: Path) -> None:
    assert outcome(acts.open_for_reading, tmp_path, _worker(tmp_path)) in ("EPERM", "EACCES")


# Each layer alone, and none


ALONE = [
    acts.open_for_reading,
    acts.make_a_file,
    acts.connect_to_an_abstract_name,
    acts.bind_a_port,
    acts.kill_a_process,
]


@pytest.mark.parametrize("act", ALONE, ids=lambda act: act.__name__)
@pytest.mark.parametrize("layer", ["seccomp", "landlock"])
def test_one_layer_is_enough(
    layer: str, act: Act, monkeypatch: pytest.MonkeyPatch, unmet: Callable[[str], None], tmp_path: Path
) -> None:
    if layer == "seccomp":
        monkeypatch.setattr(landlock, "abi", lambda: 0)
    elif landlock.abi() < 6:
        unmet("Landlock of Linux 6.12, which limits signals and abstract sockets")
    else:
        monkeypatch.setattr(sandbox, "_install", _absent)

    def confine() -> None:
        assert sandbox.confine(Role.WORKER) == layer

    assert outcome(act, tmp_path, confine) in ("EPERM", "EACCES")


def _absent(*_arguments: object) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _refused(*_arguments: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(("fails", "warned"), [(_absent, False), (_refused, True)])
def test_without_any_of_it_the_device_serves(
    fails: Callable[..., None], warned: bool, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """What the kernel lacks the keeper has said; what fails all the same, the worker says."""
    for name in ("_install", "_restrict", "_prctl", "_limit"):
        monkeypatch.setattr(sandbox, name, fails)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        works(guest)
        assert status(device.workers()[0]) == status(os.getpid())
    for what in ("a seccomp filter", "Landlock"):
        assert (f"the device serves without {what}: " in said()) is warned


def test_versions_that_follow_each_other_leave_room_for_workers(tmp_path: Path) -> None:
    def confine() -> None:
        for _ in range(2 * MAX_KEEPER_FILTERS):
            sandbox.begin(sandbox.AUTO, takes_over=True)
        assert status(os.getpid()).get("Seccomp_filters", 0) <= MAX_KEEPER_FILTERS
        assert sandbox.confine(Role.WORKER) == WHOLE

    assert outcome(acts.fork, tmp_path, confine) == "EPERM"


# Deaths


@pytest.mark.parametrize("is_confined", [False, True])
def test_a_crash_leaves_no_core(
    *, is_confined: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither in a file nor in a program that cores are piped to: the kernel says of each death if there was one."""
    monkeypatch.setattr(landlock, "abi", lambda: 0)  # it would stop the file by itself
    if not is_confined and CORE_PATTERN.read_text()[0] in "|/@":
        pytest.skip("not run: a core of somebody unconfined would be left outside the test's own folder")
    pid = os.fork()
    if pid == 0:
        _crash(tmp_path, is_confined=is_confined)
    _, ended = os.waitpid(pid, 0)
    cores = list(tmp_path.iterdir())
    for core in cores:
        core.unlink()
    assert os.WIFSIGNALED(ended)
    assert os.WTERMSIG(ended) == signal.SIGSEGV
    if not is_confined and not os.WCOREDUMP(ended):
        pytest.skip("not run: this machine dumps no core of anybody")
    assert (os.WCOREDUMP(ended), len(cores)) == ((False, 0) if is_confined else (True, 1))


def _crash(folder: Path, *, is_confined: bool) -> NoReturn:
    """Die of SIGSEGV in this folder, of a process that may dump its core; of its memory the least there can be."""
    try:
        Path("/proc/self/coredump_filter").write_text("0")
        os.chdir(folder)
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        if is_confined:
            sandbox.confine(Role.WORKER)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.raise_signal(signal.SIGSEGV)
    finally:
        os._exit(3)  # it must not become a second pytest
