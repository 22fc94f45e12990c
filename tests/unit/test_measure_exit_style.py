"""Exit statuses for pipelines and for git bisect run."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from balloonlab.errors import DeviceError, GuestSetupError, UsageError
from balloonlab.measure.exit_style import ABORT, SKIP, Aborting, Style, asked_for, exit_status
from balloonlab.measure.report import Check, Ending, Report
from balloonlab.signals import SignalledError
from guest_images.errors import AgentTimeoutError, KernelError, ModuleMissingError
from hostdev.errors import SetupError, UnsupportedHostError
from qmp_glue.errors import DownloadError, MachineError, QemuExitedError, QemuNotFoundError
from tests.recorded_series import FIGURES, KEPT, made_report, made_run

BROKEN = [Check(name="budget residual_bytes", outcome="fail", message="too much")]
SKIPPED = [Check(name="verify", outcome="skip", message="no /proc/kpageflags")]
UP = {"boot_seconds": 5.0}


@pytest.mark.parametrize(
    ("report", "default", "bisect"),
    [
        (made_report(made_run()), 0, 0),
        (made_report(made_run(checks=SKIPPED)), 0, 0),
        (made_report(made_run(checks=BROKEN)), 1, 1),
        (made_report(made_run(1, KEPT), budgets=BROKEN), 1, 1),
        (made_report(made_run(1, {}, ending="panicked")), 1, SKIP),
        # It came as far as its idle phase.
        (made_report(made_run(1, {"boot_seconds": None}, ending="guest-ended")), 1, 1),
        # A budget on a figure that nobody could measure is broken, and says nothing of the commit.
        (
            made_report(made_run(1, {}, ending="hung"), made_run(2, {}, ending="hung"), budgets=BROKEN),
            1,
            SKIP,
        ),
        (made_report(made_run(1, {}, ending="panicked"), made_run(2)), 1, 0),
        (made_report(made_run(1, {}, ending="panicked"), made_run(2, checks=BROKEN)), 1, 1),
        (made_report(made_run(1), made_run(2, UP, ending="hung")), 1, 1),
    ],
)
def test_reports(report: Report, default: int, bisect: int) -> None:
    assert exit_status("default", report) == default
    assert exit_status("bisect", report) == bisect


@pytest.mark.parametrize(
    "ending",
    ["panicked", "hung", "no-driver", "out-of-memory", "command-failed", "guest-ended", "qemu-ended", "device-ended"],
)  # fmt: skip
def test_an_ending_is_bad_from_when_the_guest_came_up(ending: Ending) -> None:
    before, after = made_report(made_run(1, {}, ending=ending)), made_report(made_run(1, UP, ending=ending))
    assert [exit_status("bisect", one) for one in (before, after)] == [SKIP, 1]
    assert [exit_status("default", one) for one in (before, after)] == [1, 1]


def test_an_arm_that_never_came_up_does_not_judge_the_others() -> None:
    report = made_report(made_run(1, {}, arm="off", ending="hung"), made_run(1, FIGURES))
    off, ours = report.arms
    both = replace(report, arms=[replace(off, checks=BROKEN), ours])
    assert exit_status("bisect", both) == 0


@pytest.mark.parametrize(
    ("error", "default", "bisect"),
    [
        (UsageError("no such file"), 2, ABORT),
        (SetupError("no such folder"), 2, ABORT),
        (MachineError("no such board"), 2, ABORT),
        (DownloadError("no network"), 2, ABORT),
        (QemuNotFoundError("no QEMU"), 3, ABORT),
        (UnsupportedHostError("aarch64"), 3, ABORT),
        (KernelError("cannot be unpacked"), 2, SKIP),
        (ModuleMissingError("no virtio_balloon"), 2, SKIP),
        (AgentTimeoutError("no answer"), 2, SKIP),
        (GuestSetupError("no /proc/kpageflags"), 2, SKIP),
        (DeviceError("did not start"), 2, SKIP),
        (QemuExitedError(1, ["invalid kernel header"]), 2, SKIP),
    ],
)
def test_errors(error: Exception, default: int, bisect: int) -> None:
    assert exit_status("default", error) == default
    assert exit_status("bisect", error) == bisect


@pytest.mark.parametrize(
    ("words", "style"),
    [
        ([], "default"),
        (["compare", "a", "b"], "default"),
        (["compare", "--exit-style", "bisect", "a", "b"], "bisect"),
        (["compare", "a", "b", "--exit-style=bisect"], "bisect"),
        (["compare", "a", "b", "--exit=bisect", "--typo"], "bisect"),
        (["compare", "a", "b", "--exit-style", "default"], "default"),
        (["compare", "a", "b", "--exit-style"], "default"),
        (["compare", "--", "bisect"], "default"),
        (["compare", "--figure", "bisect"], "default"),
    ],
)
def test_the_style_is_known_of_command_lines_that_cannot_be_parsed(words: list[str], style: Style) -> None:
    assert asked_for(words) == style


@pytest.mark.parametrize(
    ("error", "default", "bisect"),
    [
        (SystemExit(2), SystemExit(2), SystemExit(ABORT)),
        (SystemExit(0), SystemExit(0), SystemExit(0)),
        (SystemExit(None), SystemExit(None), SystemExit(None)),
        (ZeroDivisionError("ours"), ZeroDivisionError("ours"), SystemExit(ABORT)),
        (SignalledError(2), SignalledError(2), SignalledError(2)),
    ],
    ids=repr,
)
def test_usage_and_defects_stop_a_bisection(
    error: BaseException,
    default: BaseException,
    bisect: BaseException,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected: dict[Style, BaseException] = {"default": default, "bisect": bisect}
    for style, wanted in expected.items():
        with pytest.raises(type(wanted)) as caught, Aborting(style):
            raise error
        assert caught.value.args == wanted.args
    assert ("ZeroDivisionError: ours" in capsys.readouterr().err) is isinstance(error, ZeroDivisionError)


def test_nothing_happens_to_what_ends_in_order() -> None:
    with Aborting("bisect"):
        status = exit_status("bisect", made_report(made_run()))
    assert status == 0
