"""RAM of a real QEMU that is cut short: our device loses a worker and nothing else, and QEMU lives as long as it does not look."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hostdev.wire.balloon import Role
from qmp_glue.board import Board
from qmp_glue.find import Qemu
from tests.device_program import children
from tests.killing import is_worker
from tests.qtest.bench import FREE, MIB, RAM_BYTES, RINGS_AT, Bench


def workers(bench: Bench) -> list[int]:
    return [pid for pid in children(bench.keeper) if is_worker(pid)]


def report(bench: Bench) -> None:
    bench.fill(FREE, 2 * MIB)
    assert bench.given_back(lambda: bench.report((FREE, 2 * MIB))) == 2 * MIB


def test_case_19_a_ring_in_memory_that_is_cut_short(qemu: Qemu, tmp_path: Path) -> None:
    """The file is made longer again at the end: QEMU itself looks at the rings when a device stops, and would not survive."""
    bench = Bench(qemu, tmp_path, ours=True, board=Board(sealed=False))
    try:
        bench.start()
        bench.drive()
        report(bench)
        (first,) = workers(bench)
        os.truncate(bench.vm.ram_file, RINGS_AT)
        bench.rings[Role.REPORTING].notify()
        bench.wait_until(lambda: workers(bench) not in ([], [first]), "a successor")
        (second,) = workers(bench)
        assert bench.config().num_pages == 0
        for ring in bench.rings.values():
            ring.notify()
        status = bench.command("query-status")
        assert (status["inert"], bench.qmp("query-status")) == (True, {"running": True, "status": "running"})
        assert "guest memory was cut short" in status["reason"]
        assert workers(bench) == [second]
        os.truncate(bench.vm.ram_file, RAM_BYTES)
        bench.device.reset()
        assert bench.vm.returncode is None
    finally:
        ended = bench.close()
    assert ended == (0, 0)


def test_what_qemu_makes_by_default_cannot_be_cut_short(ours: Bench) -> None:
    ours.drive()
    with pytest.raises(PermissionError) as refused:
        os.truncate(ours.vm.ram_file, RINGS_AT)
    assert refused.value.errno == errno.EPERM
    report(ours)
