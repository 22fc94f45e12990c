"""Scenarios from TOML and from the command line: what is read, what is put in order, what is said of a mistake."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from balloonlab.errors import UsageError
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
    Phase,
    Scenario,
)
from balloonlab.measure.scenario_file import STANDARD, Overrides, apply, check, parse_scenario, read_scenario
from balloonlab.measure.scenario_table import PHASES

MIB = 1 << 20
EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "scenarios").glob("*.toml"))


def parse(text: str, folder: Path = Path("/")) -> Scenario:
    return parse_scenario(text, name="mine", folder=folder)


def test_the_standard_scenario() -> None:
    expected = Scenario(
        name="standard",
        guest=GuestSpec(),
        phases=(
            Boot(name="boot"),
            Idle(name="floor"),
            Fill(name="fill", size=256 * MIB),
            Free(name="return"),
        ),
    )
    assert expected == STANDARD


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_documented_examples_are_scenarios(path: Path) -> None:
    scenario = read_scenario(path)
    assert scenario.name == path.stem
    assert check(scenario) == scenario


def test_the_standard_scenario_is_documented() -> None:
    assert read_scenario(EXAMPLES[[path.stem for path in EXAMPLES].index("standard")]) == STANDARD


def test_every_key(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("bzImage", "tool", "sub/modules"):
        (tmp_path / name).touch()
    path = tmp_path / "all.toml"
    path.write_text("""
        name = "everything"
        [guest]
        kernel = "bzImage"
        flavour = "amd64"
        modules = "sub/modules"
        memory = "1.5G"
        cpus = 2
        machine = "microvm"
        accelerator = "tcg"
        command_line = "init_on_free=1 quiet"
        page_reporting_order = 0
        page_reporting_delay_ms = 100
        [guest.files]
        "/usr/bin/tool" = "tool"
        [device]
        discard = "dontneed"
        features = "-page_poison"
        [[phase]]
        do = "boot"
        deadline = 30
        [[phase]]
        do = "idle"
        deadline = "6500ms"
        [[phase]]
        do = "fill"
        size = 1048576
        kind = "tmpfs"
        hold = "2s"
        deadline = "3min"
        [[phase]]
        do = "churn"
        name = "up-and-down"
        size = "64MiB"
        kind = "anonymous"
        rounds = 7
        [[phase]]
        do = "drop-caches"
        [[phase]]
        do = "run"
        command = "exit 3"
        status = 3
        settle = true
        [[phase]]
        do = "free"
        [budget]
        residual = "64M"
        reports = 5
        t90 = 2
        footprint_gib_minutes = { most = 1.5, least = 0.5 }
        free.end = "1G"
        "up-and-down.seconds" = "1min"
    """)
    assert read_scenario(path) == Scenario(
        name="everything",
        guest=GuestSpec(
            kernel=str(tmp_path / "bzImage"),
            flavour="amd64",
            modules=str(tmp_path / "sub/modules"),
            memory=1536 * MIB,
            cpus=2,
            machine="microvm",
            accelerator="tcg",
            command_line="init_on_free=1 quiet",
            files={"/usr/bin/tool": str(tmp_path / "tool")},
            page_reporting_order=0,
            page_reporting_delay_ms=100,
        ),
        device=DeviceSpec(discard="dontneed", features="-page_poison"),
        phases=(
            Boot(name="boot", deadline=30.0),
            Idle(name="idle", deadline=6.5),
            Fill(name="fill", size=MIB, kind="tmpfs", hold=2.0, deadline=180.0),
            Churn(name="up-and-down", size=64 * MIB, rounds=7),
            DropCaches(name="drop-caches"),
            Command(name="run", command="exit 3", status=3, settle=True),
            Free(name="free"),
        ),
        budgets=(
            Budget(figure="residual_bytes", most=64.0 * MIB),
            Budget(figure="reports", most=5.0),
            Budget(figure="t90_seconds", most=2.0),
            Budget(figure="footprint_gib_minutes", most=1.5, least=0.5),
            Budget(figure="free.end_bytes", most=1024.0 * MIB),
            Budget(figure="up-and-down.seconds", most=60.0),
        ),
    )


def test_a_relative_scenario_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used by processes with folders of their own."""
    (tmp_path / "image").touch()
    (tmp_path / "a.toml").write_text('guest.kernel = "image"')
    monkeypatch.chdir(tmp_path)
    assert read_scenario(Path("a.toml")).guest.kernel == str(tmp_path / "image")


