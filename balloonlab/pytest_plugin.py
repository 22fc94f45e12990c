"""The pytest plugin: fixtures balloon_vm, balloon_vm_factory and balloon_device, and the marker balloon.

For other people's suites, so it is loaded wherever this project is installed: nothing but pytest and the standard
library is imported before a fixture is used. What the fixtures hand out is in testing/.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest

if TYPE_CHECKING:
    from balloonlab.testing.device import BalloonDevice
    from balloonlab.testing.vm import BalloonVm

MARKER = "balloon"
# Options that stand for words of the marker where a test has none of its own.
DEFAULTS = ("kernel", "memory", "accelerator")
# Where a test suite must not pass by skipping.
CI = "CI"

Value = TypeVar("Value")

# Folders of what was begun for the test that runs: a guest that did not come up is in no fixture's value.
_begun = pytest.StashKey[list[Path]]()


class Factory(Protocol):
    """Boots a guest for the time of a context. words: those of the marker balloon."""

    def __call__(self, **words: object) -> AbstractContextManager[BalloonVm]:
        """Return the context."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options, in a group of their own."""
    group = parser.getgroup(MARKER, "guests beside vhost-user-balloon")
    group.addoption(
        "--balloon-kernel",
        metavar="KERNEL",
        help="a Debian suite, or a kernel of your own (bookworm-backports)",
    )
    group.addoption("--balloon-memory", metavar="SIZE", help="guest memory (512M)")
    group.addoption(
        "--balloon-accelerator", choices=("auto", "kvm", "tcg"), help="kvm where it works, else tcg (auto)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.stash[_begun] = []
    config.addinivalue_line(
        "markers",
        f'{MARKER}(kernel="trixie-backports", memory="1G", arm="ours", command_line="..."): '
        "the guest that balloon_vm boots for this test, or the options of balloon_device",
    )


# Fixtures


@pytest.fixture(scope="session")
def balloon_vm_factory(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Return what boots guests, for scopes and parameters of your own.

    with balloon_vm_factory(memory="1G") as vm:
    """
    from balloonlab.testing.vm import BalloonVm  # noqa: PLC0415
    from balloonlab.testing.wanted import Preparations, wanted  # noqa: PLC0415

    preparations = Preparations(logging.getLogger("balloonlab").info)

    @contextlib.contextmanager
    def boot(**words: object) -> Iterator[BalloonVm]:
        guest = _plainly(lambda: wanted({**_defaults(pytestconfig), **words}))
        setup = _plainly(lambda: preparations.setup(guest))
        vm = BalloonVm(setup, _folder(pytestconfig, tmp_path_factory), guest.guest)
        try:
            _plainly(vm.boot)
            yield vm
        finally:
            vm.close()

    return boot


@pytest.fixture
def balloon_vm(request: pytest.FixtureRequest, balloon_vm_factory: Factory) -> Iterator[BalloonVm]:
    """Boot a guest beside the device, as the marker balloon has it. Its numbers go to the test's properties."""
    with balloon_vm_factory(**_marked(request.node)) as vm:
        yield vm
        # Not by record_property, which warns of the family of JUnit XML that is pytest's default.
        request.node.user_properties.extend(
            (f"{MARKER}_{name}", value) for name, value in vm.numbers().items()
        )


@pytest.fixture
def balloon_device(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BalloonDevice]:
    """Start the device at a socket of its own, beside no QEMU."""
    from balloonlab.testing.device import BalloonDevice  # noqa: PLC0415
    from balloonlab.testing.wanted import wanted  # noqa: PLC0415

    spec = _plainly(lambda: wanted(_marked(request.node)).device)
    device = BalloonDevice(spec, _folder(request.config, tmp_path_factory))
    try:
        _plainly(device.start)
        yield device
    finally:
        device.close()


def _defaults(config: pytest.Config) -> dict[str, object]:
    given = {name: config.getoption(f"balloon_{name}") for name in DEFAULTS}
    return {name: value for name, value in given.items() if value is not None}


def _marked(node: pytest.Item) -> dict[str, object]:
    """Return the words of all markers of a test; of two that say different things the closer one is right."""
    words: dict[str, object] = {}
    for mark in node.iter_markers(MARKER):
        if mark.args:
            pytest.fail(f"@pytest.mark.{MARKER} takes words only, such as memory='1G'", pytrace=False)
        words = {**mark.kwargs, **words}
    return words


def _folder(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder whose name is short, for a socket's path has room for 107 bytes."""
    folder = tmp_path_factory.mktemp(MARKER)
    config.stash[_begun].append(folder)
    return folder


def _plainly(work: Callable[[], Value]) -> Value:
    """Do something whose expected errors are their message: a skip where this machine lacks something, else a failure.

    Said after the error was handled, or pytest would print it as the cause of what is said.
    """
    from balloonlab.errors import EXPECTED  # noqa: PLC0415
    from balloonlab.testing.wanted import is_unmet  # noqa: PLC0415

    try:
        return work()
    except EXPECTED as error:
        expected = error
    if not is_unmet(expected):
        pytest.fail(str(expected), pytrace=False)
    if os.environ.get(CI) == "true":
        pytest.fail(f"CI must have what this test needs: {expected}", pytrace=False)
    pytest.skip(str(expected))


# Logs of what failed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forget what was begun for the test before."""
    item.config.stash[_begun].clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what guest, QEMU and device wrote to the report of a test that failed."""
    report = yield
    if report.failed:
        from balloonlab.testing.logs import HasLogs, sections  # noqa: PLC0415

        values = getattr(item, "funcargs", {}).values()
        used = [value.folder for value in values if isinstance(value, HasLogs)]
        for folder in dict.fromkeys([*item.config.stash[_begun], *used]):
            report.sections.extend(sections(folder))
    return report
