"""Phases on a guest that does what a test says, in a time that goes by without waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from balloonlab.measure.phases import PhaseError, Phases, settled_checks
from balloonlab.measure.report import Check, PhaseResult
from balloonlab.measure.scenario import Churn, Command, DropCaches, Fill, Free, Idle, Phase
from balloonlab.sampler import Sampler
from balloonlab.timeline import QUIET_SECONDS, Sample
from guest_images.agent_client import Filled, Ran
from guest_images.errors import AgentRefusedError, AgentTimeoutError

MIB = 1 << 20
TIMEOUT = AgentTimeoutError("no answer within its deadline")


class Time(Sampler):
    """A sampler whose time passes by sleeping; a sample is taken at each step. held: the footprint at a second."""

    def __init__(self, held: Callable[[float], int]) -> None:
        self.samples: list[Sample] = []
        self.phase = ""
        self._now = 0.0
        self._held = held
        self._sleep = asyncio.sleep

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        self._now += seconds
        await self.look()
        await self._sleep(0)

    async def look(self) -> Sample:
        sample = Sample(self._now, self.phase, self._held(self._now), 300 * MIB, 0, 0, 0)
        self.samples.append(sample)
        return sample


class Guest:
    """An agent. answers: what each call returns or raises. deadlines: what each was given."""

    def __init__(self, **answers: object) -> None:
        self.answers = {
            "fill": Filled(7, MIB, 0.1),
            "free": None,
            "drop_caches": None,
            "ping": None,
        } | answers
        self.deadlines: dict[str, float] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*_: object, deadline: float = -1.0, **__: object) -> object:
            self.deadlines[name] = deadline
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


class Rig:
    """Only its guest."""

    def __init__(self, agent: Guest) -> None:
        self.agent = agent


class Bench:
    """Phases on a guest."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        guest: Guest | None = None,
        held: Callable[[float], int] = lambda _: 100 * MIB,
        delay_ms: int | None = None,
    ) -> None:
        self.guest, self.time = guest or Guest(), Time(held)
        monkeypatch.setattr("balloonlab.sampler.asyncio.sleep", self.time.sleep)
        rig = cast("Any", Rig(self.guest))
        self.phases = Phases(rig, self.time, folder, report_delay_ms=delay_ms)

    def carry_out(self, *phases: Phase) -> PhaseResult:
        async def all_of_them() -> list[PhaseResult]:
            return [await self.phases.carry_out(phase) for phase in phases]

        return asyncio.run(all_of_them())[-1]

    def fails(self, *phases: Phase) -> PhaseError:
        with pytest.raises(PhaseError) as caught:
            self.carry_out(*phases)
        return caught.value


# --- plateaus ---


@pytest.mark.parametrize(("delay_ms", "quiet"), [(None, QUIET_SECONDS), (100, QUIET_SECONDS), (10_000, 30.0)])
def test_a_plateau_is_three_passes_of_the_guests_own(
    delay_ms: int | None, quiet: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step comes shortly before three passes of nothing would have gone by."""
    step = quiet - 0.6
    bench = Bench(
        tmp_path, monkeypatch, held=lambda now: (200 if now < step else 100) * MIB, delay_ms=delay_ms
    )
    done = bench.carry_out(Idle(name="floor", deadline=300.0))
    assert done.settled
    assert step + quiet <= done.seconds <= step + quiet + 1.0
    assert done.end_bytes == 100 * MIB


def test_a_guest_that_does_not_settle_fails_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = (
        Idle(name="floor", deadline=20.0),
        Fill(name="fill", size=MIB),
        Command(name="run", command="true"),
        Free(name="return", deadline=30.0),
    )
    guest = Guest(run=Ran(0, "", "", truncated=False))
    bench = Bench(tmp_path, monkeypatch, guest, held=lambda now: (round(now) if now > 7 else 0) * 4 * MIB)
    assert not bench.carry_out(*phases).settled
    assert settled_checks(phases, bench.phases.done) == [
        Check(name="floor settles", outcome="pass"),
        Check(name="return settles", outcome="fail", message="still changing after 30 s: raise its deadline"),
    ]


# --- deadlines ---


FILL = Fill(name="fill", size=MIB, deadline=9.0)
SLOW: dict[str, tuple[Phase, ...]] = {
    "fill": (FILL,),
    "free": (FILL, Free(name="return", deadline=9.0)),
    "drop_caches": (DropCaches(name="drop", deadline=9.0),),
    "run": (Command(name="run", command="true", deadline=9.0),),
}


@pytest.mark.parametrize("call", SLOW)
def test_a_call_is_given_its_phases_deadline_and_a_slow_one_fails_the_phase(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(**{call: TIMEOUT})
    failed = Bench(tmp_path, monkeypatch, guest).fails(*SLOW[call])
    assert failed.ending == "command-failed"
    assert str(failed).endswith("not done within 9 s, and the guest answers: raise its deadline")
    assert guest.deadlines[call] == 9.0


@pytest.mark.parametrize("call", SLOW)
def test_a_guest_that_answers_nothing_hangs(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, Guest(**{call: TIMEOUT, "ping": TIMEOUT}))
    with pytest.raises(AgentTimeoutError):
        bench.carry_out(*SLOW[call])


def test_fills_of_a_free_share_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)

    async def slowly(_handle: int) -> None:
        await bench.time.sleep(4.0)

    bench.phases._before_free = slowly
    done = bench.carry_out(FILL, FILL, Free(name="return", deadline=60.0))
    assert bench.guest.deadlines["free"] == pytest.approx(52.0)
    assert done.settled


def test_rounds_that_do_not_fit_fail_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)

    async def slowly(_handle: int) -> None:
        await bench.time.sleep(4.0)

    bench.phases._before_free = slowly
    failed = bench.fails(Churn(name="churn", size=MIB, rounds=5, deadline=7.0))
    assert failed.ending == "command-failed"
    assert "2 of 5 rounds within 7 s: raise its deadline" in str(failed)


# --- refusals ---


@pytest.mark.parametrize(
    ("said", "ending"),
    [
        ("OSError: [Errno 12] Cannot allocate memory", "out-of-memory"),
        ("OSError: no such file", "command-failed"),
    ],
)
@pytest.mark.parametrize("call", ["fill", "free", "drop_caches"])
def test_a_refusal_ends_a_run_by_its_reason(
    call: str, said: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Bench(tmp_path, monkeypatch, Guest(**{call: AgentRefusedError(said)})).fails(*SLOW[call])
    assert failed.ending == ending
    assert said in str(failed)


# --- commands ---


@pytest.mark.parametrize("name", ["console", "device", "qemu", "dmesg", "run"])
def test_a_commands_output_overwrites_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / f"{name}.log"
    own.write_text("the run's own")
    bench = Bench(tmp_path, monkeypatch, Guest(run=Ran(0, "said\n", "and erred\n", truncated=False)))
    bench.carry_out(Command(name=name, command="true"))
    assert own.read_text() == "the run's own"
    assert (tmp_path / f"run-{name}.log").read_text() == "said\nand erred\n"


def test_a_commands_status_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, Guest(run=Ran(3, "", "it is missing\n", truncated=False)))
    failed = bench.fails(Command(name="run", command="have it"))
    assert failed.ending == "command-failed"
    assert str(failed) == "run: 'have it' ended with status 3, 0 is right: it is missing"
    assert bench.phases.command_status == 3
    assert bench.phases.command_seconds is not None
