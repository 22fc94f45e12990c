"""Properties of what is found on a console, whatever a guest writes there.

1. Every finding is one line of printable characters, TEXT_CHARACTERS at most, of a line that the text has.
2. There are FINDINGS_PER_KIND of a kind at most, in the order of the text.
3. A panic is found however many warnings came before it.
4. Text before and after, in lines of their own that say nothing, changes the numbers of lines and nothing else.
5. printable() is printable, no longer than asked for, and leaves alone what is so already.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.console import FINDINGS_PER_KIND, TEXT_CHARACTERS, findings
from balloonlab.printable import printable

WORDS = st.sampled_from(
    [
        "Kernel panic - not syncing: x",
        "BUG: y",
        "Oops: 0002 [#1]",
        "oom-kill:constraint=z",
        "Out of memory: Killed process 1 (a)",
        "soft lockup",
        "WARNING: CPU: 0",
        "x" * 500,
    ]
)
LINES = st.tuples(st.text(max_size=20), WORDS | st.just(""), st.text(max_size=20)).map("".join)
TEXTS = st.lists(LINES, max_size=60).map("\n".join) | st.text()
QUIET = st.integers(0, 40).map(lambda number: "all is well\n" * number)


@given(TEXTS)
def test_findings_are_lines_of_the_text_bounded_and_printable(text: str) -> None:
    found = findings(text)
    lines = text.split("\n")
    for finding in found:
        assert finding.text.isprintable()
        assert len(finding.text) <= TEXT_CHARACTERS
        assert finding.text == printable(lines[finding.line - 1].strip(), TEXT_CHARACTERS)
    assert [finding.line for finding in found] == sorted({finding.line for finding in found})
    assert all(number <= FINDINGS_PER_KIND for number in Counter(finding.kind for finding in found).values())


@given(st.integers(0, 200))
def test_a_panic_is_found_behind_any_number_of_warnings(warnings: int) -> None:
    text = "WARNING: CPU: 0 PID: 1\n" * warnings + "Kernel panic - not syncing: at last"
    assert findings(text)[-1].kind == "panic"


@given(TEXTS, QUIET, QUIET)
def test_lines_that_say_nothing_only_move_it(text: str, before: str, after: str) -> None:
    moved = findings(before + text + "\n" + after)
    plain = findings(text)
    assert [(finding.kind, finding.text) for finding in moved] == [
        (finding.kind, finding.text) for finding in plain
    ]
    assert [finding.line - before.count("\n") for finding in moved] == [finding.line for finding in plain]


@given(st.text(), st.integers(2, 80))
def test_printable_is_printable(text: str, most: int) -> None:
    shown = printable(text, most)
    assert shown.isprintable()
    assert len(shown) <= most
    assert printable(shown, most) == shown
