"""What all tests share: how a missing precondition is treated, and the settings of hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# Derandomized: a test either passes or fails, whoever runs it. No deadline: nothing here asserts on speed.
settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# For scripts/test --full: other examples each time, and many more.
settings.register_profile(
    "full", parent=settings.get_profile("project"), derandomize=False, max_examples=1000
)
settings.load_profile("project")


@pytest.fixture
def unmet() -> Callable[[str], None]:
    """Call with a reason when this machine lacks something: a skip for a user, a failure where CI=true."""

    def report(reason: str) -> None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have what this test needs: {reason}")
        pytest.skip(reason)

    return report
