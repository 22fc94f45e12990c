"""Properties of a machine's command line.

1. Parsed back by QEMU's own rules (an option list is split at single commas; a doubled one is a comma), every path,
   size and descriptor of the machine is found again, whatever characters a path holds.
2. No machine that can be made is one that the inspection warns of.
3. The descriptors to inherit are exactly those that the command line names.
"""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qmp_glue.board import MAX_ROOT_PORTS, RAM_ALIGNMENT_BYTES, Board
from qmp_glue.commandline import (
    BuiltInBalloon,
    Machine,
    VhostUserBalloon,
    arguments,
    inherited_fds,
    memory_sizes,
)
from qmp_glue.inspect import inspect_arguments
from qmp_glue.machine_setup import setup_of

path_texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1).map(
    lambda text: "/d/" + text
)
paths = path_texts.map(Path)
fds = st.integers(3, 1023)
channels = st.one_of(paths, fds)
sizes = st.integers(1, 1 << 28).map(lambda units: units * RAM_ALIGNMENT_BYTES)
q35s = st.builds(
    Board,
    nodes=st.lists(sizes, max_size=4).map(tuple),
    root_ports=st.integers(0, MAX_ROOT_PORTS),
    reboots=st.booleans(),
)
microvms = st.builds(Board, kind=st.just("microvm"), reboots=st.booleans(), force_legacy=st.booleans())


def balloons_for(board: Board) -> st.SearchStrategy[VhostUserBalloon | BuiltInBalloon | None]:
    """Balloons of every kind; one that is plugged later needs a port."""
    plugged = st.booleans() if board.root_ports else st.just(True)
    return st.one_of(
        st.none(),
        st.builds(VhostUserBalloon, channels, plugged=plugged),
        st.builds(BuiltInBalloon, free_page_reporting=st.booleans()),
    )


def machines_on(board: Board) -> st.SearchStrategy[Machine]:
    """Machines on a board, with the memory that its NUMA nodes have, if it has any."""
    return st.builds(
        Machine,
        memory_bytes=st.just(sum(board.nodes)) if board.nodes else sizes,
        board=st.just(board),
        cpus=st.integers(1, 64),
        kernel=paths,
        initrd=st.one_of(st.none(), paths),
        append=st.text(st.characters(exclude_characters="\0", codec="utf-8")),
        console=st.one_of(st.none(), paths),
        balloon=balloons_for(board),
        agent=st.one_of(st.none(), channels),
        qmp=st.one_of(st.none(), channels),
        paused=st.booleans(),
    )


machines = st.one_of(q35s, microvms).flatmap(machines_on)


def option_list(text: str) -> dict[str, str]:
    """Split as QEMU's util/qemu-option.c does: each value runs to a comma that no comma follows."""
    result = {}
    position = 0
    while position < len(text):
        matched = re.compile(r"((?:[^,]|,,)*)(?:,|$)", re.DOTALL).match(text, position)
        assert matched is not None
        key, equals, value = matched[1].replace(",,", ",").partition("=")
        result[key if equals else "implied"] = value if equals else key
        position = matched.end()
    return result


def values(words: list[str], option: str) -> list[str | None]:
    """What an option was given, read in the order that QEMU reads them; None for a flag, which takes no value."""
    found: list[str | None] = []
    rest = iter(words)
    for word in rest:
        value = None if word in {"-no-user-config", "-nodefaults", "-no-reboot", "-S"} else next(rest)
        if word == option:
            found.append(value)
    return found


def option_lists(words: list[str], option: str) -> list[dict[str, str]]:
    return [option_list(value) for value in values(words, option) if value is not None]


def channel_of(options: dict[str, str]) -> Path | int:
    return int(options["fd"]) if "fd" in options else Path(options["path"])


@given(machines)
def test_every_value_is_found_again(machine: Machine) -> None:
    words = arguments(machine)
    chardevs = {options["id"]: options for options in option_lists(words, "-chardev")}
    expected: dict[str, Path | int] = {}
    if isinstance(machine.balloon, VhostUserBalloon):
        expected["balloon"] = machine.balloon.channel
    for name in ("agent", "qmp", "console"):
        if (channel := getattr(machine, name)) is not None:
            expected[name] = channel
    assert {name: channel_of(options) for name, options in chardevs.items()} == expected
    assert values(words, "-kernel") == [str(machine.kernel)]
    assert values(words, "-append") == ([machine.append] if machine.append else [])
    backends = option_lists(words, "-object")
    assert [int(options["size"]) for options in backends] == list(memory_sizes(machine))
    assert sum(memory_sizes(machine)) == machine.memory_bytes
    assert values(words, "-S") == ([None] if machine.paused else [])


@given(machines)
def test_inspection_finds_nothing_wrong(machine: Machine) -> None:
    words = arguments(machine)
    assert inspect_arguments(words, filesystem=lambda _path: "ext4") == []
    assert setup_of(words).memory_bytes == machine.memory_bytes


@given(machines)
def test_named_descriptors_are_inherited(machine: Machine) -> None:
    chardevs = option_lists(arguments(machine), "-chardev")
    assert sorted(inherited_fds(machine)) == sorted(
        int(options["fd"]) for options in chardevs if "fd" in options
    )
