"""The command balloonlab demo: one guest, its memory seen to come back, a run folder with the figures.

demo_run.py is the experiment; this file gives it a screen, a folder and a verdict. With --control the same run is made
with --discard dontneed and none as well, and all go into one picture.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from balloonlab import signals
from balloonlab.demo_run import Measured, Measurement, Plan
from balloonlab.errors import UsageError
from balloonlab.options import Commands, add_fill_options, add_guest_options, guest_options
from balloonlab.progress import Progress
from balloonlab.results import sentences, write_json
from balloonlab.rig import Setup
from balloonlab.runs import environment, make_folder, sha256
from balloonlab.setup import prepare
from balloonlab.sizes import human, parse_size
from balloonlab.timeline import write_csv
from balloonlab.verdict import FREEING_NOTHING
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="boot a guest and watch its freed memory come back to the host",
        description="Boot a real Linux guest beside the device, fill memory in it, free it, and watch it come back.",
    )
    add_guest_options(parser)
    add_fill_options(parser)
    parser.add_argument(
        "--discard",
        choices=("auto", "remove", *FREEING_NOTHING),
        default="auto",
        help="how the device gives memory back (default: %(default)s)",
    )
    parser.add_argument(
        "--features", default="", metavar="+NAME,-NAME", help="the device's option of that name"
    )
    parser.add_argument(
        "--control", action="store_true", help="repeat with --discard dontneed and none, which free nothing"
    )
    parser.add_argument(
        "--trace", action="store_true", help="have the device write device.trace, for balloonlab decode"
    )
    parser.add_argument(
        "--hold",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="keep the guest running afterwards, to look at it",
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Demo:
    """One invocation."""

    setup: Setup
    plan: Plan
    folder: Path
    progress: Progress


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 the memory came back, 1 it did not."""
    plan = Plan(parse_size(options.fill), options.kind, hold_at_end=options.hold)
    guest = guest_options(options)
    if not 0 < plan.fill_bytes < guest.memory_bytes:
        raise UsageError(
            f"--fill {options.fill}: give more than nothing and less than --memory {options.memory}"
        )
    chosen = make_folder(options.out) if options.out is not None else None
    setup = prepare(guest, discard=options.discard, features=options.features, progress=progress.say)
    setup = replace(setup, trace=options.trace)
    # Not before there is something to run: runs/latest stays at the last run.
    folder = chosen or make_folder(None)
    progress.say(
        f"QEMU {setup.qemu.version} ({setup.accelerator}), Linux {setup.image.kernel_version} of {setup.image.suite}, "
        f"{human(setup.memory_bytes)} of memory"
    )
    demo = _Demo(setup, plan, folder, progress)
    measured = {options.discard: _measure(demo, setup, folder)}
    if options.control:
        for discard in FREEING_NOTHING:
            progress.say(f"control: the same with --discard {discard}")
            inner = folder / f"control-{discard}"
            inner.mkdir()
            measured[discard] = _measure(demo, replace(setup, discard=discard), inner)
    return _conclude(demo, measured)


def _measure(demo: _Demo, setup: Setup, folder: Path) -> Measured:
    """Make one run and keep its files, also when it does not come to its end."""
    measurement = Measurement(setup, demo.plan, folder, demo.progress)
    try:
        with demo.progress.run(setup.memory_bytes):
            signals.run(measurement.run())
    finally:
        write_csv(measurement.measured.samples, folder / "timeline.csv")
        write_json(_meta(setup, measurement.measured), folder / "meta.json")
        if measurement.measured.result is not None:
            write_json(measurement.measured.result, folder / "result.json")
    return measurement.measured


def _meta(setup: Setup, measured: Measured) -> dict[str, object]:
    return {
        **environment(),
        "qemu": {"argv": measured.qemu_argv, "origin": setup.qemu.origin, "version": setup.qemu.version},
        "device": {"argv": measured.device_argv},
        "ram_file": measured.ram_file,
        "kernel": {
            "suite": setup.image.suite,
            "version": setup.image.kernel_version,
            "image": str(setup.image.kernel),
            "image_sha256": sha256(setup.image.kernel),
            "initrd": str(setup.image.initrd),
            "initrd_sha256": sha256(setup.image.initrd),
        },
    }


def _conclude(demo: _Demo, measured: dict[str, Measured]) -> int:
    """Write the picture and the joint result, print the table, return the verdict."""
    results = {discard: run.result for discard, run in measured.items() if run.result is not None}
    first, *others = results
    joint = msgspec.structs.replace(results[first], controls={name: results[name] for name in others})
    write_json(joint, demo.folder / "result.json")
    _draw(demo, measured)
    for result in results.values():
        demo.progress.say("")
        for label, text in sentences(result):
            demo.progress.say(f"{label:<10}  {text}")
    demo.progress.say("")
    passed = all(result.passed for result in results.values())
    verdict = "came back" if passed else "did NOT come back as it should"
    if demo.setup.discard in FREEING_NOTHING:
        verdict = (
            "stayed on the host, as this method frees nothing" if passed else "did not stay as it should"
        )
    demo.progress.say(f"The guest's freed memory {verdict}. Figures and picture: {demo.folder}")
    return EXIT_PASS if passed else EXIT_CHECK_FAILED


def _draw(demo: _Demo, measured: dict[str, Measured]) -> None:
    from balloonlab import plot  # noqa: PLC0415  (matplotlib costs half a second)

    samples = {discard: run.samples for discard, run in measured.items()}
    image = demo.setup.image
    title = f"{human(demo.plan.fill_bytes)} filled and freed in a guest of {human(demo.setup.memory_bytes)}, Linux {image.kernel_version}"
    with contextlib.suppress(FileNotFoundError):
        plot.draw_timeline(
            samples, demo.folder / "timeline.png", title=title, memory_bytes=demo.setup.memory_bytes
        )
