"""What --verify makes of proofs that cannot be had, and of contents; real guests are in tests/guest/test_verify.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from balloonlab.errors import UsageError
from balloonlab.measure.ranges import Places
from balloonlab.measure.report import Check, Outcome
from balloonlab.measure.verify import Verifier, _check_contents, _demanded, _proved
from balloonlab.measure.verify_holes import Step, trace_length
from balloonlab.measure.verify_pages import Pages, check_pages
from balloonlab.rig import Rig, Setup
from guest_images.agent_client import Checked
from guest_images.errors import AgentRefusedError, AgentTimeoutError
from hostdev.pages import Span
from hostdev.trace import TraceFile
from qmp_glue.errors import CommandFailedError, DeadlineError, VmError

MIB = 1 << 20
RIGHT, WRONG = Checked(32 * MIB, 0, None), Checked(8 * MIB, 3, 4097)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (AgentRefusedError("no /proc/kpageflags"), "skip"),
        (CommandFailedError("dump-guest-memory", "GenericError", "not here"), "skip"),
        (AgentTimeoutError("silence"), "fail"),
        (DeadlineError("QEMU does not answer"), "fail"),
        (VmError("gone"), "fail"),
        (UsageError("a damaged trace"), "fail"),
        (OSError(28, "No space left on device"), "fail"),
    ],
)
def test_what_cannot_be_proved_says_why(error: Exception, outcome: Outcome) -> None:
    async def prove() -> Check:
        raise error

    check = asyncio.run(_proved("verify-dump", prove))
    assert (check.name, check.outcome) == ("verify-dump", outcome)
    assert check.message.endswith(str(error))


def test_a_defect_and_a_cancellation_stay_what_they_are() -> None:
    async def prove() -> Check:
        raise AssertionError("a defect")

    async def cancelled() -> Check:
        raise asyncio.CancelledError

    with pytest.raises(AssertionError, match="a defect"):
        asyncio.run(_proved("verify-dump", prove))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(_proved("verify-dump", cancelled))


@pytest.mark.parametrize(
    ("compared", "gone", "outcome", "message"),
    [
        ([RIGHT, RIGHT], [], "pass", "64 MiB of memory in 2 fills compared byte by byte: all as they were written"),
        ([RIGHT, WRONG], [], "fail", "not as it was written: 3 pages in 1 of the fills, the first at byte 4,097 of its fill;"),
        ([WRONG], ["killed"], "fail", "not as it was written"),
        ([RIGHT], ["killed"], "skip", "killed; 32 MiB of memory in 1 fills"),
        ([], [], "skip", "the guest holds nothing with known contents"),
    ],
)  # fmt: skip
def test_contents(compared: list[Checked], gone: list[str], outcome: Outcome, message: str) -> None:
    check = _check_contents(compared, gone)
    assert check.outcome == outcome
    assert message in check.message


@pytest.mark.parametrize(
    ("balloon", "outcomes"),
    [
        ("vhost-user", ["fail", "fail", "fail", "skip"]),
        ("built-in", ["skip", "fail", "fail", "skip"]),
        ("none", ["skip", "fail", "fail", "skip"]),
    ],
)
def test_only_what_arm_and_machine_have_no_way_for_is_skipped(
    balloon: Literal["vhost-user", "built-in", "none"],
    outcomes: list[Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where each proof says that it cannot be made."""

    async def cannot(*_args: object) -> Check:
        raise AgentRefusedError("it is not there")

    for proof in ("_prove_holes", "_prove_pages", "_prove_contents", "_prove_dump"):
        monkeypatch.setattr(Verifier, proof, cannot)
    nothing = cast("Any", None)
    setup = Setup(qemu=nothing, image=nothing, memory_bytes=512 * MIB, balloon=balloon, trace=True)
    checks = asyncio.run(Verifier(Rig(setup, tmp_path), tmp_path).conclude())
    assert [check.outcome for check in checks] == outcomes
    assert all("cannot be proved here: it is not there" in check.message for check in checks)


def test_a_device_whose_disk_was_full_is_not_accused_of_what_its_trace_does_not_tell(tmp_path: Path) -> None:
    nothing = cast("Any", None)
    rig = Rig(Setup(qemu=nothing, image=nothing, memory_bytes=512 * MIB, trace=True), tmp_path)
    trace = TraceFile(rig.device.trace_file)
    verifier = Verifier(rig, tmp_path)
    verifier._steps = [Step("start", "fill", 0, (Span(0, 4096),), trace_length(rig.device.trace_file))]
    rig.device._log_file.write_text("[info] all is well\n")
    accused = asyncio.run(verifier.prove_holes())
    rig.device._log_file.write_text("[warning] the trace is full: No space left on device: nothing more\n")
    excused = asyncio.run(verifier.prove_holes())
    trace.close()
    assert (accused.outcome, excused.outcome) == ("fail", "skip")
    assert "the trace is full: No space left on device" in excused.message


def test_what_was_to_be_proved_and_was_not_has_failed() -> None:
    skipped = Check(name="verify-holes", outcome="skip", message="nothing to prove")
    failed = Check(name="verify-holes", outcome="fail", message="not proved: nothing to prove")
    assert _demanded(skipped) == failed
    assert _demanded(failed) == failed
    passed = Check(name="verify-holes", outcome="pass")
    assert _demanded(passed) == passed


@pytest.mark.parametrize(
    ("judged", "churn", "outcome", "message"),
    [
        (0, 0, "skip", "nothing could be judged"),
        (0, 1, "skip", "the guest is too restless"),
        (8, 1, "skip", "the guest is too restless"),
        (9, 1, "pass", "9 pages"),
    ],
)
def test_a_guest_that_says_nothing_is_not_called_restless(
    judged: int, churn: int, outcome: Outcome, message: str
) -> None:
    check = check_pages(Pages(judged * 4096, (), churn * 4096, {}), Places(()))
    assert check.outcome == outcome
    assert check.message.startswith(message)
