"""What is not the same in two reports beside their figures: the scenario and the accelerator, and what else they ran with.

Pure. With another scenario or accelerator figures are of something else, and compare.py refuses; what else differs it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from balloonlab.measure.report import Report
from balloonlab.measure.scenario import Scenario
from balloonlab.sizes import human

# Keys of a scenario whose values are bytes.
_SIZES = ("memory", "size")


def measured_otherwise(old: Report, new: Report) -> list[str]:
    """Return what makes the figures of two reports figures of different things: scenario, extra files, accelerator.

    Results older than the field say nothing of what was in their files.
    """
    found = scenarios_differ(old.scenario, new.scenario)
    both = [inside for inside in old.files if inside in new.files]
    found += [
        f"guest.files.{inside}: not the same contents"
        for inside in both
        if old.files[inside] != new.files[inside]
    ]
    return found + list(_differing(old.accelerator, new.accelerator, "accelerator"))


def scenarios_differ(old: Scenario, new: Scenario) -> list[str]:
    """Return what two scenarios have different that changes what is measured: not kernel, budgets, name or folders."""
    return list(_differing(msgspec.to_builtins(_bare(old)), msgspec.to_builtins(_bare(new)), ""))


def _bare(scenario: Scenario) -> Scenario:
    files = {inside: Path(outside).name for inside, outside in scenario.guest.files.items()}
    # What auto came to is the report's accelerator.
    guest = replace(scenario.guest, kernel="", flavour="", modules=None, files=files, accelerator="auto")
    return replace(scenario, name="", budgets=(), guest=guest)


def conditions(old: Report, new: Report) -> list[str]:
    """Return what else is not the same: kernel, QEMU, our version, how many guests at once, the machine."""
    return list(_differing(_conditions(old), _conditions(new), ""))


def _conditions(report: Report) -> dict[str, Any]:
    versions = report.environment.get("versions")
    return {
        "kernel": report.kernel,
        "qemu": report.qemu,
        "vhost-user-balloon": versions.get("vhost-user-balloon") if isinstance(versions, dict) else None,
        "jobs": report.jobs,
        "host": report.environment.get("host"),
    }


def _differing(old: Any, new: Any, path: str) -> Iterator[str]:  # noqa: ANN401  (any value that JSON has)
    """Yield each place where two values are different, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differing(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True), 1):
            yield from _differing(one, other, f"{path}[{number}]")
    elif old != new:
        yield f"{path}: {_text(old, path, new)} in OLD, {_text(new, path, old)} in NEW"


def _text(value: object, path: str, other: object) -> str:
    """Return a value as an error shows it, a size as people read it where the other one's does not look the same."""
    if isinstance(value, int) and path.rpartition(".")[2] in _SIZES:
        alike = isinstance(other, int) and human(other) == human(value)
        return f"{value} bytes" if alike else human(value)
    if isinstance(value, list | tuple):
        return f"{len(value)} of them"
    if isinstance(value, dict):
        return "something"
    return "nothing" if value is None or value == "" else str(value)
