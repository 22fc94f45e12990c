"""What a scenario must be beyond its types, and how it is put in order: phase names, the boot, full names of figures.

Pure: paths on this machine are looked at where they are read, in scenario_file.py. The index in an error counts the
phases from 1 as they were given. Used by scenario_file.py, and by whoever makes a scenario in Python.
"""

from __future__ import annotations

import re

from msgspec.structs import replace

from balloonlab.errors import UsageError
from balloonlab.measure.budgets import joined
from balloonlab.measure.figures import find_figure, full_name
from balloonlab.measure.scenario import (
    COMMAND_SECONDS,
    Boot,
    Budget,
    Churn,
    Command,
    DropCaches,
    Fill,
    Free,
    GuestSpec,
    Idle,
    Phase,
    Scenario,
)
from balloonlab.measure.scenario_table import did_you_mean, shown
from balloonlab.setup import MIN_MEMORY
from balloonlab.sizes import human
from balloonlab.timeline import SETTLE_QUIETS, SETTLE_SECONDS, quiet_seconds

MIB = 1 << 20
# Memory of petabytes is a slip of the pen; x86-64 guests address 2**52 bytes at most.
MAX_MEMORY = 1 << 52
# An APIC id has 8 bits, and one of them means all; more CPUs need an IOMMU, which the guest does not have.
MAX_CPUS = 255
# MAX_ORDER of x86-64's page allocator, and what an unsigned kernel parameter can hold.
MAX_ORDER = 10
MAX_UNSIGNED = (1 << 32) - 1
# A phase that is not through after a day is not waited for: CI services end a job after six hours.
MAX_SECONDS = 86400
MAX_NAME = 40
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME}}}")
_NEEDS: dict[str, tuple[type[Phase], str]] = {
    "floor_bytes": (Idle, "idle"),
    "returned_bytes": (Free, "free"),
    "t50_seconds": (Free, "free"),
    "t90_seconds": (Free, "free"),
    "command_seconds": (Command, "run"),
    "command_status": (Command, "run"),
}


def check(scenario: Scenario) -> Scenario:
    """Return the scenario put in order: a boot first, each phase named, each figure by its full name.

    What is in order is returned as it is. Raises UsageError, which names the path of what is wrong and the fix.
    """
    if not scenario.name or not scenario.name.isprintable():
        raise UsageError(f"name is {shown(scenario.name)}: give the scenario a name that can be printed")
    _check_guest(scenario.guest)
    if not scenario.device.features.isprintable():
        raise UsageError("device.features has a line end or control character in it: leave it out")
    given = _patient(scenario.phases, scenario.guest.page_reporting_delay_ms)
    _check_phases(given, scenario.guest.memory)
    phases = _named(given)
    return replace(scenario, phases=phases, budgets=_budgets(scenario.budgets, phases))


