"""What a person sees while a run goes on: a moving chart on a terminal, one line a phase elsewhere.

Only shows; what is true is in the samples. rich decides what is a terminal, and honours NO_COLOR and its like.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from balloonlab.sizes import human
from balloonlab.timeline import Sample

CHART_ROWS = 8
REFRESHES_PER_SECOND = 8
# The samples that the chart remembers: two minutes at ten a second.
CHART_SAMPLES = 1200

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def bars(values: list[float], top: float, width: int, rows: int) -> list[str]:
    """Draw values as columns of eighth blocks, newest at the right. Pure. Returns rows of at most width characters."""
    if not values or top <= 0:
        return [""] * rows
    chosen = (
        [values[(position + 1) * len(values) // width - 1] for position in range(width)]
        if len(values) > width
        else values
    )
    levels = [round(min(value / top, 1.0) * rows * 8) for value in chosen]
    return [
        "".join(_EIGHTHS[max(0, min(8, level - 8 * row))] for level in levels) for row in reversed(range(rows))
    ]  # fmt: skip


class _Chart:
    """The footprint so far, as wide as the console."""

    def __init__(self, memory_bytes: int) -> None:
        self.values: list[float] = []
        self._top = float(memory_bytes)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for row in bars(self.values[-CHART_SAMPLES:], self._top, options.max_width - 2, CHART_ROWS):
            yield Text(row, style="green", no_wrap=True)


class Progress:
    """The screen of one command."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._chart = _Chart(1)
        self._phase = ""
        self._phase_started = 0.0
        self._last: Sample | None = None
        self._memfree: int | None = None

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    @contextmanager
    def run(self, memory_bytes: int) -> Iterator[None]:
        """Show a run of a guest with this much memory."""
        self._chart = _Chart(memory_bytes)
        self._last, self._memfree = None, None
        if not self.console.is_terminal:
            yield
            return
        with Live(
            get_renderable=self._render,
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        ):
            yield

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self._phase, self._phase_started = phase, time.monotonic()

    def end(self, text: str) -> None:
        """The phase has ended, with this to say."""
        seconds = time.monotonic() - self._phase_started
        self.say(f"{self._phase:<7} {seconds:6.1f} s  {text}")

    def sample(self, sample: Sample) -> None:
        """Take a sample into the chart."""
        self._last = sample
        self._memfree = (
            sample.guest_memfree_bytes if sample.guest_memfree_bytes is not None else self._memfree
        )
        self._chart.values.append(sample.footprint_bytes)

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        seconds = time.monotonic() - self._phase_started
        footprint = human(self._last.footprint_bytes) if self._last else "-"
        free = human(self._memfree) if self._memfree is not None else "-"
        table.add_row(
            Text(f"{self._phase}  {seconds:.1f} s   held by the host {footprint}   free in the guest {free}")
        )
        table.add_row(self._chart)
        return table
