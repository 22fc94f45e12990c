"""What all tests share: how a missing precondition is treated, and the settings of hypothesis."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from hostdev.discard import Backing, backing_of
from hostdev.fds import Fd
from tests.device_program import PATIENT

# Derandomized: a test either passes or fails, whoever runs it. No deadline: nothing here asserts on speed.
settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# For scripts/test --full: other examples each time, and many more.
settings.register_profile(
    "full", parent=settings.get_profile("project"), derandomize=False, max_examples=1000
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Put back what a test did with signals: a command that one has ended leaves them ignored, also in later children."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def nothing_is_left_of_others() -> None:
    """What other tests have left to the collector goes now, and not while descriptors are counted."""
    gc.collect()


@pytest.fixture
def unmet() -> Callable[[str], None]:
    """Call with a reason when this machine lacks something: a skip for a user, a failure where CI=true."""

    def report(reason: str) -> None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have what this test needs: {reason}")
        pytest.skip(reason)

    return report


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker of a device that is forked here is ended for being slow: for where none is to hang."""
    for place, value in PATIENT.items():
        monkeypatch.setattr(place, value)


@pytest.fixture
def on_disk(tmp_path: Path, unmet: Callable[[str], None]) -> Iterator[Fd]:
    """An empty file without a name, on no memory: the folder for temporary files is on tmpfs with many."""
    for folder in (tmp_path, Path("/var/tmp"), Path(__file__).parent, Path.home()):
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if backing_of(fd := Fd(os.dup(file.fileno()))) is Backing.FILE:
                break
            fd.close()
    else:
        unmet(
            "a folder that is not on tmpfs and can be written to (TMPDIR, /var/tmp, this repository or HOME)"
        )
    with fd:
        yield fd


HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """Huge pages of 2 MiB in the host's pool, as root even where it is empty; their number. Skips where there are none.

    Also where CI=true: whether a machine lets its pool be filled is no matter of what was installed.
    """
    wanted = 40
    number, free = HUGE_PAGES / "nr_hugepages", HUGE_PAGES / "free_hugepages"
    if not number.exists():
        pytest.skip("not run: this kernel has no huge pages of 2 MiB")
    before = number.read_text()
    try:
        if int(free.read_text()) < wanted:
            number.write_text(str(int(before) + wanted))
    except OSError as error:
        pytest.skip(f"not run: the pool of huge pages is empty and cannot be filled: {error.strerror}")
    try:
        if int(free.read_text()) < wanted:
            pytest.skip("not run: the host has no memory in pieces of 2 MiB for the pool of huge pages")
        yield wanted
    finally:
        number.write_text(before)
