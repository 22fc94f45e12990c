"""The modelled guest against real ones: bytes in each pass, and the time to 50 % and 90 % of the fall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.comparison import TOLERANCE
from balloonlab.demo_run import Plan
from balloonlab.fidelity import Experiment, conclude
from guest_images.agent_client import FillKind
from tests.guest.guests import MIB, booted, setup_for
from tests.guest.test_reporting import FILL

pytestmark = [pytest.mark.guest, pytest.mark.full, pytest.mark.timeout(400)]


Record = Callable[[str, object], None]


@pytest.mark.parametrize("kind", ["anonymous", "tmpfs"])
@pytest.mark.parametrize("suite", ["bookworm-backports", "trixie-backports"])
def test_the_model_predicts_a_real_guest(
    suite: str, kind: FillKind, tmp_path: Path, record_property: Record
) -> None:
    setup = replace(setup_for(suite), trace=True)
    with booted(setup, tmp_path) as guest:
        recording = guest.wait(Experiment(guest.rig, Plan(FILL, kind), tmp_path).record())
    compared = conclude(recording, tmp_path)
    comparison = compared.comparison
    record_property("fidelity_kernel", f"{comparison.kernel} ({suite}), {kind}")
    record_property("fidelity_real_passes_mib", [one.bytes // MIB for one in recording.passes])
    record_property("fidelity_model_passes_mib", [one.bytes // MIB for one in compared.modelled])
    for one in comparison.durations:
        name = f"fidelity_seconds_to_{one.share * 100:.0f}_percent"
        record_property(name, f"{one.real:.2f} real, {one.model:.2f} model, {one.off * 100:.1f} % off")
    record_property("fidelity_seconds_between_real_passes", round(comparison.interval_seconds, 3))
    record_property("fidelity_per_cpu_mib", comparison.per_cpu_bytes // MIB)
    assert comparison.notes == []
    assert comparison.real_bytes > FILL * 3 // 4
    assert abs(comparison.model_bytes - comparison.real_bytes) <= TOLERANCE * comparison.real_bytes
    # What was reported is what the host gave up: the comparison is about memory and not about messages.
    assert abs(comparison.footprint_fall_bytes - comparison.real_bytes) <= TOLERANCE * comparison.real_bytes
