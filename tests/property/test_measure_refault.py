"""What was released and touched again, judged byte by byte.

Properties, over any looks (what was released since the last one, what is held now, how much time has passed):
- the count is that of a plain account of bytes: each release of a byte that the next look finds to be a hole waits
  REFAULT_SECONDS at most for a look that finds it held, counts once then, and is forgotten when the byte is released anew;
- it never falls, and never exceeds what was released;
- where nothing that was released ever is a hole, it is 0.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.ranges import total
from balloonlab.measure.refault import REFAULT_SECONDS, Refaults
from hostdev.pages import Span, merge

spans = st.lists(st.builds(Span, st.integers(0, 40), st.integers(1, 8)), max_size=5).map(merge)
looks = st.lists(st.tuples(st.sampled_from((0.5, 3.0, 9.5)), spans, spans), max_size=10)


class Account:
    """The same by single bytes: when each was released, as long as that is waited on."""

    def __init__(self) -> None:
        self.bytes = 0
        self.waiting: dict[int, float] = {}

    def look(self, seconds: float, released: list[Span], held: list[Span]) -> None:
        fresh = {byte for span in released for byte in range(span.start, span.end)}
        there = {byte for span in held for byte in range(span.start, span.end)}
        waiting = {
            byte: since
            for byte, since in self.waiting.items()
            if byte not in fresh and seconds - since <= REFAULT_SECONDS
        }
        self.bytes += len(waiting.keys() & there)
        self.waiting = {byte: since for byte, since in waiting.items() if byte not in there}
        self.waiting |= dict.fromkeys(fresh - there, seconds)


@given(looks)
def test_it_counts_as_a_plain_account_does(steps: list[tuple[float, list[Span], list[Span]]]) -> None:
    refaults, account = Refaults(), Account()
    seconds, released_so_far = 0.0, 0
    for passed, released, held in steps:
        seconds += passed
        released_so_far += total(released)
        before = refaults.bytes
        refaults.look(seconds, released, held)
        account.look(seconds, released, held)
        assert refaults.bytes == account.bytes
        assert before <= refaults.bytes <= released_so_far


@given(looks)
def test_what_never_was_a_hole_is_not_touched_again(
    steps: list[tuple[float, list[Span], list[Span]]],
) -> None:
    refaults, seconds = Refaults(), 0.0
    for passed, released, _ in steps:
        seconds += passed
        refaults.look(seconds, released, [Span(0, 100)])
    assert refaults.bytes == 0
