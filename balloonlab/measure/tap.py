"""A report as TAP, the Test Anything Protocol, for prove and the pipelines that read it: the cases of cases.py.

Version 13, which everything reads that reads YAML blocks at all. A run's first line has its figures, a failed one what
failed. Guests write some of the text: it stands only in double-quoted YAML scalars of printable characters, so that no
line of a guest's can begin as one of ours does.

Pure. Used by outputs.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from balloonlab.measure.cases import Case, cases
from balloonlab.measure.report import Report
from balloonlab.printable import printable

VERSION = "TAP version 13"
# As long as anything here says in one line.
MESSAGE_CHARACTERS = 2000
NAME_CHARACTERS = 200


def tap(report: Report) -> str:
    """Return the TAP document: version, plan, one line a case, with YAML blocks."""
    counted = cases(report)
    lines = [VERSION, f"1..{len(counted)}"]
    for number, case in enumerate(counted, start=1):
        lines.extend(_lines(number, case))
    return "\n".join(lines) + "\n"


def _lines(number: int, case: Case) -> Iterator[str]:
    word = "not ok" if case.outcome == "fail" else "ok"
    skip = f" # SKIP {_description(case.message)}" if case.outcome == "skip" else ""
    yield f"{word} {number} - {_description(f'{case.arm} {case.name}')}{skip}"
    block = list(_block(case))
    if block:
        yield from ("  ---", *(f"  {line}" for line in block), "  ...")


def _description(text: str) -> str:
    """A # would begin a directive; readers do not agree on how to escape one."""
    return printable(text, NAME_CHARACTERS).replace("#", "_").replace("\\", "/")


def _block(case: Case) -> Iterator[str]:
    if case.outcome == "fail":
        yield f"message: {_scalar(case.message)}"
        yield "severity: fail"
    if case.ending and case.run is not None and case.run.counted and case.run.figures:
        yield "figures:"
        for name, value in case.run.figures.items():
            yield f"  {_scalar(name)}: {'null' if value is None else repr(float(value))}"


def _scalar(text: str) -> str:
    """A JSON string is a YAML one; of printable characters it needs no escapes but those of quotes and backslashes."""
    return json.dumps(printable(text, MESSAGE_CHARACTERS), ensure_ascii=False)
