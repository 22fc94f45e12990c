"""The targets find what they are there for: with a fault put into the device, the input that is kept for it fails."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from balloonlab import decode
from hostdev import giver, json_stream, snapshot
from hostdev.balloon import Balloon
from hostdev.commands import Commands
from hostdev.fds import Fd
from hostdev.hinting import Hinting
from hostdev.message_end import MessageEnd
from hostdev.pages import Span
from hostdev.rings import Ring, Step
from hostdev.session import Session
from hostdev.statistics import Statistics
from hostdev.virtqueue import Virtqueue
from tests.fuzz import campaign, targets

# An input that fails leaves what it had open to the collector of garbage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Patch = Callable[[pytest.MonkeyPatch], None]


def outward(patch: pytest.MonkeyPatch) -> None:
    """Pages that are only partly named are released."""

    def align(span: Span, page_size: int) -> Span:
        start = span.start // page_size * page_size
        return Span(start, -(-span.end // page_size) * page_size - start)

    patch.setattr(giver, "align_inward", align)


def no_head_check(patch: pytest.MonkeyPatch) -> None:
    """A head that is offered again while it is in hand is taken."""

    def take(self: Virtqueue) -> int | None:
        self._outstanding.clear()
        return _TAKE(self)

    patch.setattr(Virtqueue, "take", take)


def early_answer(patch: pytest.MonkeyPatch) -> None:
    """A chain is returned before all of it is released."""

    def go_on(self: Balloon, index: int, ring: Ring) -> Step:
        assert ring.job is not None
        ring.job.take()
        return self._finish(index, ring, ring.job.head)

    patch.setattr(Balloon, "_continue", go_on)


def old_statistics(patch: pytest.MonkeyPatch) -> None:
    """What a buffer does not hold stays known."""

    def take(self: Statistics, data: bytes) -> None:
        before = dict(self.values)
        _TAKE_STATISTICS(self, data)
        self.values = before | self.values

    patch.setattr(Statistics, "take", take)


def eager_hints(patch: pytest.MonkeyPatch) -> None:
    """Blocks count before the guest has said the round's id."""

    def take_block(self: Hinting, size: int) -> None:
        self._bytes += size
        self._blocks += 1

    patch.setattr(Hinting, "take_block", take_block)


def lost_reply(patch: pytest.MonkeyPatch) -> None:
    """A refused message is not answered."""
    patch.setattr(Session, "refusal", lambda _self, _header, _payload: b"")


def kept_descriptor(patch: pytest.MonkeyPatch) -> None:
    """Descriptors that no handler takes stay open."""
    kept: list[Fd] = []
    patch.setattr("hostdev.session.close_all", kept.extend)


def lost_command(patch: pytest.MonkeyPatch) -> None:
    """Who asks for statistics of a guest that says nothing waits for ever."""
    patch.setattr(Commands, "_look_for_statistics", lambda *_arguments: None)


def endless_value(patch: pytest.MonkeyPatch) -> None:
    """A JSON value of any length is collected."""
    patch.setattr(json_stream, "MAX_VALUE", 1 << 30)


def done_twice(patch: pytest.MonkeyPatch) -> None:
    """A message that is given again takes effect again."""

    def handle(self: MessageEnd, frame: object, received: list[Fd]) -> None:
        self.done = type(self.done)()
        _HANDLE(self, frame, received)  # type: ignore[arg-type]

    patch.setattr(MessageEnd, "handle", handle)


def any_ring(patch: pytest.MonkeyPatch) -> None:
    """A record's rings are not looked at."""
    patch.setattr(snapshot, "_check_rings", lambda _image, _count: None)


def any_name(patch: pytest.MonkeyPatch) -> None:
    """A trace's causes and roles are not looked at."""
    patch.setattr(decode, "_check_names", lambda _value: None)


_TAKE, _TAKE_STATISTICS, _HANDLE = Virtqueue.take, Statistics.take, MessageEnd.handle

FAULTS: list[tuple[str, Patch]] = [
    ("chains", outward),
    ("chains", no_head_check),
    ("chains", early_answer),
    ("pfns", early_answer),
    ("statistics", old_statistics),
    ("hints", eager_hints),
    ("messages", lost_reply),
    ("messages", kept_descriptor),
    ("control", lost_command),
    ("control", endless_value),
    ("channel", done_twice),
    ("record", any_ring),
    ("trace", any_name),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda each: getattr(each, "__name__", each))
def test_a_fault_is_found(name: str, fault: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input passes without it: test_replay.py has it as well."""
    data = (campaign.seeds(name) / fault.__name__.replace("_", "-")).read_bytes()
    check = targets.load(name)
    check(b"")
    fault(monkeypatch)
    with targets.silence(), pytest.raises(Exception):  # noqa: B017, PT011  (whatever it is, it is a finding)
        check(data)
    gc.collect()
