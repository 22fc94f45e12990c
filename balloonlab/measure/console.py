"""What a guest's kernel said that it should not have, found in the text of its console.

A finding is a line that Linux prints, by the words that it prints: lib/panic, lib/bug, mm/oom_kill, kernel/watchdog,
kernel/rcu, kernel/hung_task. The guest writes that text, so it may forge findings and it may hide real ones; it cannot
make a finding that is longer than a line, that has control characters, or more of them than the bound.

Pure. Used by the runner for a run's console and for the kernel log of a guest that has a quiet one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from balloonlab.measure.report import Check, Finding, FindingKind
from balloonlab.printable import printable

# The first ones tell the cause and the rest follows from it. Per kind, so that warnings do not hide the panic they led to.
FINDINGS_PER_KIND = 20
# A line of the kernel's is below 1024 (LOG_LINE_MAX); what is said here is at its beginning.
TEXT_CHARACTERS = 240
# BUG: and its Oops: line have at most a page fault's details in between, four lines; oom-kill: and Killed none.
REPORT_LINES = 8

# The name of the check that console_check() makes.
CHECK = "console"
# A warning is a kernel's own opinion, and kernels in use have some at boot.
FAILING: tuple[FindingKind, ...] = ("panic", "oops", "oom-kill", "stall")


@dataclass(frozen=True)
class _Pattern:
    """continues: a line that belongs to the finding before it, if that has this kind, begun, and is near."""

    kind: FindingKind
    words: re.Pattern[str]
    continues: bool = False


# In the order of what a line is taken for, where more than one fits.
_PATTERNS = (
    _Pattern("panic", re.compile(r"(?<!end )Kernel panic - not syncing")),
    _Pattern("stall", re.compile(r"soft lockup|hard LOCKUP|workqueue lockup|rcu.{1,40}(?:detected stall|detected expedited stall|self-detected stall)")),
    _Pattern("stall", re.compile(r"INFO: task .{1,64} blocked (?:in I/O wait )?for more than")),
    _Pattern("oom-kill", re.compile(r"oom-kill:|Out of memory and no killable processes")),
    _Pattern("oom-kill", re.compile(r"[Oo]ut of memory(?: \(oom_kill_allocating_task\))?: Kill(?:ed)? process"), continues=True),
    _Pattern("oops", re.compile(r"\bBUG: |kernel BUG at |[Uu]nable to handle (?:kernel|page fault)")),
    _Pattern("oops", re.compile(r"general protection fault|(?:invalid opcode|divide error|stack segment): [0-9a-f]+ \[#|\bOops\b"), continues=True),
    _Pattern("warning", re.compile(r"\bWARNING: |\bUBSAN: |page allocation failure: ")),
)  # fmt: skip
# One of these is in every line that a pattern fits, and in few others: looking for them is ten times as fast.
_WORDS = (
    *("panic", "lockup", "LOCKUP", "rcu", "INFO: task", "oom-kill:", "ut of memory", "BUG", "UBSAN", "nable to handle"),
    *("general protection", "invalid opcode", "divide error", "stack segment", "Oops", "WARNING", "allocation failure"),
)  # fmt: skip
_SHORTEST = min(map(len, _WORDS))


def findings(text: str) -> list[Finding]:
    """Return what was found in the text of a console, in its order, at most FINDINGS_PER_KIND of each kind.

    The two lines that Linux prints of one oops, or of one OOM kill, are one finding. Lines end at a line feed.
    """
    return findings_in(enumerate(text.split("\n"), start=1))


def findings_in(lines: Iterable[tuple[int, str]]) -> list[Finding]:
    """Return what was found in lines with their numbers, as findings() does."""
    found: list[Finding] = []
    counts: dict[FindingKind, int] = {}
    for finding in _incidents(lines):
        counts[finding.kind] = counts.get(finding.kind, 0) + 1
        if counts[finding.kind] <= FINDINGS_PER_KIND:
            found.append(finding)
    return found


def _incidents(lines: Iterable[tuple[int, str]]) -> Iterator[Finding]:
    """Yield a finding an incident: a continuing line that is near its beginning is left out, once."""
    begun: Finding | None = None
    for number, line in lines:
        pattern = _pattern_of(line)
        if pattern is None:
            continue
        if pattern.continues and begun is not None and _near(begun, pattern.kind, number):
            begun = None
            continue
        finding = Finding(kind=pattern.kind, line=number, text=printable(line.strip(), TEXT_CHARACTERS))
        begun = None if pattern.continues else finding
        yield finding


def _pattern_of(line: str) -> _Pattern | None:
    if len(line) < _SHORTEST or not any(word in line for word in _WORDS):
        return None
    return next((pattern for pattern in _PATTERNS if pattern.words.search(line)), None)


def _near(begun: Finding, kind: FindingKind, line: int) -> bool:
    return begun.kind == kind and line - begun.line <= REPORT_LINES


def console_check(found: Sequence[Finding]) -> Check:
    """Return whether the console is clean of all that fails a run: one Check of a run's, called CHECK."""
    bad = [finding for finding in found if finding.kind in FAILING]
    if not bad:
        return Check(name=CHECK, outcome="pass")
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    message = f"{bad[0].kind} at line {bad[0].line} of {bad[0].file}: {bad[0].text}{more}"
    return Check(name=CHECK, outcome="fail", message=message)
