"""Properties of a client's conversation.

- However a client's bytes are cut, it gets the same answers and asks the same commands.
- Any bytes end in answers, each an object with exactly one of "return" and "error", and in commands that the schema has;
  nothing else is raised.
- Every well-formed command has exactly one answer, with its id, in the order of the commands.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hostdev.qmp_session import QmpSession
from hostdev.schema import COMMANDS, check_arguments
from tests import qmp_texts

IDS = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.booleans(), max_size=2)
NAMES = st.sampled_from([*COMMANDS, "foo", ""])
ARGUMENTS = st.dictionaries(
    st.sampled_from(["value", "path", "property", "size", "force", "enable", "x"]),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    max_size=3,
)
MESSAGES = st.fixed_dictionaries({"execute": NAMES, "id": IDS}, optional={"arguments": ARGUMENTS})
NEGOTIATE = b'{"execute":"qmp_capabilities"}'
PIECES = (
    MESSAGES.map(json.dumps).map(str.encode)
    | st.sampled_from([NEGOTIATE, *qmp_texts.AFTER_NEGOTIATION])
    | st.binary(max_size=10)
)
STREAMS = st.lists(PIECES, max_size=8).map(b"".join)


def converse(pieces: list[bytes]) -> list[dict[str, Any]]:
    """Feed the pieces; each command is answered with its own name and arguments. All that was sent, in order."""
    session, replies = QmpSession(), bytearray()
    for piece in pieces:
        session.feed(piece)
        while session.is_ready:
            command = session.next_command()
            if command is not None:
                check_arguments(command.name, command.arguments)
                session.answer([command.name, command.arguments])
            replies += session.outgoing
            session.outgoing.clear()
    return [json.loads(line) for line in replies.splitlines()]


@given(STREAMS, st.lists(st.integers(0, 300), max_size=5))
def test_any_cut_gives_the_same(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), max(len(stream), *cuts, 0)]
    whole = converse([stream])
    assert converse([stream[begin:end] for begin, end in pairwise(edges)]) == whole
    assert converse([b"", *(bytes([byte]) for byte in stream)]) == whole


@given(STREAMS)
def test_any_bytes_end_in_answers(stream: bytes) -> None:
    for reply in converse([NEGOTIATE, stream])[1:]:
        assert ("return" in reply) != ("error" in reply)
        assert reply.keys() <= {"return", "error", "id"}
        if "error" in reply:
            assert reply["error"].keys() == {"class", "desc"}


@given(st.lists(MESSAGES))
def test_every_command_has_one_answer(messages: list[dict[str, Any]]) -> None:
    stream = "".join(json.dumps(message) for message in messages).encode()
    replies = converse([NEGOTIATE, stream])[2:]
    # An integer beyond 64 bits becomes a floating point number, as with QEMU.
    assert [reply["id"] for reply in replies] == [
        json.loads(json.dumps(message["id"]), parse_int=_as_qemu) for message in messages
    ]


def _as_qemu(text: str) -> int | float:
    number = int(text)
    return number if -(1 << 63) <= number < 1 << 64 else float(text)
