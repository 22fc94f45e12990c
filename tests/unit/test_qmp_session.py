"""One client's conversation, sans I/O: QEMU's words, the order of answers, ids, events, and what holds a client up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hostdev import __version__
from hostdev.errors import CommandError
from hostdev.qmp_session import ANSWERS_LIMIT, PACKAGE, VALUES_PER_TURN, Command, QmpSession
from tests import qmp_texts

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
COMMAND = b'{"execute":"query-balloon"}'


def sent(session: QmpSession) -> list[dict[str, Any]]:
    """Take what is outgoing; each message is a line of ASCII."""
    lines = bytes(session.outgoing)
    session.outgoing.clear()
    assert lines.isascii()
    assert lines.count(b"\r\n") == lines.count(b"\n")
    assert lines.endswith(b"\r\n") or not lines
    return qmp_texts.replies(lines)


@pytest.fixture
def greeted() -> QmpSession:
    session = QmpSession()
    sent(session)
    return session


@pytest.fixture
def session(greeted: QmpSession) -> QmpSession:
    greeted.feed(NEGOTIATE)
    assert greeted.next_command() is None
    assert sent(greeted) == [{"return": {}}]
    return greeted


def test_the_greeting() -> None:
    """qmp-shell reads QMP.version.qemu.{major,minor,micro} off it."""
    (greeting,) = sent(QmpSession())
    triple = greeting["QMP"]["version"]["qemu"]
    assert f"{triple['major']}.{triple['minor']}.{triple['micro']}" == __version__
    assert greeting["QMP"]["version"]["package"] == PACKAGE
    assert greeting["QMP"]["capabilities"] == []


@pytest.mark.parametrize("wrong", qmp_texts.BEFORE_NEGOTIATION)
def test_before_negotiation(greeted: QmpSession, wrong: bytes) -> None:
    greeted.feed(wrong)
    assert greeted.next_command() is None
    assert sent(greeted) == qmp_texts.BEFORE_NEGOTIATION[wrong]
    greeted.feed(NEGOTIATE)
    assert greeted.next_command() is None
    assert sent(greeted) == [{"return": {}}]


LOCAL = [wrong for wrong in qmp_texts.AFTER_NEGOTIATION if b"qom-list" not in wrong]


@pytest.mark.parametrize("wrong", LOCAL)
def test_after_negotiation(session: QmpSession, wrong: bytes) -> None:
    session.feed(wrong)
    assert session.next_command() is None
    assert sent(session) == qmp_texts.AFTER_NEGOTIATION[wrong]
    session.feed(COMMAND)
    assert session.next_command() == Command("query-balloon", {})


def test_no_capability_can_be_had(greeted: QmpSession) -> None:
    greeted.feed(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}')
    assert greeted.next_command() is None
    assert sent(greeted) == [qmp_texts.generic("Capability oob not available", id=1)]
    assert not greeted.negotiated


def test_a_command_and_its_answer(session: QmpSession) -> None:
    session.feed(b'{"execute":"balloon","arguments":{"value":1073741824},"id":"a"}\n')
    assert session.next_command() == Command("balloon", {"value": 1 << 30})
    assert (session.outstanding, session.is_ready, sent(session)) == (True, False, [])
    session.answer({})
    assert sent(session) == [{"return": {}, "id": "a"}]
    session.feed(b'{"execute":"query-balloon","id":null}')
    assert session.next_command() is not None
    session.refuse(CommandError("No balloon device has been activated", "DeviceNotActive"))
    error = {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}
    assert sent(session) == [{"error": error, "id": None}]


@pytest.mark.parametrize("identity", [0, "", None, False, [], {}, [{"a": [1.5]}], "é\n", 2**64 - 1, -1])
def test_any_id_comes_back(session: QmpSession, identity: object) -> None:
    session.feed(json.dumps({"execute": "query-balloon", "id": identity}).encode())
    session.next_command()
    session.answer(1)
    (reply,) = sent(session)
    assert reply == {"return": 1, "id": identity}
    assert type(reply["id"]) is type(identity)


def test_one_command_at_a_time_in_order(session: QmpSession) -> None:
    """Errors wait for their turn too."""
    session.feed(b'{"execute":"query-balloon","id":1}{"execute":"foo","id":2}{"execute":"inhibit","id":3}')
    assert session.next_command() == Command("query-balloon", {})
    assert session.next_command() is None
    assert sent(session) == []
    session.answer(5)
    assert session.next_command() == Command("inhibit", {})
    session.answer({})
    assert sent(session) == [
        {"return": 5, "id": 1},
        qmp_texts.not_found(qmp_texts.FOO, id=2),
        {"return": {}, "id": 3},
    ]


def test_an_error_that_is_framed_has_no_old_id(session: QmpSession) -> None:
    session.feed(b'{"execute":"foo","id":2}\xff')
    assert session.next_command() is None
    assert sent(session) == [
        qmp_texts.not_found(qmp_texts.FOO, id=2),
        qmp_texts.generic(qmp_texts.PARSE_ERROR),
    ]


def test_events_are_for_those_who_negotiated(session: QmpSession) -> None:
    stranger = QmpSession()
    sent(stranger)
    for each in (session, stranger):
        each.tell("BALLOON_CHANGE", {"actual": 4096}, 1_700_000_001_002_003_999)
    timestamp = {"seconds": 1_700_000_001, "microseconds": 2003}
    assert sent(session) == [{"event": "BALLOON_CHANGE", "data": {"actual": 4096}, "timestamp": timestamp}]
    assert sent(stranger) == []


def test_who_does_not_read_is_held_up(session: QmpSession) -> None:
    """What a client can make us keep is its last read and a little more than the limit."""
    session.feed(b"}" * 1000)
    answered, turns = 0, 0
    while session.has_input:
        while session.is_ready:
            assert session.next_command() is None
        assert len(session.outgoing) < ANSWERS_LIMIT + 200
        answered += len(sent(session))
        turns += 1
    assert answered == 1000
    assert turns > 10


def test_others_have_their_turn(session: QmpSession) -> None:
    session.feed(b"1 " * 1000)
    assert session.next_command() is None
    assert len(sent(session)) == VALUES_PER_TURN
    assert session.is_ready
