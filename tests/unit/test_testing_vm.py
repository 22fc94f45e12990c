"""What the fixtures hand out, without a guest: when a guest has settled, and what is remembered of what cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import pytest

from balloonlab.errors import UsageError
from balloonlab.measure.scenario import GuestSpec
from balloonlab.rig import Rig, Setup
from balloonlab.testing import vm as module
from balloonlab.testing import wanted as wanting
from balloonlab.testing.vm import BalloonVm
from balloonlab.testing.wanted import Preparations, Wanted, is_unmet, wanted
from balloonlab.timeline import QUIET_SECONDS, SETTLE_QUIETS, SETTLE_SECONDS, Sample
from guest_images.build import GuestImage
from qmp_glue.errors import DownloadError, MirrorMissingError, QemuNotFoundError, ResolutionError, UnpackError
from qmp_glue.find import Qemu

HELD = 100 << 20

Made: TypeAlias = Callable[[int | None], BalloonVm]


class Clocked:
    """A guest at rest, looked at each second of a clock that goes on by looking."""

    last: Clocked

    def __init__(self, _rig: Rig, *, start: float) -> None:
        del start
        self.samples: list[Sample] = []
        Clocked.last = self

    def now(self) -> float:
        return float(len(self.samples))

    async def look(self) -> None:
        self.samples.append(Sample(self.now(), "", HELD, named_bytes=0))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Make a BalloonVm whose samples are those of Clocked."""
    monkeypatch.setattr(module, "Sampler", Clocked)
    monkeypatch.setattr(module, "GUEST_SECONDS", 0.0)
    image = GuestImage("own", "6.0", tmp_path / "vmlinux", tmp_path / "initrd", True)

    async def nothing() -> None:
        pass

    def make(delay_ms: int | None) -> BalloonVm:
        setup = Setup(Qemu((str(tmp_path / "qemu"),), version="11.1.0"), image, 512 << 20)
        guest = BalloonVm(setup, tmp_path, GuestSpec(page_reporting_delay_ms=delay_ms))
        rig = SimpleNamespace(check=nothing, vm=SimpleNamespace(footprint=lambda: HELD))
        monkeypatch.setattr(guest, "rig", rig)
        made_ones.append(guest)
        return guest

    made_ones: list[BalloonVm] = []
    yield make
    for guest in made_ones:
        guest._loop.close()


@pytest.mark.parametrize(("delay_ms", "quiet"), [(None, QUIET_SECONDS), (20_000, 60.0)])
def test_settling_takes_three_passes_of_this_guest(made: Made, delay_ms: int | None, quiet: float) -> None:
    assert made(delay_ms).settle() == HELD
    assert quiet <= Clocked.last.samples[-1].seconds <= quiet + 2


def test_settling_within_less_than_that_is_refused(made: Made) -> None:
    with pytest.raises(UsageError, match=r"settle\(59\): .* 60 s .*give it more"):
        made(20_000).settle(59)
    assert made(20_000).settle(61) == HELD


def test_a_guest_that_never_settles_is_given_up_later_the_slower_it_reports(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_settled", lambda _samples, since, quiet: False)
    for delay_ms, seconds in ((None, SETTLE_SECONDS), (20_000, SETTLE_QUIETS * 60.0)):
        guest = made(delay_ms)
        monkeypatch.setattr(guest, "_state", lambda: "as it is")
        with pytest.raises(TimeoutError, match=f"not settled in {seconds:g} s"):
            guest.settle()


@pytest.mark.parametrize(
    ("error", "unmet"),
    [
        (DownloadError("no network"), True),
        (MirrorMissingError("no Debian"), True),
        (QemuNotFoundError("no QEMU"), True),
        (UnpackError("broken"), True),
        (ResolutionError("no such package"), False),
        (UsageError("no such word"), False),
    ],
)
def test_what_a_machine_lacks_and_what_a_suite_does_wrong(error: BaseException, unmet: bool) -> None:
    assert is_unmet(error) is unmet


def test_a_guest_that_cannot_be_had_is_asked_for_once_and_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    setup = object()

    def prepare(guest: Wanted, _progress: object) -> object:
        asked.append(guest.guest.flavour)
        if guest.guest.flavour == "none":
            raise DownloadError("it cannot be had")
        return setup

    monkeypatch.setattr(wanting, "_setup", prepare)
    preparations = Preparations(lambda _line: None)
    for _ in range(2):
        with pytest.raises(DownloadError):
            preparations.setup(wanted({"flavour": "none"}))
    assert preparations.setup(wanted({"files": {}})) is setup
    assert asked == ["none", "cloud-amd64"]
