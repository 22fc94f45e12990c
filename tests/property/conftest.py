"""Says, with --full, how many steps the state machines have run."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.steps import steps


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if settings.get_current_profile_name() == "full":
        for machine, count in steps().items():
            terminalreporter.write_line(f"state machine {machine}: {count} steps")
