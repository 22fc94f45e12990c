"""Properties of scenarios as files.

1. Any text is a scenario or a UsageError; so is any TOML of the known keys with values of any type.
2. A scenario that has been put in order, written as TOML, is read as the same scenario; and from JSON, in a result.
3. Putting in order twice is the same as once; phase names are unique then, and the first phase is the only boot.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from balloonlab.errors import UsageError
from balloonlab.measure.figures import FIGURES
from balloonlab.measure.scenario import (
    Boot,
    Budget,
    Churn,
    Command,
    DeviceSpec,
    DropCaches,
    Fill,
    Free,
    GuestSpec,
    Idle,
    Scenario,
)
from balloonlab.measure.scenario_file import check, parse_scenario
from qmp_glue.debian import SUITES

MIB = 1 << 20
HERE = Path("/")
# Words of the format, so that text comes near to a scenario.
WORDS = st.sampled_from(
    [
        "[guest]",
        "[[phase]]",
        "[budget]",
        "do",
        "=",
        '"fill"',
        "size",
        '"64M"',
        "memory",
        "\n",
        ".",
        "{",
        "}",
        "5",
        "'",
    ]
)


def parse(text: str) -> Scenario:
    return parse_scenario(text, name="mine", folder=HERE)


def toml(value: Any) -> str:  # noqa: ANN401  (any value that TOML has)
    """Write a value as TOML has it, tables inline. JSON's texts are TOML's but for DEL."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


@given(st.one_of(st.text(), st.lists(WORDS, max_size=40).map("".join)))
def test_any_text_is_a_scenario_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(parse(text).phases[0], Boot)


SCALARS = st.one_of(
    st.text(), st.integers(), st.floats(), st.booleans(), st.sampled_from(["64M", "10s", "fill", "most"])
)
KEYS = st.sampled_from(
    ["name", "guest", "device", "phase", "budget", "memory", "files", "size", "do", "deadline", "residual", "t90", "reports"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=3)
)
FIELD = st.sampled_from([field.name for field in msgspec.structs.fields(GuestSpec)])
PHASE_FIELD = st.sampled_from(
    ["do", "name", "size", "hold", "kind", "rounds", "deadline", "command", "status"]
)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4)
    | st.builds(lambda guest: {"guest": guest}, st.dictionaries(FIELD, VALUES))
    | st.builds(
        lambda phase, do: {"phase": [{**phase, "do": do}]},
        st.dictionaries(PHASE_FIELD, VALUES),
        st.sampled_from(["boot", "idle", "fill", "churn", "free", "drop-caches", "run"]),
    )
    | st.builds(
        lambda budget: {"budget": budget},
        st.dictionaries(st.sampled_from([figure.name for figure in FIGURES]), VALUES),
    )
)
def test_values_of_any_type_are_a_scenario_or_a_usage_error(document: dict[str, Any]) -> None:
    text = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in document.items())
    with contextlib.suppress(UsageError):
        assert isinstance(parse(text).phases[0], Boot)


SECONDS = st.floats(0.001, 86400)
# Of a phase that waits for a plateau, which is three passes of 2 s or of the kernel's own delay.
PATIENCE = st.floats(6.0, 86400)
PRINTABLE = st.text(st.characters(categories=["L", "N", "P", "Zs"], max_codepoint=0xFFFF)).filter(
    str.isprintable
)
NAMES = st.sampled_from(["", "", "", "a", "b", "fill", "idle-2"])
SIZES = st.integers(1, 20 * MIB)
PHASES = st.one_of(
    st.builds(Idle, name=NAMES, deadline=PATIENCE),
    st.builds(Fill, name=NAMES, size=SIZES, kind=st.sampled_from(["anonymous", "tmpfs"]), hold=SECONDS),
    st.builds(Churn, size=SIZES, rounds=st.integers(1, 1 << 32 - 1)),
    st.builds(Free, name=NAMES),
    st.builds(DropCaches, deadline=PATIENCE),
    st.builds(
        Command,
        command=st.text().map(lambda text: text.replace("\0", "") + "x"),
        status=st.integers(-64, 255),
    ),
)
FIGURES_ANY = st.sampled_from(
    [
        "boot_seconds",
        "peak",
        "residual_bytes",
        "reports",
        "footprint",
        "boot.end",
        "boot.footprint_gib_minutes",
    ]
)
SCENARIOS = st.builds(
    Scenario,
    name=PRINTABLE.map(lambda text: f"a{text}"),
    guest=st.builds(
        GuestSpec,
        kernel=st.sampled_from(list(SUITES)),
        memory=st.integers(512, 4096).map(lambda size: size * MIB),
        cpus=st.integers(1, 255),
        command_line=PRINTABLE,
        files=st.dictionaries(st.sampled_from(["/a", "/b/c d", "/é"]), st.just("/etc/passwd")),
        page_reporting_order=st.none() | st.integers(0, 10),
    ),
    device=st.builds(DeviceSpec, features=PRINTABLE),
    phases=st.lists(PHASES, max_size=6).map(tuple),
    budgets=st.dictionaries(
        FIGURES_ANY, st.floats(0, 1e9) | st.integers(0, 1 << 50).map(float), max_size=4
    ).map(lambda found: tuple(Budget(figure=figure, most=most) for figure, most in found.items())),
)  # fmt: skip


def as_toml(scenario: Scenario) -> str:
    """Write a scenario as a person would."""
    document: dict[str, Any] = msgspec.to_builtins(scenario)
    tables = {
        "name": document["name"],
        "guest": {key: value for key, value in document["guest"].items() if value is not None},
        "device": document["device"],
        "phase": document["phases"],
        "budget": {
            one["figure"]: {end: one[end] for end in ("most", "least") if one[end] is not None}
            for one in document["budgets"]
        },
    }
    return "\n".join(f"{key} = {toml(value)}" for key, value in tables.items())


@given(SCENARIOS)
def test_a_scenario_in_order_is_read_as_it_was_written(scenario: Scenario) -> None:
    try:
        ordered = check(scenario)
    except UsageError as error:
        assert "two phases are named" in str(error)  # noqa: PT017  (the one way in which these may be wrong)
        return
    assert parse(as_toml(ordered)) == ordered
    assert check(ordered) == ordered
    assert msgspec.json.decode(msgspec.json.encode(ordered), type=Scenario) == ordered
    names = [phase.name for phase in ordered.phases]
    assert len(set(names)) == len(names)
    assert [isinstance(phase, Boot) for phase in ordered.phases].count(True) == 1
    assert isinstance(ordered.phases[0], Boot)
