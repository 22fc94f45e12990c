"""Scenarios from files and from the command line: TOML -> scenario.Scenario, with whatever --kernel and the like say.

Keys are the field names of scenario.py; [[phase]] tables have a key "do", [budget] has a key for each figure. Sizes and
durations may have units. scenario_table.py knows types and keys, scenario_check.py what a scenario must be; this file
knows where paths start and what the whole is called. Used by command.py and pytest_plugin.py.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from balloonlab.errors import UsageError
from balloonlab.measure.budgets import amount, joined, parse_budget
from balloonlab.measure.figures import find_figure
from balloonlab.measure.scenario import Boot, Budget, DeviceSpec, Fill, Free, GuestSpec, Idle, Scenario
from balloonlab.measure.scenario_check import check
from balloonlab.measure.scenario_table import (
    Table,
    did_you_mean,
    refuse_unknown,
    shown,
    table_of,
    to_phase,
    to_struct,
)
from balloonlab.sizes import parse_size
from guest_images.package_files import SUFFIX as PACKAGE_SUFFIX
from qmp_glue.debian import SUITES

__all__ = ["STANDARD", "Overrides", "apply", "check", "parse_scenario", "read_scenario"]

Value = TypeVar("Value")

# A scenario is a page of text: what is larger is some other file.
MAX_FILE_BYTES = 1 << 20
_KEYS = ("name", "guest", "device", "phase", "budget")
_LIMITS = ("most", "least")

# What is measured without a file. docs/scenarios/standard.toml is the same.
STANDARD = check(
    Scenario(
        name="standard",
        phases=(Boot(), Idle(name="floor"), Fill(size=256 << 20), Free(name="return")),
    )
)


@dataclass(frozen=True)
class Overrides:
    """What the command line says instead of the scenario, as it was typed; None and nothing: it says nothing.

    Paths are relative to the current folder. budgets: as parse_budget() reads them; each replaces the scenario's budget
    on the same figure.
    """

    kernel: str | None = None
    flavour: str | None = None
    modules: str | None = None
    memory: str | None = None
    cpus: int | None = None
    budgets: tuple[str, ...] = ()


def read_scenario(path: Path) -> Scenario:
    """Return the scenario of a TOML file. Raises UsageError, which names the file, the path inside it and the fix."""
    try:
        return parse_scenario(_read(path), name=path.stem, folder=path.absolute().parent)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: name the TOML file of a scenario") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _read(path: Path) -> str:
    """Return the text of a file. Raises OSError, and UsageError for what cannot be one's text."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UsageError("this is more than 1 MiB: name the TOML file of a scenario")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"byte {error.start} is no UTF-8: name the TOML file of a scenario") from error