def _within(path: str, value: float | None, least: int, most: int) -> None:
    """Raise UsageError for a number that is not between two others. A number that is none (NaN) is not either."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{path} is {shown(value)}: give {least} to {most}")


def _check_guest(guest: GuestSpec) -> None:
    if not MIN_MEMORY <= guest.memory <= MAX_MEMORY:
        raise UsageError(
            f"guest.memory is {human(guest.memory)}: give {human(MIN_MEMORY)} or more, and no more than {human(MAX_MEMORY)}"
        )
    if guest.memory % MIB:
        raise UsageError(f"guest.memory is {guest.memory} bytes: give a whole number of MiB")
    _within("guest.cpus", guest.cpus, 1, MAX_CPUS)
    _within("guest.page_reporting_order", guest.page_reporting_order, 0, MAX_ORDER)
    _within("guest.page_reporting_delay_ms", guest.page_reporting_delay_ms, 0, MAX_UNSIGNED)
    for name in ("kernel", "flavour", "modules", "command_line"):
        text = getattr(guest, name) or ""
        if not text and name in ("kernel", "flavour"):
            raise UsageError(f"guest.{name} is empty: leave it out, or give one")
        if not text.isprintable():
            raise UsageError(f"guest.{name} has a line end or control character in it: leave it out")
    for path in guest.files:
        if not path.isprintable() or not path.startswith("/") or {"", ".", ".."} & {*path[1:].split("/")}:
            raise UsageError(
                f"guest.files: {shown(path)} is no path in the guest: write it like /usr/local/bin/mine"
            )


def _patient(phases: tuple[Phase, ...], delay_ms: int | None) -> tuple[Phase, ...]:
    """Return the phases with deadlines that a guest which reports so seldom can keep, where they are the usual ones.

    Raises UsageError for one that is shorter than a plateau, so that no guest could keep it.
    """
    quiet = quiet_seconds(delay_ms)
    patient = []
    for number, phase in enumerate(phases, 1):
        waits = isinstance(phase, Idle | Free | DropCaches) or (isinstance(phase, Command) and phase.settle)
        is_usual = phase.deadline in (SETTLE_SECONDS, COMMAND_SECONDS)
        deadline = (
            max(phase.deadline, min(SETTLE_QUIETS * quiet, MAX_SECONDS)) if is_usual else phase.deadline
        )
        if waits and 0 < deadline < quiet:
            raise UsageError(
                f"phase[{number}].deadline is {shown(deadline)}: a guest has settled when {quiet:g} s went by without "
                "a report, three times guest.page_reporting_delay_ms (its kernel's own is 2000): give more than that"
            )
        patient.append(replace(phase, deadline=deadline) if waits else phase)
    return tuple(patient)


def _check_phases(phases: tuple[Phase, ...], memory: int) -> None:
    """Raise UsageError for a phase that cannot be carried out, by itself or after those before it."""
    held = 0
    for number, phase in enumerate(phases, 1):
        path = f"phase[{number}]"
        _check_phase(phase, path, number)
        match phase:
            case Fill(size=size) | Churn(size=size):
                if held + size >= memory:
                    beside = f" beside the {human(held)} that are held" if held else ""
                    raise UsageError(
                        f"{path}.size is {human(size)}{beside}: give less than guest.memory, {human(memory)}"
                    )
                held += size if isinstance(phase, Fill) else 0
            case Free():
                held = 0
            case _:
                pass


def _check_phase(phase: Phase, path: str, number: int) -> None:
    if phase.name and not _NAME.fullmatch(phase.name):
        raise UsageError(
            f"{path}.name is {shown(phase.name)}: give letters, digits, - and _, {MAX_NAME} at most"
        )
    if not 0 < phase.deadline <= MAX_SECONDS:
        raise UsageError(
            f"{path}.deadline is {shown(phase.deadline)}: give more than 0 seconds, a day at most"
        )
    match phase:
        case Boot() if number > 1:
            raise UsageError(f"{path} is a boot: a guest boots once, put it first or leave it out")
        case Fill(size=size) | Churn(size=size) if size <= 0:
            raise UsageError(f"{path}.size is {size}: give more than nothing")
        case Fill(hold=hold):
            _within(f"{path}.hold", hold, 0, MAX_SECONDS)
        case Churn(rounds=rounds):
            _within(f"{path}.rounds", rounds, 1, MAX_UNSIGNED)
        case Command(command=command) if not command.strip() or "\0" in command:
            raise UsageError(f"{path}.command is {shown(command)}: give a line for the guest's shell")
        case Command(status=status):
            # A signal's number is negative in a status, and the kernel has 64 of them.
            _within(f"{path}.status", status, -64, 255)
        case _:
            pass


def _named(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Return the phases with a boot first, and a name for each: its kind, or kind-2 and so on where that is taken."""
    if not phases or not isinstance(phases[0], Boot):
        phases = (Boot(), *phases)
    taken: set[str] = set()
    for phase in phases:
        if phase.name in taken:
            raise UsageError(
                f"two phases are named {phase.name}: name one of them otherwise, or leave its name out"
            )
        taken |= {phase.name} - {""}
    named = []
    for phase in phases:
        name = phase.name or _free_name(str(phase.__struct_config__.tag), taken)
        taken.add(name)
        named.append(replace(phase, name=name))
    return tuple(named)


def _free_name(kind: str, taken: set[str]) -> str:
    if kind not in taken:
        return kind
    return next(name for number in range(2, len(taken) + 3) if (name := f"{kind}-{number}") not in taken)


def _budgets(budgets: tuple[Budget, ...], phases: tuple[Phase, ...]) -> tuple[Budget, ...]:
    """Return the budgets by full names, one for each figure. Raises UsageError for one that these phases cannot meet."""
    whole = joined([replace(budget, figure=_figure(budget.figure, phases)) for budget in budgets])
    for budget in whole:
        path = f"budget.{budget.figure}"
        if budget.most is None and budget.least is None:
            raise UsageError(f"{path} has no limit: give most, least or both")
        for limit in (budget.most, budget.least):
            _within(path, limit, -(1 << 63), 1 << 63)
        if budget.most is not None and budget.least is not None and budget.least > budget.most:
            raise UsageError(f"{path} has a least above its most: nothing could meet it")
    return whole


def _figure(name: str, phases: tuple[Phase, ...]) -> str:
    """Return the full name of a figure that a run of these phases has. Raises UsageError."""
    try:
        full, figure = full_name(name), find_figure(name)
    except UsageError as error:
        raise UsageError(f"budget: {error}") from error
    phase = full.rpartition(".")[0]
    names = [one.name for one in phases]
    if phase and phase not in names:
        near = did_you_mean(phase, names)
        raise UsageError(
            f"budget.{name}: no phase is named {phase}{near or ':'} choose one of {', '.join(names)}"
        )
    if not phase and figure.name in _NEEDS:
        kind, do = _NEEDS[figure.name]
        if not any(isinstance(one, kind) for one in phases):
            raise UsageError(f'budget.{name}: without a phase that does "{do}" it is not measured, add one')
    return full