def test_package_files_are_joined_by_commas(tmp_path: Path) -> None:
    for name in ("a.deb", "b.deb"):
        (tmp_path / name).touch()
    found = parse('guest.kernel = "a.deb,b.deb"', tmp_path).guest.kernel
    assert found == f"{tmp_path / 'a.deb'},{tmp_path / 'b.deb'}"
    with pytest.raises(UsageError, match=r"^guest\.kernel: .*No such file or directory: name a file"):
        parse('guest.kernel = "a.deb,gone.deb"', tmp_path)


def test_a_suite_comes_before_a_file_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "trixie").touch()
    assert parse('guest.kernel = "trixie"', tmp_path).guest.kernel == "trixie"
    assert parse('guest.kernel = "./trixie"', tmp_path).guest.kernel == str(tmp_path / "trixie")


def test_an_empty_file_boots_and_no_more() -> None:
    assert parse("") == Scenario(name="mine", phases=(Boot(name="boot"),))


def test_phases_are_named_by_their_kind_and_a_number() -> None:
    phases: tuple[Phase, ...] = (Idle(), Idle(name="idle-2"), Idle(), Free(), Idle(name="boot"))
    checked = check(Scenario(name="a", phases=phases))
    assert [phase.name for phase in checked.phases] == ["boot-2", "idle", "idle-2", "idle-3", "free", "boot"]
    assert check(checked) == checked


