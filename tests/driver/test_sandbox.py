"""What a confined process cannot do, tried in one; and that it is the sandbox, since the same succeeds without.

The filters themselves are tests/unit/test_seccomp.py's; what a device does inside is tests/driver/test_sandbox_device.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev import sandbox
from hostdev.sandbox import Role
from tests import confined_acts as acts
from tests.confined import Act, outcome

WORKER = functools.partial(sandbox.confine, Role.WORKER)
CONTROL = functools.partial(sandbox.confine, Role.CONTROL)
KEEPER = functools.partial(sandbox.confine, Role.KEEPER)

pytestmark = pytest.mark.usefixtures("filters")
# What a container denies to everybody, and what an older kernel does not have.
IMPOSSIBLE = ("EPERM", "EACCES", "ENOSYS")

LOCKED_IN = [
    acts.open_for_reading,
    acts.open_for_writing,
    acts.make_a_file,
    acts.open_by_openat2,
    acts.remove_a_file,
    acts.rename_a_file,
    acts.make_a_folder,
    acts.link_a_file,
    acts.list_a_folder,
    acts.change_folder,
    acts.cut_guest_memory,
    acts.punch_guest_memory,
    acts.seal_guest_memory,
    acts.make_a_memfd,
    acts.fork,
    acts.spawn,
    acts.execute,
    acts.trace_a_process,
    acts.kill_a_process,
    acts.kill_by_pidfd,
    acts.open_a_pidfd,
    acts.take_a_descriptor,
    acts.read_a_process,
    acts.write_to_a_process,
    acts.unix_socket,
    acts.tcp_socket,
    acts.udp_socket,
    acts.netlink_socket,
    acts.socket_pair,
    acts.connect_to_a_path,
    acts.connect_to_an_abstract_name,
    acts.bind_a_path,
    acts.bind_an_abstract_name,
    acts.bind_a_port,
    acts.listen,
    acts.map_code,
    acts.make_code_of_data,
    acts.have_memory_read_ahead,
    acts.set_its_name,
    acts.raise_a_limit,
    acts.make_a_descriptor_non_blocking,
    acts.ask_a_device,
    acts.unshare,
    acts.be_another_kind_of_process,
]
KEEPERS = [
    acts.trace_a_process,
    acts.take_a_descriptor,
    acts.read_a_process,
    acts.write_to_a_process,
    acts.tcp_socket,
    acts.udp_socket,
    acts.netlink_socket,
    acts.unshare,
    acts.be_another_kind_of_process,
]


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """A fresh folder for each act."""
    return (_made(tmp_path / str(number)) for number in range(100))


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def denied(act: Act, folders: Iterator[Path], confine: Callable[[], object]) -> bool:
    """True if it is denied to who is confined, and to nobody else. Skips what nobody may do: a refusal would prove nothing."""
    if (free := outcome(act, next(folders))) in IMPOSSIBLE:
        pytest.skip(f"not run: nobody may do this here, confined or not: {free}")
    assert free == ""
    return outcome(act, next(folders), confine) in ("EPERM", "EACCES")


@pytest.mark.parametrize("act", [*LOCKED_IN, acts.accept], ids=lambda act: act.__name__)
def test_a_worker_cannot(act: Act, folders: Iterator[Path]) -> None:
    assert denied(act, folders, WORKER)


@pytest.mark.parametrize("act", [*LOCKED_IN, acts.give_memory_back], ids=lambda act: act.__name__)
def test_the_control_process_cannot(act: Act, folders: Iterator[Path]) -> None:
    assert denied(act, folders, CONTROL)


@pytest.mark.parametrize("act", KEEPERS, ids=lambda act: act.__name__)
def test_the_keeper_cannot(act: Act, folders: Iterator[Path]) -> None:
    assert denied(act, folders, KEEPER)


@pytest.mark.parametrize("confine", [WORKER, CONTROL, KEEPER], ids=["worker", "control", "keeper"])
def test_nobody_mounts(confine: Callable[[], object], folders: Iterator[Path]) -> None:
    assert denied(acts.mount, folders, confine)
