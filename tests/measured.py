"""Reports as a measurement leaves them, made without one: several arms and runs, all endings, and guests that lie.

For tests of what shows and compares reports. Values are near those that Debian's 6.12 kernel has with 512 MiB.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from balloonlab.measure.console import console_check, findings
from balloonlab.measure.report import (
    NAME,
    SCHEMA,
    ArmResult,
    Check,
    Ending,
    Histogram,
    PhaseResult,
    Report,
    Run,
    Spread,
)
from balloonlab.measure.scenario import Arm, Boot, Budget, Fill, Free, GuestSpec, Idle, Scenario
from balloonlab.results import write_json
from balloonlab.timeline import Sample, write_csv

MIB = 1 << 20
GIB_MINUTE = 60 * (1 << 30)
FILL = 256 * MIB
# A panic as Linux printed it on a real guest's console: two OOM kills, and then a crash that was asked for.
PANIC = (Path(__file__).parent / "unit" / "recorded" / "console-panic.log").read_bytes().decode()
# What a guest may write to get out of where its text is shown.
HOSTILE = (
    "[    1.0] BUG: </script><script>document.title='owned'</script>\n"
    "]]> <!-- --> & \x00\x01\x1b[31mred\x1b[0m \ufffe \u202eover | `tick` ```\n"
    "not ok 1 - forged\n1..99\nBail out!\n  ...\n</pre></details><img src=x onerror=alert(1)>\n"
    "[    2.0] WARNING: CPU: 0 PID: 1 at mm/page_alloc.c:1 <b>bold</b> {{7*7}}\n"
)

SCENARIO = Scenario(
    name="standard",
    guest=GuestSpec(),
    phases=(
        Boot(name="boot"),
        Idle(name="floor"),
        Fill(name="fill", size=FILL),
        Free(name="return"),
    ),
    budgets=(Budget(figure="residual_bytes", most=float(64 * MIB)), Budget(figure="t90_seconds", most=10.0)),
)
# What is left of the fill: reported blocks come back with our device, and nothing does without reporting.
_KEPT: dict[Arm, float] = {"ours": 0.06, "qemu": 0.09, "off": 1.0}


def samples(arm: Arm = "ours", number: int = 1, *, until: str = "return") -> list[Sample]:
    """A run ten times a second: boot, 6 s of rest, a fill of 256 MiB, a free that comes back in passes of 2 s."""
    boot = 4.2 + 0.3 * number
    begins = {"boot": 0.0, "floor": boot, "fill": boot + 6.2, "return": boot + 8.4}
    end = {"boot": boot, "floor": begins["fill"], "fill": begins["return"], "return": boot + 18.6}[until]
    return [_sample(arm, number, tick / 10, begins) for tick in range(int(end * 10))]


def _sample(arm: Arm, number: int, seconds: float, begins: dict[str, float]) -> Sample:
    phase = next(name for name, begin in reversed(begins.items()) if seconds >= begin)
    boot, since = begins["floor"], seconds - begins[phase]
    booted, rest = (96 + number) * MIB, (96 + number - (0 if arm == "off" else 14)) * MIB
    kept = {
        "boot": booted * min(1.0, since / boot),
        "floor": rest if since > 2 else booted,
        "fill": rest + FILL * min(1.0, since / 0.7),
        "return": rest + FILL * max(_KEPT[arm], 1 - 0.25 * int(since / 2)),
    }[phase]
    looked = seconds >= boot and round(seconds * 10) % 5 == 0
    free = 512 * MIB - round(rest + (FILL * min(1.0, since / 0.7) if phase == "fill" else 0)) + 30 * MIB
    named = round((rest + FILL - kept) if phase == "return" else 0)
    return Sample(
        seconds,
        phase,
        round(kept),
        free if looked else None,
        named if looked and arm == "ours" else None,
        named if looked and arm == "ours" else None,
        named // (4 * MIB) if looked and arm == "ours" else None,
    )


def run(arm: Arm = "ours", number: int = 1, *, ending: Ending = "measured", console: str = "") -> Run:
    """A run with figures that follow from its samples. console: what is found in it is found."""
    taken = samples(arm, number, until="return" if ending == "measured" else "floor")
    found = findings(console)
    return Run(
        arm=arm,
        number=number,
        folder=f"{arm}-{number}",
        ending=ending,
        why="" if ending == "measured" else "it said nothing for 60 s",
        kernel="6.12.95+deb12-cloud-amd64",
        figures=figures(arm, taken),
        phases=phases(taken),
        release_latency=histogram(number) if arm == "ours" else None,
        findings=found,
        checks=[Check(name="verify-contents", outcome="pass"), console_check(found)],
        qemu_argv=["qemu-system-x86_64", "-machine", "q35"],
        device_argv=["vhost-user-balloon", "--socket-path=/run/b"] if arm == "ours" else [],
    )


def figures(arm: Arm, taken: list[Sample]) -> dict[str, float | None]:
    """Figures of a run, some of them as they are where there was nothing to measure."""
    ended = taken[-1].phase == "return"
    held = [sample.footprint_bytes for sample in taken]
    values: dict[str, float | None] = {
        "boot_seconds": next((sample.seconds for sample in taken if sample.phase == "floor"), None),
        "floor_bytes": float(held[-1]),
        "peak_bytes": float(max(held)),
        "residual_bytes": float(held[-1]) if ended else None,
        "t90_seconds": None if arm == "off" or not ended else 8.0 + held[0] / MIB / 100,
        "footprint_gib_minutes": sum(held) / 10 / GIB_MINUTE,
        "release_p99_seconds": 0.0042 if arm == "ours" else None,
        "device_cpu_seconds": 0.31 if arm == "ours" else None,
        "reports": 62.0 if arm == "ours" else None,
    }
    named = {f"{phase.name}.peak_bytes": float(phase.peak_bytes) for phase in phases(taken)}
    return {**values, **named}


def phases(taken: list[Sample]) -> list[PhaseResult]:
    """The phases of samples."""
    results = []
    for name in dict.fromkeys(sample.phase for sample in taken):
        own = [sample for sample in taken if sample.phase == name]
        results.append(
            PhaseResult(
                name=name,
                do={"floor": "idle", "return": "free"}.get(name, name),
                begin=own[0].seconds,
                seconds=own[-1].seconds - own[0].seconds,
                footprint_gib_minutes=sum(sample.footprint_bytes for sample in own) / 10 / GIB_MINUTE,
                peak_bytes=max(sample.footprint_bytes for sample in own),
                end_bytes=own[-1].footprint_bytes,
                settled={"floor": True, "return": True}.get(name),
            )
        )
    return results


def histogram(number: int) -> Histogram:
    """Release latencies from 0.1 ms to 100 ms."""
    bounds = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]
    return Histogram(bounds=bounds, counts=[0, 3, 21 + number, 30, 7, 1, 0, 0])


def spread(values: list[float]) -> Spread:
    """The spread of an arm, quartiles taken as the ends: nothing here rests on them."""
    ranked = sorted(values)
    return Spread(
        median=ranked[len(ranked) // 2],
        low=ranked[0],
        high=ranked[-1],
        least=ranked[0],
        most=ranked[-1],
        runs=len(ranked),
    )


def arm_result(arm: Arm, runs: list[Run], checks: list[Check] | None = None) -> ArmResult:
    """The figures of an arm over its measured runs, with the checks of its budgets."""
    measured = [run.figures for run in runs if run.arm == arm and run.ending == "measured"]
    names = dict.fromkeys(name for figures in measured for name in figures)
    taken = {name: [value for figures in measured if (value := figures[name]) is not None] for name in names}
    return ArmResult(
        arm=arm,
        figures={name: spread(values) for name, values in taken.items() if values},
        checks=checks or [],
    )


def report(runs: list[Run] | None = None, **changes: object) -> Report:
    """A report of three arms with three runs each that passed, or of the runs given."""
    chosen = runs if runs is not None else [run(arm, n) for n in (1, 2, 3) for arm in ("ours", "qemu", "off")]
    passes = [Check(name=f"budget {budget.figure}", outcome="pass") for budget in SCENARIO.budgets]
    arms = [
        arm_result(arm, chosen, passes if arm == "ours" else None)
        for arm in dict.fromkeys(run.arm for run in chosen)
    ]
    made = Report(
        schema=SCHEMA,
        passed=all(run.passed for run in chosen),
        scenario=SCENARIO,
        environment={"started": "2026-11-26T06:00:00+0000", "host": {"kernel": "6.1.0", "cpus": 2}},
        kernel="6.12.95+deb12-cloud-amd64",
        qemu="11.1.0",
        accelerator="tcg",
        seconds=231.5,
        arms=arms,
        runs=chosen,
    )
    return msgspec.structs.replace(made, **changes)


def failed_report() -> Report:
    """A report in which much is wrong: a panic, a guest that lies on its console, a hang, a broken budget, a skip."""
    runs = [
        run("ours", 1),
        run("ours", 2, ending="panicked", console=PANIC),
        run("ours", 3, console=HOSTILE),
        run("off", 1),
        run("off", 2, ending="hung"),
    ]
    checks = [
        Check(
            name="budget residual_bytes",
            outcome="fail",
            message="residual_bytes is 99 MiB, the budget is at most 64 MiB: 35 MiB (55 %) over",
        ),
        Check(name="budget t90_seconds", outcome="pass"),
        Check(name="verify-dump", outcome="skip", message="no room for a dump # of | the <guest>"),
    ]
    arms = [arm_result("ours", runs, checks), arm_result("off", runs)]
    return report(runs, passed=False, arms=arms)


def write(report: Report, folder: Path, *, consoles: dict[str, str] | None = None) -> Path:
    """Write a report with what its runs leave behind: timelines, and consoles by the runs' folders."""
    for measured in report.runs:
        own = folder / measured.folder
        own.mkdir(parents=True)
        until = "return" if measured.ending == "measured" else "floor"
        write_csv(samples(measured.arm, measured.number, until=until), own / "timeline.csv")
        text = (consoles or {}).get(measured.folder, "[    0.0] Linux version 6.12\r\n")
        (own / "console.log").write_bytes(text.encode())
    write_json(report, folder / NAME)
    return folder


def write_failed(folder: Path) -> Path:
    """Write failed_report() with the consoles that it is of."""
    return write(failed_report(), folder, consoles={"ours-2": PANIC, "ours-3": HOSTILE})
