"""The screen: lines where there is no terminal, a chart where there is one."""

from __future__ import annotations

import io
import re

from rich.console import Console

from balloonlab.progress import Progress
from balloonlab.timeline import Sample

MIB = 1 << 20


def run_on(console: Console) -> None:
    progress = Progress(console)
    with progress.run(256 * MIB):
        for phase in ("boot", "return"):
            progress.begin(phase)
            progress.sample(Sample(0.0, phase, 100 * MIB, 50 * MIB))
            progress.sample(Sample(0.1, phase, 90 * MIB))
            progress.end(f"[{phase}] is over, " + "and this line is far wider than the console " * 5)


def test_a_pipe_gets_one_line_a_phase_and_no_escape_codes() -> None:
    output = io.StringIO()
    run_on(Console(file=output, width=60))
    lines = output.getvalue().splitlines()
    assert [re.sub(r"\d+\.\d", "0.0", line.partition(",")[0]) for line in lines] == [
        "boot       0.0 s  [boot] is over",
        "return     0.0 s  [return] is over",
    ]
    assert "\x1b" not in output.getvalue()


def test_a_terminal_gets_a_chart_that_goes_away() -> None:
    output = io.StringIO()
    run_on(Console(file=output, width=100, force_terminal=True, color_system=None))
    shown = output.getvalue()
    assert "held by the host 90 MiB   free in the guest 50 MiB" in shown
    assert "█▆" in shown  # of 8 rows of eighths 100 MiB of 256 fill 3 and 1, 90 MiB fill 2 and 6
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    assert shown.rindex("\x1b[?25l") < shown.rindex("\x1b[?25h")


def test_the_narrowest_terminal_is_left_clean_too() -> None:
    output = io.StringIO()
    run_on(Console(file=output, width=1, force_terminal=True, color_system=None))
    shown = output.getvalue()
    assert shown.rindex("\x1b[?25l") < shown.rindex("\x1b[?25h")