def parse_scenario(text: str, *, name: str, folder: Path) -> Scenario:
    """Return the scenario of a TOML text. name: where the text has none. folder: where paths start. Raises UsageError."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise UsageError("it is no TOML: brackets are nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"it is no TOML: {error}") from error
    refuse_unknown(table, _KEYS, "")
    guest = to_struct(table_of(table.get("guest", {}), "guest"), GuestSpec, "guest")
    scenario = Scenario(
        name=_text(table.get("name", name), "name"),
        guest=guest,
        device=to_struct(table_of(table.get("device", {}), "device"), DeviceSpec, "device"),
        phases=tuple(to_phase(one, f"phase[{number}]") for number, one in enumerate(_phases(table), 1)),
        budgets=_budgets(table_of(table.get("budget", {}), "budget")),
    )
    checked = check(scenario)
    return replace(checked, guest=_with_paths(checked.guest, folder))


def apply(scenario: Scenario, overrides: Overrides) -> Scenario:
    """Return the scenario with what the command line says. Raises UsageError.

    A kernel without modules is looked for its own: those of the scenario are another kernel's.
    """
    guest = scenario.guest
    here = Path.cwd()
    if overrides.kernel is not None:
        guest = replace(guest, kernel=_kernel(overrides.kernel, here, "--kernel"), modules=None)
    if overrides.flavour is not None:
        guest = replace(guest, flavour=overrides.flavour)
    if overrides.modules is not None:
        guest = replace(guest, modules=_existing(overrides.modules, here, "--modules"))
    if overrides.memory is not None:
        guest = replace(guest, memory=_option("--memory", overrides.memory, parse_size))
    if overrides.cpus is not None:
        guest = replace(guest, cpus=overrides.cpus)
    _check_said(replace(scenario, guest=guest), overrides)
    said = joined([_option("--budget", text, parse_budget) for text in overrides.budgets])
    kept = tuple(one for one in scenario.budgets if one.figure not in {other.figure for other in said})
    return check(replace(scenario, guest=guest, budgets=(*kept, *said)))


def _check_said(scenario: Scenario, overrides: Overrides) -> None:
    """Raise UsageError for a guest that the command line has made too small or too large, and name the option."""
    said = {"--memory": overrides.memory, "--cpus": overrides.cpus}
    options = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
    try:
        check(replace(scenario, budgets=()))
    except UsageError as error:
        if not options:
            raise
        raise UsageError(f"with {options}: {error}") from error


def _option(name: str, text: str, parse: Callable[[str], Value]) -> Value:
    """Return the value of an option of the command line. Raises UsageError that names the option."""
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{name} {text}: {error}") from error


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{path} is {shown(value)}: give a text in quotes")
    return value


def _phases(table: Table) -> list[Any]:
    phases = table.get("phase", [])
    if not isinstance(phases, list):
        raise UsageError("phase is one table: write [[phase]] with two brackets, once for each phase")
    return phases


def _budgets(table: Table) -> tuple[Budget, ...]:
    """Return the [budget] table; return.peak in it may be one quoted key or a table in a table, as TOML has it."""
    found = []
    for name, value in table.items():
        if isinstance(value, dict) and not _has_limits(value):
            found += [_budget(f"{name}.{inner}", limit) for inner, limit in value.items()]
        else:
            found.append(_budget(name, value))
    return tuple(found)


def _has_limits(table: Table) -> bool:
    """Return whether a table has the limits of a figure, misspelt ones included, and not the figures of a phase."""
    return not table or any(did_you_mean(key, _LIMITS) for key in table)


def _budget(name: str, value: object) -> Budget:
    """Return one budget: a value is the most that it may be, a table has most, least or both."""
    try:
        figure = find_figure(name)
        limits = value if isinstance(value, dict) else {"most": value}
        refuse_unknown(limits, _LIMITS, "")
        return Budget(figure=name, **{end: amount(figure, limit) for end, limit in limits.items()})
    except UsageError as error:
        raise UsageError(f"budget.{shown(name)[1:-1]}: {error}") from error


def _with_paths(guest: GuestSpec, folder: Path) -> GuestSpec:
    """Return the guest with absolute paths. Raises UsageError for one that is not there."""
    files = {
        inside: _existing(outside, folder, f'guest.files."{inside}"')
        for inside, outside in guest.files.items()
    }
    modules = guest.modules
    if modules is not None:
        modules = _existing(modules, folder, "guest.modules")
    return replace(guest, kernel=_kernel(guest.kernel, folder, "guest.kernel"), modules=modules, files=files)


def _kernel(text: str, folder: Path, path: str) -> str:
    """Return a suite as it is, anything else as the path of what is there, or of package files. Raises UsageError."""
    if text in SUITES:
        return text
    words = text.split(",") if text.endswith(PACKAGE_SUFFIX) else [text]
    try:
        return ",".join(_existing(word, folder, path) for word in words)
    except UsageError as error:
        near = did_you_mean(text, SUITES)
        suites = ", ".join(SUITES)
        raise UsageError(f"{error}; or choose a Debian suite of {suites}{near}") from error


def _existing(text: str, folder: Path, path: str) -> str:
    """Return the absolute path of what is there. Raises UsageError."""
    if not text:
        raise UsageError(f"{path} is empty: name a file or folder that is there")
    there = folder / text
    try:
        there.stat()
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{path}: {shown(str(there))}: {what}: name a file or folder that is there"
        ) from error
    return str(there)
