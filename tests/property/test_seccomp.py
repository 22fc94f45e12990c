"""A filter does what its rules declare, whatever the call.

A call with a rule and arguments that it allows has the rule's action; with others it is denied.
A call without a rule has the default action.
A number above those that are known is unknown, all of x32 among them.
Of another architecture nothing is allowed.
No jump leaves the program, and every way through it ends: the kernel takes it.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostdev.seccomp import INSTRUCTION, Action, Argument, Rule, program
from hostdev.syscalls import LAST_KNOWN, Syscall
from tests import bpf

WORDS = st.integers(0, (1 << 64) - 1)
# Few enough that calls often meet them.
SMALL = st.integers(0, 7)
ARGUMENTS = st.builds(
    Argument,
    st.integers(0, 5),
    st.lists(SMALL, max_size=4, unique=True).map(tuple),
    st.sampled_from([0, 1, 4, 6]),
)
RULES = st.lists(
    st.builds(
        Rule,
        st.sampled_from(Syscall),
        st.lists(ARGUMENTS, max_size=3).map(tuple),
        st.sampled_from([Action.ALLOW, Action.UNKNOWN]),
    ),
    unique_by=lambda rule: rule.call,
    max_size=40,
)
CALLS = st.lists(st.one_of(SMALL, WORDS), min_size=6, max_size=6)


def declared(rules: list[Rule], default: Action, number: int, arguments: list[int]) -> Action:
    for rule in rules:
        if rule.call == number:
            held = (arguments[each.index] & 0xFFFF_FFFF for each in rule.arguments)
            fits = [
                not word & each.without and (not each.values or word in each.values)
                for each, word in zip(rule.arguments, held, strict=True)
            ]
            return rule.action if all(fits) else Action.DENY
    return default


@given(RULES, st.sampled_from(Action), st.integers(0, LAST_KNOWN), CALLS)
def test_what_is_declared_is_what_happens(
    rules: list[Rule], default: Action, number: int, arguments: list[int]
) -> None:
    made = program(rules, default)
    assert bpf.run(made, bpf.call(number, arguments)) == declared(rules, default, number, arguments)
    for rule in rules:
        assert bpf.run(made, bpf.call(rule.call, arguments)) == declared(rules, default, rule.call, arguments)


@given(RULES, st.integers(LAST_KNOWN + 1, (1 << 32) - 1), CALLS)
def test_what_is_newer_is_unknown(rules: list[Rule], number: int, arguments: list[int]) -> None:
    assert bpf.run(program(rules, Action.ALLOW), bpf.call(number, arguments)) == Action.UNKNOWN


@given(RULES, st.integers(0, (1 << 32) - 1), CALLS)
def test_other_architectures_are_denied(rules: list[Rule], number: int, arguments: list[int]) -> None:
    data = bpf.call(number, arguments, bpf.I386)
    assert bpf.run(program(rules, Action.ALLOW), data) == Action.DENY


@given(RULES, st.sampled_from(Action))
def test_the_kernel_takes_it(rules: list[Rule], default: Action) -> None:
    made = list(INSTRUCTION.iter_unpack(program(rules, default)))
    for at, (code, if_true, if_false, _value) in enumerate(made):
        is_jump = code & 7 == 5
        assert is_jump or if_true == if_false == 0
        assert at + 1 + max(if_true, if_false) < len(made) or code == 0x06
    assert made[-1][0] == 0x06
