"""Says, with --full, how many steps the state machines have run."""

from __future__ import annotations

from hypothesis import settings
from pytest import TerminalReporter

from tests.steps import steps


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if settings.get_current_profile_name() == "full":
        for machine, count in steps().items():
            terminalreporter.write_line(f"state machine {machine}: {count} steps")
