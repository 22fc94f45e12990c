"""What a guest says of its balloon's driver, whatever it says."""

from __future__ import annotations

import pytest

from balloonlab.measure.driver import judge
from hostdev.wire.balloon import Feature

# Status 0x0f: acknowledged, driver, DRIVER_OK, FEATURES_OK. Features as Linux 6.12 prints them, bit 0 first.
BITS = 64


def said(status: int, *features: Feature) -> str:
    bits = sum(features)
    return f"{status:#010x} {''.join(str(bits >> bit & 1) for bit in range(BITS))}\n"


def test_a_driver_that_reports_is_not_missing() -> None:
    assert judge(said(0x0F, Feature.REPORTING)) is None
    assert judge(said(0x0F, Feature.STATS_VQ, Feature.REPORTING) + "anything else") is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the guest sees no balloon"),
        (said(0x0B, Feature.REPORTING), "no driver serves the guest's balloon"),
        (said(0x0F, *(set(Feature) - {Feature.REPORTING})), "does not report free pages"),
    ],
)
def test_what_is_missing_is_named(text: str, why: str) -> None:
    assert why in (judge(text) or "")


@pytest.mark.parametrize(
    "text",
    ["0x0f", "fifteen 000001", "0x0f 01\n", "0x0f 00000x\n", "0x0f" + "f" * 5000 + " 000001", "0x\u0660 000001",
     "\x1b[2J" * 100, "0x0f 000001" * 2],
)  # fmt: skip
def test_what_cannot_be_read_is_said_to_be_so(text: str) -> None:
    why = judge(text)
    assert why is not None
    assert why.startswith("unreadable")
    assert why.isprintable()
    assert len(why) < 200
