"""Which guest a test wants, from the words of its marker and of the command line, and what is needed to boot it.

Making that ready may download; a kernel or a QEMU that could not be had once is not asked for again in the same run.
Used by pytest_plugin.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from balloonlab.errors import EXPECTED, UsageError, exit_status
from balloonlab.measure.guest_setup import for_arm, prepare
from balloonlab.measure.scenario import ARMS, Arm, DeviceSpec, GuestSpec, Scenario
from balloonlab.measure.scenario_check import check
from balloonlab.rig import Setup
from balloonlab.sizes import parse_size
from hostdev.errors import EXIT_UNSUPPORTED
from qmp_glue.errors import DebianError, ResolutionError

_GUEST = GuestSpec.__struct_fields__
_DEVICE = DeviceSpec.__struct_fields__
WORDS = ("arm", *_GUEST, *_DEVICE)

Spec = TypeVar("Spec", GuestSpec, DeviceSpec)


@dataclass(frozen=True)
class Wanted:
    """A guest, the options of the device beside it, and whose balloon it has."""

    guest: GuestSpec
    device: DeviceSpec
    arm: Arm


def wanted(words: Mapping[str, object]) -> Wanted:
    """Return what words such as kernel="forky", memory="1G" ask for. Raises UsageError."""
    for word in words:
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(WORDS)}"
            raise UsageError(f"a guest has no {word!r}: {hint}")
    arm = words.get("arm", "ours")
    if arm not in ARMS:
        raise UsageError(f"arm={arm!r} is not known: choose one of {', '.join(ARMS)}")
    guest, device = _specify(GuestSpec, _GUEST, words), _specify(DeviceSpec, _DEVICE, words)
    check(Scenario(name="pytest", guest=guest, device=device))
    return Wanted(guest, device, arm)


def _specify(kind: type[Spec], names: tuple[str, ...], words: Mapping[str, object]) -> Spec:
    chosen = {name: words[name] for name in names if name in words}
    if isinstance(memory := chosen.get("memory"), str):
        chosen["memory"] = parse_size(memory)
    try:
        return msgspec.convert(chosen, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"a guest cannot be as it is asked for: {error}") from error


def is_unmet(error: BaseException) -> bool:
    """Whether one of EXPECTED says that this machine lacks something: a reason to skip a test, not to fail it.

    That a suite has no such package would be so on every machine.
    """
    unreachable = isinstance(error, DebianError) and not isinstance(error, ResolutionError)
    return unreachable or exit_status(error) == EXIT_UNSUPPORTED


@dataclass
class Preparations:
    """What could not be had in one run of a test suite, by guest: a time-out is not waited for again."""

    progress: Callable[[str], None]
    _unmet: dict[bytes, BaseException] = field(default_factory=dict)

    def setup(self, guest: Wanted) -> Setup:
        """Return what is to be booted. Raises what EXPECTED has; is_unmet() tells where that is this machine's lack."""
        key = msgspec.json.encode(guest.guest)  # its files are a dictionary, which has no hash
        if key in self._unmet:
            raise self._unmet[key]
        try:
            return _setup(guest, self.progress)
        except EXPECTED as error:
            if is_unmet(error):
                self._unmet[key] = error
            raise


def _setup(guest: Wanted, progress: Callable[[str], None]) -> Setup:
    setup = for_arm(prepare(guest.guest, guest.device, progress=progress), guest.arm)
    return replace(setup, trace=False)  # what a trace is read for is measured by balloonlab measure
