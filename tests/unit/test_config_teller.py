"""When the front end is told of a change: never while it stops its rings or has stopped them."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from hostdev.config_teller import TAKING_SECONDS
from hostdev.driver import GuestMemory
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import BackendRequest, Request
from tests.in_process import MIB, InProcess

CHANGE = BackendRequest.CONFIG_CHANGE_MSG


@pytest.fixture
def guest() -> Iterator[InProcess]:
    with InProcess(GuestMemory(64 * MIB)) as guest:
        guest.start()
        yield guest


def change(guest: InProcess, size: int = 32 * MIB) -> None:
    guest.command("balloon", value=size)


def disable(guest: InProcess, index: int) -> None:
    guest.request(Request.SET_VRING_ENABLE, wire.VringState(index, 0))


def test_one_message_for_what_has_changed_meanwhile(guest: InProcess) -> None:
    for size in (10, 20, 30):
        change(guest, size * MIB)
    assert guest.told() == [CHANGE]
    assert guest.told() == []


def test_nothing_is_begun_while_a_message_waits(guest: InProcess) -> None:
    change(guest)
    guest.teller.tell(lambda: True)
    assert not guest.teller.is_settled
    assert guest.teller.waits_for() is None
    assert guest.told() == [CHANGE]


@pytest.mark.parametrize("how", ["one disabled", "one stopped", "all stopped"])
def test_nothing_is_sent_to_a_front_end_that_stops(guest: InProcess, how: str) -> None:
    if how == "one disabled":
        disable(guest, 0)
    elif how == "one stopped":
        guest.request(Request.SET_VRING_ENABLE, wire.VringState(0, 0))
        guest.request(Request.GET_VRING_BASE, wire.VringState(0, 0))
    bases = {} if how != "all stopped" else guest.stop()
    change(guest)
    if how == "one stopped":
        # The others are as they were: a front end may use some rings and not others.
        assert guest.told() == [CHANGE]
        return
    assert guest.told() == []
    if bases:
        guest.resume(bases=bases)
    else:
        guest.enable()
    assert guest.told() == [CHANGE]


def test_answers_wait_until_it_has_been_taken(guest: InProcess) -> None:
    change(guest)
    states = [guest.teller.is_settled]
    for _ in range(2):
        guest.teller.tell(lambda: False)
        states.append(guest.teller.is_settled)
    assert guest.teller.waits_for() is not None
    assert guest.teller.due() == guest.now + TAKING_SECONDS
    assert guest.told() == [CHANGE]
    states.append(guest.teller.is_settled)
    assert states == [True, False, False, True]
    assert guest.teller.waits_for() is None
    assert guest.teller.due() is None


def test_the_next_step_is_not_missed_whenever_it_comes(guest: InProcess) -> None:
    """QEMU may take the first part before the worker waits for that: the descriptor must be readable then."""
    change(guest)
    guest.teller.tell(lambda: False)
    assert len(guest.backend_channel.recv(64)) == 1
    descriptor = guest.teller.waits_for()
    assert descriptor is not None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(0)


def test_a_change_before_the_last_message_was_read(guest: InProcess) -> None:
    change(guest)
    guest.teller.tell(lambda: False)
    guest._told = guest.backend_channel.recv(64)
    guest.teller.tell(lambda: False)
    change(guest, 10 * MIB)
    guest.teller.tell(lambda: False)
    assert guest.teller.waits_for() is not None
    assert guest.told() == [CHANGE, CHANGE]
    assert guest.teller.waits_for() is None


def test_answers_do_not_wait_for_ever(guest: InProcess) -> None:
    change(guest)
    guest.teller.tell(lambda: False)
    guest.now += TAKING_SECONDS
    assert guest.teller.is_settled
    assert guest.teller.due() is None
    assert guest.told() == [CHANGE]


@pytest.mark.parametrize("taken", [False, True])
def test_a_stop_between_the_two_parts(guest: InProcess, taken: bool) -> None:
    """Whether QEMU has the first part already cannot be told for sure then: what comes is no change of config."""
    change(guest)
    guest.teller.tell(lambda: False)
    if taken:
        guest._told = guest.backend_channel.recv(64)
        assert len(guest._told) == 1
    bases = guest.stop()
    (request,) = guest.told()
    assert request not in BackendRequest._value2member_map_
    assert guest.told() == []
    guest.resume(bases=bases)
    assert guest.told() == [CHANGE]


def test_a_front_end_without_a_channel_is_not_told(guest: InProcess) -> None:
    guest.session._drop_backend_channel()
    change(guest)
    guest.teller.tell(lambda: False)
    assert guest.teller.is_settled
    assert not guest.balloon.space.changed


def test_a_new_channel_between_the_two_parts(guest: InProcess) -> None:
    """As when the device is unplugged and another is made: the new one is told, the old one is gone."""
    change(guest)
    guest.teller.tell(lambda: False)
    assert len(guest.backend_channel.recv(64)) == 1
    guest.negotiate()
    guest.teller.tell(lambda: False)
    assert guest.teller.is_settled
    guest.resume(first=True)
    assert guest.told() == [CHANGE]


def test_a_channel_that_is_broken_is_as_none(guest: InProcess) -> None:
    guest.backend_channel.close()
    guest._theirs.close()
    change(guest)
    for _ in range(2):
        guest.teller.tell(lambda: False)
    assert guest.teller.is_settled
    assert guest.teller.waits_for() is None
    assert not guest.balloon.space.changed