GUEST = "[guest]\n"
FILL = '[[phase]]\ndo = "fill"\nsize = "64M"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guest = 5 5", r"it is no TOML: Expected newline .*\(at line 1, column 11\)"),
        ("a = 1\na = 2\n", r"it is no TOML: Cannot overwrite a value \(at line 2, column 6\)"),
        ("a = " + "[" * 5000, "it is no TOML: brackets are nested too deeply"),
        ("a = " + "9" * 5000, "it is no TOML: Exceeds the limit"),
        ("phases = 1", "^phases is not known, did you mean phase.* choose one of name, guest, device, phase"),
        ("name = 1", "name is 1: give a text in quotes"),
        ('name = ""', "name is '': give the scenario a name that can be printed"),
        ('name = "a\\tb"', r"name is 'a\\tb': give"),
        ("guest = 5", r"guest is 5: make it a table, \[guest\]"),
        (
            GUEST + "memroy = 5",
            r"guest.memroy is not known, did you mean memory\? choose one of kernel, flav",
        ),
        (GUEST + 'command-line = "a"', "guest.command-line is not known, did you mean command_line"),
        (GUEST + "xyz = 5", "guest.xyz is not known: choose one of"),
        (GUEST + 'memory = "a lot"', "guest.memory: 'a lot' is no size: write it like 600M"),
        (GUEST + "memory = 1.5e9", 'guest.memory is 1500000000.0: give a size, such as "512M", or bytes'),
        (GUEST + "memory = true", "guest.memory is True: give a size"),
        (GUEST + "memory = 64", "guest.memory is 64 bytes: give 128 MiB or more"),
        (GUEST + 'memory = "5000000G"', "guest.memory is 4883 TiB: .* no more than 4096 TiB"),
        (GUEST + "memory = 134217729", "guest.memory is 134217729 bytes: give a whole number of MiB"),
        (GUEST + "cpus = 0", "guest.cpus is 0: give 1 to 255"),
        (GUEST + 'cpus = "2"', "guest.cpus is '2': give a whole number"),
        (
            GUEST + "cpus = 0x" + "f" * 9000,
            "guest.cpus is a number of more than 64 bits: give a whole number",
        ),
        (GUEST + "page_reporting_order = 11", "guest.page_reporting_order is 11: give 0 to 10"),
        (GUEST + "page_reporting_delay_ms = -1", "guest.page_reporting_delay_ms is -1: give 0 to"),
        (GUEST + 'machine = "q53"', r"guest.machine is 'q53', did you mean q35\? give one of q35, microvm"),
        (GUEST + "machine = 35", "guest.machine is 35: give one of q35, microvm"),
        (GUEST + 'command_line = "a\\nb"', "guest.command_line has a line end or control character"),
        (GUEST + 'modules = "a\\u0000"', "guest.modules has a line end or control character"),
        (GUEST + 'kernel = ""', "guest.kernel is empty: leave it out, or give one"),
        (GUEST + 'modules = ""', "guest.modules is empty: name a file or folder"),
        (GUEST + 'files = { "/a" = "" }', 'guest.files."/a" is empty: name a file or folder'),
        (GUEST + 'kernel = "bookwrm"', "guest.kernel: '/bookwrm': No such file.* bookworm-.*mean bookworm"),
        (GUEST + 'kernel = "' + "x" * 5000 + '"', "guest.kernel: '/xxx.*: File name too long"),
        (
            GUEST + 'modules = "/nowhere/at/all"',
            "guest.modules: '/nowhere/at/all': No such file or directory",
        ),
        (GUEST + 'files."/a" = "nowhere"', "guest.files.\"/a\": '/nowhere': No such file"),
        (GUEST + 'files."a" = "/etc"', "guest.files: 'a' is no path in the guest: write it like /usr/"),
        (GUEST + 'files."/a/../b" = "/etc"', "guest.files: '/a/../b' is no path in the guest"),
        (GUEST + "files = 1979-05-27", "guest.files is 1979-05-27: give a table of texts"),
        (GUEST + "files = { a = 1 }", "guest.files is a table: give a table of texts"),
        ("device.discard = 'no'", r"device.discard is 'no', did you mean none\? give one of auto, remove"),
        ('device.features = "a\\u0007"', "device.features has a line end or control character"),
        ("[phase]\ndo = 'idle'", r"phase is one table: write \[\[phase\]\] with two brackets"),
        ("phase = [1]", r"phase\[1\] is 1: make it a table"),
        (
            "[[phase]]\nname = 'a'",
            r"phase\[1\].do is missing: choose one of boot, idle, fill, churn, free, drop",
        ),
        ("[[phase]]\ndo = 'dropcaches'", r"phase\[1\].do is 'dropcaches', did you mean drop-caches\?"),
        ("[[phase]]\ndo = 5", r"phase\[1\].do is 5: choose one of"),
        ("[[phase]]\ndo = 'fill'", r'phase\[1\].size is missing: give a size, such as "256M"'),
        (FILL + FILL + "rounds = 2", r"phase\[2\].rounds is not known: choose one of name, size, kind, hold"),
        (FILL + "hold = 'long'", r"phase\[1\].hold: 'long' is no duration: write it like 100ms"),
        (FILL + "hold = -1", r"phase\[1\].hold is -1.0: give 0 to 86400"),
        (FILL + "hold = nan", r"phase\[1\].hold is nan: give 0 to 86400"),
        (FILL + "deadline = 0", r"phase\[1\].deadline is 0.0: give more than 0 seconds, a day at most"),
        (FILL + "deadline = inf", r"phase\[1\].deadline is inf: give more than 0 seconds"),
        (FILL + "kind = 'anon'", r"phase\[1\].kind is 'anon', did you mean anonymous\?"),
        (FILL + "name = 'a b'", r"phase\[1\].name is 'a b': give letters, digits, - and _, 40 at most"),
        (FILL + "name = 'a'\n" + FILL + "name = 'a'", "two phases are named a: name one of them otherwise"),
        (FILL + "[[phase]]\ndo = 'boot'", r"phase\[2\] is a boot: a guest boots once, put it first"),
        ("[[phase]]\ndo = 'fill'\nsize = 0", r"phase\[1\].size is 0: give more than nothing"),
        (
            "[[phase]]\ndo = 'fill'\nsize = '512M'",
            r"phase\[1\].size is 512 MiB: give less than guest.memory, 512",
        ),
        (
            FILL * 8,
            r"phase\[8\].size is 64 MiB beside the 448 MiB that are held: give less than guest.memory, 512 MiB",
        ),
        ("[[phase]]\ndo = 'churn'\nsize = '1M'\nrounds = 0", r"phase\[1\].rounds is 0: give 1 to"),
        (
            "[[phase]]\ndo = 'run'\ncommand = ' '",
            r"phase\[1\].command is ' ': give a line for the guest's shell",
        ),
        ("[[phase]]\ndo = 'run'\ncommand = 'a'\nstatus = 256", r"phase\[1\].status is 256: give -64 to 255"),
        ("budget = 1", r"budget is 1: make it a table, \[budget\]"),
        (
            "budget.resid = 1",
            "budget.resid: there is no figure 'resid', did you mean residual. choose one of boot_seconds",
        ),
        ("budget.residual = 'x'", "budget.residual: 'x' is no size"),
        ("budget.residual = true", "budget.residual: residual_bytes is counted in bytes: give a size"),
        ("budget.residual = inf", "budget.residual: residual_bytes cannot be as much as that"),
        ("budget.residual = 1" + "0" * 400, "budget.residual: residual_bytes cannot be as much as that"),
        ("budget.reports = 'many'", "budget.reports: 'many' is no reports: give a number"),
        ("budget.residual = { mots = 1 }", r"budget.residual: mots is not known, did you mean most\?"),
        ("budget.residual = {}", "budget.residual_bytes has no limit: give most, least or both"),
        ("budget.residual = { most = 1, least = 2 }", "budget.residual_bytes has a least above its most"),
        (
            "budget.residual = 1\nbudget.residual_bytes = 2",
            "residual_bytes has two budgets: give each end once",
        ),
        (
            "budget.boot.puak = 1",
            "budget.boot.puak: there is no figure 'boot.puak', did you mean peak. choose one of seconds",
        ),
        ("budget.boost.peak = 1", r"budget.boost.peak: no phase is named boost, did you mean boot\?"),
        ("budget.floor = 1", 'budget.floor: without a phase that does "idle" it is not measured, add one'),
        ("budget.t90 = 1", 'budget.t90: without a phase that does "free" it is not measured'),
        ("budget.command_status = 1", 'without a phase that does "run" it is not measured'),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_fix(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    with pytest.raises(UsageError, match=r"a\.toml: No such file or directory: name the TOML file"):
        read_scenario(path)
    with pytest.raises(UsageError, match=r"Is a directory: name the TOML file"):
        read_scenario(tmp_path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(UsageError, match=r"a\.toml: byte 8 is no UTF-8"):
        read_scenario(path)
    path.write_text("[guest]\ncpu = 2")
    with pytest.raises(UsageError, match=r"a\.toml: guest\.cpu is not known, did you mean cpus\?"):
        read_scenario(path)
    os.truncate(path, 1 << 30)
    with pytest.raises(UsageError, match=r"a\.toml: this is more than 1 MiB"):
        read_scenario(path)


def test_the_command_line_comes_before_the_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "new", "modules"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    text = (
        "[guest]\nkernel = 'old'\nmodules = 'modules'\n[budget]\nresidual = { least = 1, most = 5 }\npeak = 7"
    )
    scenario = parse(text, tmp_path)
    assert apply(scenario, Overrides()) == scenario
    assert apply(scenario, Overrides(kernel="new")).guest == GuestSpec(kernel=str(tmp_path / "new"))
    assert apply(scenario, Overrides(kernel="forky")).guest == GuestSpec(kernel="forky")
    both = apply(scenario, Overrides(kernel="new", modules="modules", memory="1G", cpus=3)).guest
    assert both == GuestSpec(
        kernel=str(tmp_path / "new"), modules=str(tmp_path / "modules"), memory=1024 * MIB, cpus=3
    )
    said = apply(scenario, Overrides(budgets=("residual=64M", "boot.seconds<=9s", "residual>=2k"))).budgets
    assert said == (
        Budget(figure="peak_bytes", most=7.0),
        Budget(figure="residual_bytes", most=64.0 * MIB, least=2048.0),
        Budget(figure="boot.seconds", most=9.0),
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (Overrides(kernel="/nowhere"), "--kernel: '/nowhere': No such file.*; or choose a Debian suite of"),
        (Overrides(modules="/nowhere"), "--modules: '/nowhere': No such file"),
        (Overrides(memory="much"), "--memory much: 'much' is no size"),
        (
            Overrides(memory="256M"),
            r"^with --memory 256M: phase\[3\].size is 256 MiB: give less than guest.memory, 256 MiB",
        ),
        (
            Overrides(memory="64M", cpus=2),
            "^with --memory 64M, --cpus 2: guest.memory is 64 MiB: give 128 MiB",
        ),
        (Overrides(cpus=0), "^with --cpus 0: guest.cpus is 0"),
        # What else is wrong does not come from them.
        (
            Overrides(memory="1G", budgets=("command=1",)),
            "^budget.command_seconds: without a phase that does",
        ),
        (
            Overrides(kernel=""),
            "^--kernel is empty: name a file or folder that is there; or choose a Debian suite of",
        ),
        (Overrides(modules=""), "^--modules is empty: name a file or folder"),
        (Overrides(flavour=""), "^guest.flavour is empty: leave it out, or give one"),
        (
            Overrides(budgets=("residual",)),
            "--budget residual: 'residual' is no budget: write it like residual=128M or",
        ),
        (Overrides(budgets=("residual<64M",)), "--budget residual<64M: 'residual<64M' is no budget"),
        (Overrides(budgets=("residual=soon",)), "--budget residual=soon: 'soon' is no size"),
        (Overrides(budgets=("residul=1",)), "--budget residul=1: there is no figure 'residul'"),
        (Overrides(budgets=("peak=1", "peak=2")), "peak_bytes has two budgets"),
        (Overrides(budgets=("command=1",)), 'without a phase that does "run"'),
    ],
)
def test_a_mistake_on_the_command_line(overrides: Overrides, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        apply(STANDARD, overrides)


def test_what_python_makes_is_checked_as_well() -> None:
    """Fields are not checked by types alone: the plugin's users make these structs themselves."""
    with pytest.raises(UsageError, match=r"phase\[1\].deadline is -5"):
        check(Scenario(name="a", phases=(Idle(deadline=-5.0),)))
    with pytest.raises(UsageError, match=r"budget\.peak_bytes is nan"):
        check(Scenario(name="a", budgets=(Budget(figure="peak", most=float("nan")),)))
    whole = replace(STANDARD, budgets=(Budget(figure="return.peak", most=5.0),))
    assert check(whole).budgets == (Budget(figure="return.peak_bytes", most=5.0),)


def test_a_scenario_goes_through_json() -> None:
    """It is a part of result.json."""
    assert msgspec.json.decode(msgspec.json.encode(STANDARD), type=Scenario) == STANDARD


def test_every_key_is_documented() -> None:
    page = (EXAMPLES[0].parent / "README.md").read_text()
    kinds = [GuestSpec, DeviceSpec, *PHASES.values()]
    keys = {field.name for kind in kinds for field in msgspec.structs.fields(kind)} | set(PHASES)
    assert [key for key in sorted(keys) if f"`{key}`" not in page and f"`{key} =" not in page] == []


# --- deadlines of plateaus ---


def test_a_guest_that_reports_seldom_is_given_more_time() -> None:
    phases = (Idle(), Free(deadline=400.0), Command(command="true", settle=True), Command(command="true"))
    ordered = check(Scenario(name="a", guest=GuestSpec(page_reporting_delay_ms=100_000), phases=phases))
    assert [phase.deadline for phase in ordered.phases] == [120.0, 1200.0, 400.0, 1200.0, 300.0]
    assert check(ordered) == ordered
    assert check(Scenario(name="a", phases=(Idle(),))).phases[1].deadline == 60.0


@pytest.mark.parametrize(
    ("phase", "delay"),
    [(Idle(deadline=5.9), None), (Free(deadline=29.0), 10_000), (DropCaches(), 90_000_000),
     (Command(command="true", settle=True, deadline=1.0), None)],
)  # fmt: skip
def test_a_deadline_that_no_guest_can_keep_is_refused(phase: Phase, delay: int | None) -> None:
    guest = GuestSpec(page_reporting_delay_ms=delay)
    with pytest.raises(
        UsageError, match=r"^phase\[1\]\.deadline is .*page_reporting_delay_ms.*give more than that"
    ):
        check(Scenario(name="a", guest=guest, phases=(phase,)))
