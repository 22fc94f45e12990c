"""Properties of the load order of kernel modules, over arbitrary acyclic dependencies.

- Every wanted module that is not built in is loaded.
- Each module is loaded once, after everything it depends on.
- Nothing is loaded that is built in, or that no wanted module reaches.
- A circle, and a dependency that does not exist, are errors that name the modules; a missing soft dependency is not.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_images.elf import ModuleInfo
from guest_images.errors import ModuleMissingError
from guest_images.modules import load_order

COUNT = 8


@st.composite
def kernels(draw: st.DrawFn) -> tuple[dict[str, ModuleInfo], frozenset[str], list[str]]:
    """Modules m0..m7, each depending on some before it; some built in; some wanted."""
    modules = {}
    for number in range(COUNT):
        below = (
            st.lists(st.sampled_from([f"m{i}" for i in range(number)]), unique=True)
            if number
            else st.just([])
        )
        depends, soft = draw(below), draw(below)
        modules[f"m{number}"] = ModuleInfo(f"m{number}", tuple(depends), (*soft, "absent"))
    choice = st.lists(st.sampled_from(sorted(modules)), unique=True)
    return modules, frozenset(draw(choice)), draw(choice)


def reached(modules: dict[str, ModuleInfo], builtin: frozenset[str], wanted: list[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in modules and name not in builtin and name not in found:
            found.add(name)
            waiting += [*modules[name].depends, *modules[name].softdep_pre]
    return found


@given(kernels())
def test_the_order_is_complete_minimal_and_sorted(
    kernel: tuple[dict[str, ModuleInfo], frozenset[str], list[str]],
) -> None:
    modules, builtin, wanted = kernel
    order = load_order(wanted, modules.get, builtin.__contains__)
    assert set(order) == reached(modules, builtin, wanted)
    assert len(order) == len(set(order))
    for at, name in enumerate(order):
        needed = {*modules[name].depends, *modules[name].softdep_pre} & set(modules) - builtin
        assert needed <= set(order[:at])


def test_a_circle_is_named() -> None:
    circle = {"a": ModuleInfo("a", ("b",)), "b": ModuleInfo("b", ("c",)), "c": ModuleInfo("c", ("b",))}
    with pytest.raises(ModuleMissingError, match="b -> c -> b"):
        load_order(["a"], circle.get, lambda _: False)


def test_a_missing_module_names_itself_who_needs_it_and_the_fix() -> None:
    modules = {"virtio_balloon": ModuleInfo("virtio_balloon", ("virtio",))}
    with pytest.raises(
        ModuleMissingError, match=r"no module virtio \(needed by virtio_balloon\).*CONFIG_VIRTIO=y"
    ):
        load_order(["virtio_balloon"], modules.get, lambda _: False)
