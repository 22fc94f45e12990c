"""What is found on consoles, real ones and the texts of the kernel's sources, and what a guest cannot make of it."""

from __future__ import annotations

import pytest

from balloonlab.measure.console import CHECK, console_check, findings
from balloonlab.measure.report import FindingKind
from balloonlab.printable import printable
from tests.measured import PANIC

OOPS = """\
[   12.0] BUG: kernel NULL pointer dereference, address: 0000000000000008
[   12.0] #PF: supervisor write access in kernel mode
[   12.0] #PF: error_code(0x0002) - not-present page
[   12.0] PGD 0 P4D 0
[   12.0] Oops: 0002 [#1] PREEMPT SMP NOPTI
"""


def test_a_real_panic_and_the_oom_kills_before_it() -> None:
    """Of a guest of Debian's 6.12: each kill has two lines and is one finding, the panic is found once."""
    found = findings(PANIC)
    lines = PANIC.split("\n")
    assert [finding.kind for finding in found] == ["oom-kill", "warning", "oom-kill", "panic"]
    assert all(lines[finding.line - 1].strip() == finding.text for finding in found)
    assert found[-1].text == "[    9.146768] Kernel panic - not syncing: sysrq triggered crash"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100", "panic"),
        ("Kernel panic - not syncing: softlockup: hung tasks", "panic"),
        ("BUG: unable to handle page fault for address: ffffa0", "oops"),
        ("kernel BUG at mm/page_alloc.c:1234!", "oops"),
        ("BUG: Bad page state in process init  pfn:01234", "oops"),
        ("BUG: KASAN: use-after-free in free_pages+0x12/0x34", "oops"),
        ("general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP", "oops"),
        ("Oops: general protection fault, probably for non-canonical address: 0000 [#1] SMP", "oops"),
        ("invalid opcode: 0000 [#1] PREEMPT SMP", "oops"),
        ("Unable to handle kernel paging request at virtual address dead000000000108", "oops"),
        ("Out of memory: Killed process 77 (python3) total-vm:1kB", "oom-kill"),
        ("Memory cgroup out of memory: Killed process 77 (python3)", "oom-kill"),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [kworker/0:1:12]", "stall"),
        ("watchdog: CPU0: Watchdog detected hard LOCKUP on cpu 0", "stall"),
        ("BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 30s!", "stall"),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "stall"),
        ("rcu: INFO: rcu_sched self-detected stall on CPU", "stall"),
        ("INFO: task kworker/0:1:12 blocked for more than 120 seconds.", "stall"),
        ("WARNING: CPU: 0 PID: 1 at mm/page_alloc.c:4567 __alloc_pages+0x1/0x2", "warning"),
        ("WARNING: mm/page_alloc.c:4567 at __alloc_pages+0x1/0x2, CPU#0: swapper/0/1", "warning"),
        ("UBSAN: array-index-out-of-bounds in drivers/x.c:1:2", "warning"),
    ],
)
def test_each_kind(line: str, kind: FindingKind) -> None:
    assert [(finding.kind, finding.line) for finding in findings(f"booting\r\n[  1.2] {line}\r\n")] == [
        (kind, 2)
    ]


@pytest.mark.parametrize(
    "line",
    [
        "Kernel command line: console=ttyS0 panic=-1 oops=panic",
        "---[ end Kernel panic - not syncing: sysrq triggered crash ]---",
        "python3 invoked oom-killer: gfp_mask=0x140dca, order=0, oom_score_adj=1000",
        'use "pci=nocrs" and report a bug',
        "DEBUG: all is well",
        " oom_kill_process+0xfa/0x200",
    ],
)
def test_what_is_no_finding(line: str) -> None:
    assert findings(line) == []


def test_an_oops_is_one_finding_and_the_next_another() -> None:
    assert [finding.line for finding in findings(OOPS)] == [1]
    assert [finding.line for finding in findings(OOPS * 2)] == [1, 6]
    assert [finding.line for finding in findings(OOPS + "trace\n" * 20 + "Oops: 0002 [#2]")] == [1, 26]


def test_each_process_that_was_killed_counts() -> None:
    """A quiet console has only these lines, one after the other."""
    kills = "Out of memory: Killed process 1 (a)\nOut of memory: Killed process 2 (b)\n"
    assert [finding.line for finding in findings(kills)] == [1, 2]


def test_text_that_would_move_a_cursor_is_escaped_and_a_long_one_is_cut() -> None:
    assert printable("a\x1b[31mb\x00\u202ec\udc80", 80) == r"a\x1b[31mb\x00\u202ec\udc80"
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 11, 10) == "x" * 9 + "…"
    assert len(printable("\x00" * 10, 10)) == 10


def test_the_check_names_the_first_that_fails_and_lets_warnings_be() -> None:
    assert console_check(findings("WARNING: CPU: 0 PID: 1 at x")).outcome == "pass"
    check = console_check(findings(PANIC))
    assert (check.name, check.outcome) == (CHECK, "fail")
    assert check.message.startswith("oom-kill at line 4 of console.log: [    7.489898] oom-kill:constraint=")
    assert check.message.endswith(", and 2 more")
