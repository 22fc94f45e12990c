"""What a confined process cannot do, tried in one; and that it is the sandbox, since the same succeeds without.

The filters themselves are tests/unit/test_seccomp.py's; what a device does inside is tests/driver/test_sandbox_device.py's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev import sandbox
from hostdev.sandbox import Role
from tests import confined
from tests.confined import Act, outcome

WORKER = functools.partial(sandbox.confine, Role.WORKER)
CONTROL = functools.partial(sandbox.confine, Role.CONTROL)
KEEPER = functools.partial(sandbox.confine, Role.KEEPER)

LOCKED_IN = [
    confined.open_for_reading,
    confined.open_for_writing,
    confined.make_a_file,
    confined.open_by_openat2,
    confined.remove_a_file,
    confined.rename_a_file,
    confined.make_a_folder,
    confined.link_a_file,
    confined.list_a_folder,
    confined.change_folder,
    confined.cut_guest_memory,
    confined.punch_guest_memory,
    confined.seal_guest_memory,
    confined.make_a_memfd,
    confined.fork,
    confined.spawn,
    confined.execute,
    confined.trace_a_process,
    confined.kill_a_process,
    confined.kill_by_pidfd,
    confined.open_a_pidfd,
    confined.take_a_descriptor,
    confined.read_a_process,
    confined.write_to_a_process,
    confined.unix_socket,
    confined.tcp_socket,
    confined.udp_socket,
    confined.netlink_socket,
    confined.socket_pair,
    confined.connect_to_a_path,
    confined.connect_to_an_abstract_name,
    confined.bind_a_path,
    confined.bind_an_abstract_name,
    confined.bind_a_port,
    confined.listen,
    confined.map_code,
    confined.make_code_of_data,
    confined.have_memory_read_ahead,
    confined.set_its_name,
    confined.raise_a_limit,
    confined.make_a_descriptor_non_blocking,
    confined.ask_a_device,
    confined.unshare,
    confined.be_another_kind_of_process,
]
KEEPERS = [
    confined.trace_a_process,
    confined.take_a_descriptor,
    confined.read_a_process,
    confined.write_to_a_process,
    confined.tcp_socket,
    confined.udp_socket,
    confined.netlink_socket,
    confined.unshare,
    confined.be_another_kind_of_process,
]


@pytest.fixture(autouse=True)
def filters(unmet: Callable[[str], None]) -> None:
    if sandbox.missing():
        unmet(f"a kernel with {'; '.join(sandbox.missing())}")


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """A fresh folder for each act."""
    return (_made(tmp_path / str(number)) for number in range(100))


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def denied(act: Act, folders: Iterator[Path], confine: Callable[[], object]) -> bool:
    """True if it is denied to who is confined, and to nobody else."""
    assert outcome(act, next(folders)) == ""
    return outcome(act, next(folders), confine) in ("EPERM", "EACCES")


@pytest.mark.parametrize("act", [*LOCKED_IN, confined.accept], ids=lambda act: act.__name__)
def test_a_worker_cannot(act: Act, folders: Iterator[Path]) -> None:
    assert denied(act, folders, WORKER)


@pytest.mark.parametrize("act", [*LOCKED_IN, confined.give_memory_back], ids=lambda act: act.__name__)
def test_the_control_process_cannot(act: Act, folders: Iterator[Path]) -> None:
    assert denied(act, folders, CONTROL)


@pytest.mark.parametrize("act", KEEPERS, ids=lambda act: act.__name__)
def test_the_keeper_cannot(act: Act, folders: Iterator[Path]) -> None:
    assert denied(act, folders, KEEPER)


@pytest.mark.parametrize("confine", [WORKER, CONTROL, KEEPER], ids=["worker", "control", "keeper"])
def test_nobody_mounts(confine: Callable[[], object], folders: Iterator[Path]) -> None:
    if os.geteuid() != 0:
        pytest.skip("not run: only root may mount without a sandbox, so a refusal would prove nothing")
    assert denied(confined.mount, folders, confine)
