"""balloonlab compare: verdicts, what else differs, what is refused, what is shown, and the exit status."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from balloonlab import cli
from balloonlab.errors import UsageError
from balloonlab.measure.compare import _show
from balloonlab.measure.conditions import conditions, measured_otherwise, scenarios_differ
from balloonlab.measure.differences import Bar, Comparison, compare, verdict
from balloonlab.measure.figures import find_figure
from balloonlab.measure.report import Check, Report
from balloonlab.measure.scenario import Budget, Fill, Scenario
from balloonlab.measure.scenario_file import STANDARD, check
from balloonlab.measure.statistics import Interval, Shift
from balloonlab.progress import Progress
from tests.recorded_series import FIGURES, KEPT, MIB, leave, made_report, made_run, repeated

FIVE = [160.0, 161.0, 159.0, 162.0, 160.5]


def mebibytes(values: Sequence[float]) -> list[float]:
    return [value * MIB for value in values]


def only(comparison: Comparison, figure: str) -> str:
    return next(one.verdict for one in comparison.figures if one.figure == figure)


@pytest.mark.parametrize(
    ("figure", "estimate", "interval", "expected"),
    [
        # Noise and threshold are 5 MiB here, and what two runs may be apart 6 MiB.
        ("residual", 20.0 * MIB, (10.0 * MIB, 30.0 * MIB), "worse"),
        ("residual", -20.0 * MIB, (-30.0 * MIB, -10.0 * MIB), "better"),
        ("returned", -20.0 * MIB, (-30.0 * MIB, -10.0 * MIB), "worse"),
        ("returned", 20.0 * MIB, (10.0 * MIB, 30.0 * MIB), "better"),
        ("released", 20.0 * MIB, (10.0 * MIB, 30.0 * MIB), "changed"),
        ("residual", 20.0 * MIB, (-1.0, 30.0 * MIB), "no-confidence"),
        ("residual", 20.0 * MIB, (0.0, 30.0 * MIB), "no-confidence"),
        ("residual", 20.0 * MIB, None, "worse"),
        ("residual", 6.01 * MIB, None, "worse"),
        ("residual", 6.0 * MIB, None, "no-confidence"),
        ("residual", 5.0 * MIB, None, "same"),
        ("released", 20.0 * MIB, None, "changed"),
        ("released", 20.0 * MIB, (-1.0, 30.0 * MIB), "no-confidence"),
        ("residual", 5.0 * MIB, (-5.0 * MIB, 5.0 * MIB), "same"),
        ("residual", 5.0 * MIB, (4.0 * MIB, 5.01 * MIB), "no-confidence"),
        ("residual", 1.0 * MIB, (-5.01 * MIB, 3.0 * MIB), "no-confidence"),
        ("residual", 7.0 * MIB, (4.0 * MIB, 8.0 * MIB), "worse"),
    ],
)
def test_verdicts(figure: str, estimate: float, interval: tuple[float, float] | None, expected: str) -> None:
    found = Shift(estimate, Interval(*interval, 0.95) if interval else None)
    assert verdict(find_figure(figure), found, 5.0 * MIB, 6.0 * MIB) == expected


def test_a_regression_of_five_runs() -> None:
    old = repeated("residual_bytes", mebibytes(FIVE))
    new = repeated("residual_bytes", mebibytes([value + 30 for value in FIVE]))
    comparison = compare(old, new, "ours", [], Bar())
    assert comparison.regressed
    assert {one.figure: one.verdict for one in comparison.figures} == {
        "boot_seconds": "same",
        "floor_bytes": "same",
        "residual_bytes": "worse",
        "returned_bytes": "same",
        "t90_seconds": "same",
        "reports": "same",
    }
    found = next(one for one in comparison.figures if one.figure == "residual_bytes")
    assert found.difference == 30 * MIB
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low <= found.difference <= found.high
    # Five figures can be worse: each has to have 99 %.
    assert comparison.judged == 5
    assert comparison.each == pytest.approx(0.99)
    assert found.confidence == pytest.approx(1 - 2 / 252)
    assert compare(old, new, "ours", ["residual_bytes", "reports"], Bar()).each == pytest.approx(0.95)
    assert not compare(new, old, "ours", [], Bar()).regressed


def test_runs_that_differ_as_much_among_themselves() -> None:
    old = repeated("t90_seconds", [2.0, 6.0, 3.0, 9.0, 4.0])
    new = repeated("t90_seconds", [3.0, 8.0, 6.0, 5.0, 11.0])
    comparison = compare(old, new, "ours", ["t90_seconds"], Bar())
    assert only(comparison, "t90_seconds") == "no-confidence"
    assert not comparison.regressed


@pytest.mark.parametrize(
    ("runs", "each", "alone"),
    [
        ([5.0], "no-confidence", "no-confidence"),
        ([5.0, 5.1, 5.2], "no-confidence", "worse"),
        ([5.0, 5.1, 5.2, 5.3, 5.4], "worse", "worse"),
    ],
)
def test_times_of_few_runs_are_judged_if_they_are_asked_for(runs: list[float], each: str, alone: str) -> None:
    """They differ from run to run; and of all figures of a kernel compared with itself some would be worse."""
    old = repeated("boot_seconds", runs)
    new = repeated("boot_seconds", [seconds + 2 for seconds in runs])
    assert only(compare(old, new, "ours", [], Bar()), "boot_seconds") == each
    assert only(compare(old, new, "ours", ["boot_seconds"], Bar()), "boot_seconds") == alone
    assert only(compare(new, old, "ours", [], Bar()), "boot_seconds") == each.replace("worse", "better")


def test_a_run_that_did_not_come_to_its_end_is_a_regression() -> None:
    new = made_report(made_run(1), made_run(2, {"boot_seconds": 5.0}, ending="panicked"))
    comparison = compare(made_report(made_run()), new, "ours", [], Bar())
    assert comparison.regressed
    assert comparison.failures == ["run 2 of NEW ended panicked: the guest panicked in a test"]
    # That of another arm is not.
    other = made_report(made_run(), made_run(1, {}, arm="off", ending="hung"))
    assert not compare(made_report(made_run()), other, "ours", [], Bar()).regressed
    # Its figures are whole where only the driver was missing, and are shown.
    deaf = made_report(made_run(1, KEPT, ending="no-driver"))
    comparison = compare(made_report(made_run()), deaf, "ours", [], Bar())
    assert comparison.failures == [
        "run 1 of NEW ended no-driver: the guest no-driver in a test",
        "t90_seconds was measured in OLD, and not in NEW",
    ]
    assert only(comparison, "returned_bytes") == "worse"
    # A run that proved something has figures of its own.
    proof = replace(made_run(2, KEPT), counted=False)
    wrong = replace(proof, checks=[Check(name="verify-holes", outcome="fail", message="a page too many")])
    assert compare(made_report(made_run()), made_report(made_run(), wrong), "ours", [], Bar()).failures == [
        "run 2 of NEW: verify-holes: a page too many"
    ]
    assert not compare(made_report(made_run()), made_report(made_run(), proof), "ours", [], Bar()).regressed
    cut = replace(made_report(made_run()), planned=5)
    assert compare(made_report(made_run()), cut, "ours", [], Bar()).failures == [
        "NEW was interrupted, 4 of its 5 runs are missing"
    ]
    # And no run at all is left to be compared.
    none = compare(made_report(made_run()), made_report(made_run(1, {}, ending="hung")), "ours", [], Bar())
    assert none.failures == ["run 1 of NEW ended hung: the guest hung in a test"]
    assert {one.verdict for one in none.figures} == {"not-measured"}


def test_a_figure_that_is_asked_for_must_be_there() -> None:
    old, new = made_report(made_run()), made_report(made_run(1, KEPT))
    comparison = compare(old, new, "ours", ["t90_seconds"], Bar())
    assert comparison.regressed
    assert comparison.failures == ["t90_seconds was measured in OLD, and not in NEW"]
    with pytest.raises(UsageError, match="OLD has no t90_seconds, it was not measured there"):
        compare(new, old, "ours", ["t90_seconds"], Bar())
    phase = compare(old, new, "ours", ["return.peak_bytes"], Bar())
    assert [(one.figure, one.verdict) for one in phase.figures] == [("return.peak_bytes", "same")]
    everything = compare(old, new, "ours", [], Bar(threshold=10.0))
    assert only(everything, "t90_seconds") == "not-measured"
    assert everything.regressed
    assert everything.failures == ["t90_seconds was measured in OLD, and not in NEW"]
    assert not compare(new, old, "ours", [], Bar(threshold=10.0)).regressed
    assert not compare(old, new, "ours", ["floor_bytes"], Bar()).regressed


def test_an_old_report_without_a_measured_run() -> None:
    old = made_report(made_run(1, {}, ending="hung"))
    with pytest.raises(UsageError, match="OLD has no run of arm ours that was measured to its end"):
        compare(old, made_report(made_run()), "ours", [], Bar())


def test_what_makes_scenarios_different() -> None:
    guest = STANDARD.guest
    assert scenarios_differ(STANDARD, STANDARD) == []
    same = replace(
        STANDARD,
        name="other",
        guest=replace(guest, kernel="/a/bzImage", modules="/a/m", flavour="amd64"),
        budgets=(Budget(figure="peak_bytes", most=1.0),),
    )
    assert scenarios_differ(STANDARD, same) == []
    with_files = [
        replace(STANDARD, guest=replace(guest, files={"/bin/a": f"/{folder}/a"})) for folder in ("x", "y")
    ]
    assert scenarios_differ(*with_files) == []
    assert scenarios_differ(STANDARD, with_files[0]) == ["guest.files./bin/a: nothing in OLD, a in NEW"]
    larger = check(Scenario(name="a", guest=replace(guest, cpus=2), phases=(Fill(size=MIB),)))
    assert scenarios_differ(STANDARD, larger) == [
        "guest.cpus: 1 in OLD, 2 in NEW",
        "phases: 4 of them in OLD, 2 of them in NEW",
    ]
    phases = (*STANDARD.phases[:2], Fill(name="fill", size=MIB), STANDARD.phases[3])
    assert scenarios_differ(STANDARD, replace(STANDARD, phases=phases)) == [
        "phases[3].size: 256 MiB in OLD, 1.0 MiB in NEW"
    ]
    assert scenarios_differ(STANDARD, replace(STANDARD, guest=replace(guest, memory=513 << 20))) == [
        "guest.memory: 512 MiB in OLD, 513 MiB in NEW"
    ]
    phases = (*STANDARD.phases[:2], Fill(name="fill", size=(256 << 20) + 4096), STANDARD.phases[3])
    assert scenarios_differ(STANDARD, replace(STANDARD, phases=phases)) == [
        "phases[3].size: 268435456 bytes in OLD, 268439552 bytes in NEW"
    ]
    # What auto comes to is in the report.
    assert scenarios_differ(STANDARD, replace(STANDARD, guest=replace(guest, accelerator="tcg"))) == []


def test_what_else_makes_two_reports_ones_of_different_things() -> None:
    report = made_report(made_run())
    with_files = replace(report, files={"/bin/a": "1", "/bin/b": "1"})
    assert measured_otherwise(report, with_files) == []
    assert measured_otherwise(with_files, with_files) == []
    assert measured_otherwise(with_files, replace(report, files={"/bin/a": "1", "/bin/b": "2"})) == [
        "guest.files./bin/b: not the same contents"
    ]
    assert measured_otherwise(report, replace(report, accelerator="kvm")) == [
        "accelerator: tcg in OLD, kvm in NEW"
    ]


def test_what_else_differs_is_said() -> None:
    old, new = made_report(made_run()), made_report(made_run(), kernel="6.13.0")
    new = replace(new, jobs=2, environment={"host": {"cpus": 4, "settings": {"swappiness": "60"}}})
    assert conditions(old, old) == []
    assert conditions(old, new) == [
        "kernel: 6.12.1 in OLD, 6.13.0 in NEW",
        "vhost-user-balloon: 1.0 in OLD, nothing in NEW",
        "jobs: 1 in OLD, 2 in NEW",
        "host.cpus: 2 in OLD, 4 in NEW",
    ]
    assert compare(old, new, "ours", [], Bar()).conditions == conditions(old, new)
    assert "host: something in OLD, nothing in NEW" in conditions(old, replace(old, environment={}))


# The command


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run folders by what became of them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    leave(made_report(made_run()), tmp_path / "good")
    leave(made_report(made_run(1, KEPT)), tmp_path / "kept")
    leave(made_report(made_run(1, {}, ending="panicked")), tmp_path / "never")
    leave(made_report(made_run(1, {"boot_seconds": 5.0}, ending="panicked")), tmp_path / "late")
    leave(made_report(made_run(1, {}, ending="hung"), made_run(2)), tmp_path / "flaky")
    leave(made_report(made_run(), scenario=replace(STANDARD, phases=())), tmp_path / "other")
    leave(made_report(made_run(arm="qemu")), tmp_path / "qemu")
    leave(replace(made_report(made_run()), planned=2), tmp_path / "cut")
    leave(replace(made_report(made_run()), accelerator="kvm"), tmp_path / "kvm")
    lost = Check(name="verify-contents", outcome="fail", message="4 pages lost")
    leave(made_report(made_run(checks=[lost])), tmp_path / "lost")
    leave(made_report(made_run(), budgets=[replace(lost, name="budget a")]), tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no JSON")
    return tmp_path


def run(*words: str) -> int:
    try:
        return cli.main(["compare", *words])
    except SystemExit as end:
        return int(str(end.code))


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("words", "default", "bisect"),
    [
        ("good good", 0, 0),
        ("good/result.json good/result.json", 0, 0),
        ("good kept", 1, 1),
        ("kept good", 0, 0),
        ("good kept --figure floor", 0, 0),
        ("good kept --figure floor --figure returned", 1, 1),
        ("good kept --figure t90", 1, 1),
        ("good never", 1, 125),
        ("good late", 1, 1),
        ("good flaky", 1, 0),
        ("good cut", 1, 0),
        ("good other", 2, 255),
        ("good other --force", 0, 0),
        ("good kvm", 2, 255),
        ("good kvm --force", 0, 0),
        ("good lost", 1, 1),
        ("good broken", 1, 1),
        ("lost good", 0, 0),
        ("good qemu", 2, 255),
        ("qemu qemu", 0, 0),
        ("good good --arm qemu", 2, 255),
        ("good nowhere", 2, 125),
        ("good empty", 2, 125),
        ("good text", 2, 255),
        ("nowhere good", 2, 255),
        ("never good", 2, 255),
        ("kept good --figure t90", 2, 255),
        ("good", 2, 255),
        ("good kept --figure residul", 2, 255),
        ("good kept --colour", 2, 255),
        ("good kept --threshold x", 2, 255),
    ],
)
def test_exit_statuses(words: str, default: int, bisect: int) -> None:
    assert run(*words.split()) == default
    assert run(*words.split(), "--exit-style=bisect") == bisect


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("good other", r"OLD and NEW did not measure the same \(phases: 4 of them in OLD, .*with --force"),
        ("good kvm", r"did not measure the same \(accelerator: tcg in OLD, kvm in NEW\)"),
        ("good qemu", "OLD and NEW have no arm in common: measure one of them again"),
        ("good good --arm qemu", "--arm qemu is not in both: choose one of ours"),
        ("good text", "text is no result of balloonlab measure"),
        ("good nowhere", "nowhere: No such file or directory: name a run folder"),
        ("good good --threshold 5.5.5", "--threshold 5.5.5 is no percentage: write it like 5%"),
        ("good good --confidence 100%", r"--confidence 100%: give 50% to 99\.9%, or 0\.5 to 0\.999"),
        ("good good --confidence 95", "--confidence 95: give 50% to"),
        ("good good --confidence often", "--confidence often is no percentage"),
        (
            "good good --figure residul",
            "no figure 'residul', did you mean residual\\? choose one of boot_seconds",
        ),
        ("good good --figure return.paek", "no figure 'return.paek', did you mean peak\\? choose one of"),
        ("good good --figure x", "there is no figure 'x': choose one of"),
    ],
)
def test_what_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words.split()) == 2
    output, error = capsys.readouterr()
    assert not output
    assert error.count("\n") == 1
    assert re.search(said, error)


@pytest.mark.usefixtures("folders")
def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("good", "kept") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "figure          old      new      shift                interval       verdict",
        "boot_seconds    5.00 s   5.00 s   none                 one run: none  same",
        "floor_bytes     160 MiB  160 MiB  none                 one run: none  same",
        "residual_bytes  164 MiB  410 MiB  +246 MiB (+150.0 %)  one run: none  worse",
        "returned_bytes  256 MiB  10 MiB   -246 MiB (-96.1 %)   one run: none  worse",
        "t90_seconds     4.00 s   -        -                    -              not-measured",
        "reports         90       90       none                 one run: none  same",
        (
            "note        one run on a side gives no confidence: of what was not named, only a shift that runs of one guest "
            "never had is called better or worse"
        ),
        "note        measure with --repeat 5 for 95 % of all together",
        "failure     t90_seconds was measured in OLD, and not in NEW",
        "NEW is WORSE than OLD: residual_bytes, returned_bytes.",
    ]


@pytest.mark.usefixtures("folders")
def test_exact_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("good", "kept", "--json", "--figure", "residual", "--confidence", "0.9") == 1
    output = capsys.readouterr().out
    comparison = msgspec.json.decode(output, type=Comparison, strict=True)
    assert comparison.regressed
    assert comparison.confidence == pytest.approx(0.9)
    assert [one.difference for one in comparison.figures] == [246.0 * MIB]
    assert json.loads(output)["schema"] == 1


def shown(
    old: Report, new: Report, bar: Bar, *, terminal: bool, named: Sequence[str] = ("residual_bytes",)
) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, no_color=True, soft_wrap=False)
    _show(compare(old, new, "ours", named, bar), Progress(console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_few_runs_say_which_confidence_they_give(*, terminal: bool) -> None:
    old = repeated("residual_bytes", mebibytes([160.0, 162.0, 161.0]))
    new = repeated("residual_bytes", mebibytes([190.0, 194.0, 191.0]))
    text = shown(old, new, Bar(), terminal=terminal)
    assert "+28 MiB to +34 MiB at 90 %" in text
    assert "so few runs give 90 % at most, not 95 %: measure with --repeat 4\n" in text
    assert "NEW is WORSE than OLD: residual_bytes." in text
    assert "so few" not in shown(old, new, Bar(confidence=0.9), terminal=terminal)


def test_many_figures_ask_for_more_of_each() -> None:
    """Each could be worse by chance; five runs give 99.2 % at most."""
    old = repeated("residual_bytes", mebibytes(FIVE))
    new = repeated("residual_bytes", mebibytes([value + 30 for value in FIVE]))
    text = shown(old, new, Bar(confidence=0.98), terminal=False, named=())
    assert "so few runs give 99.21 % at most, not 99.6 %: of what was not named, only a shift" in text
    assert "measure with --repeat 6 for 98 % of all together\n" in text


def test_failures_and_conditions_are_shown() -> None:
    old = made_report(made_run(1, FIGURES))
    new = made_report(
        made_run(1),
        made_run(2, {}, ending="panicked", checks=[Check(name="a", outcome="fail", message="b")]),
        kernel="6.13.0",
    )
    text = shown(old, new, Bar(), terminal=False)
    assert "differs     kernel: 6.12.1 in OLD, 6.13.0 in NEW" in text
    assert "failure     run 2 of NEW ended panicked: the guest panicked in a test" in text
    assert "failure     run 2 of NEW: a: b\n" in text
    assert text.endswith(
        "NEW is WORSE than OLD: run 2 of NEW ended panicked: the guest panicked in a test.\n"
    )
    assert shown(old, old, Bar(), terminal=False).endswith("NEW is no worse than OLD.\n")


def test_what_cannot_be_told_is_named() -> None:
    old, new = repeated("boot_seconds", [5.0]), repeated("boot_seconds", [9.0])
    text = shown(old, new, Bar(), terminal=False, named=())
    assert text.endswith("Nothing shows that NEW is worse than OLD; without confidence: boot_seconds.\n")
    # Which way reports go is neither better nor worse.
    old, new = repeated("reports", [5.0, 6.0]), repeated("reports", [5.0, 9.0])
    assert shown(old, new, Bar(), terminal=False, named=()).endswith("NEW is no worse than OLD.\n")


def test_a_gap_far_over_noise_and_threshold_needs_only_its_own_confidence() -> None:
    """Four runs have 97 %: of five figures together 95 % takes 99 % each."""
    four = [0.02, 0.03, 0.025, 0.021]
    old = repeated("release_p99_seconds", four)
    assert (
        only(
            compare(old, repeated("release_p99_seconds", [0.1 + one for one in four]), "ours", [], Bar()),
            "release_p99_seconds",
        )
        == "worse"
    )
    for added, runs in ((0.009, 4), (0.1, 3), (0.1, 1)):
        before = repeated("release_p99_seconds", four[:runs])
        after = repeated("release_p99_seconds", [added + one for one in four[:runs]])
        comparison = compare(before, after, "ours", [], Bar())
        assert only(comparison, "release_p99_seconds") == "no-confidence"
        assert not comparison.regressed


@pytest.mark.parametrize(
    ("delay_ms", "expected"), [(None, "worse"), (2000, "worse"), (20000, "no-confidence")]
)
def test_a_guest_that_reports_less_often_gives_back_less_evenly(delay_ms: int | None, expected: str) -> None:
    guest = replace(STANDARD.guest, page_reporting_delay_ms=delay_ms)
    old, new = (
        replace(repeated("t90_seconds", [seconds]), scenario=replace(STANDARD, guest=guest))
        for seconds in (4.0, 14.0)
    )
    assert only(compare(old, new, "ours", [], Bar()), "t90_seconds") == expected
