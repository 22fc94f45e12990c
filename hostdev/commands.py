"""The commands of the control socket that are about one guest, carried out beside its device.

Envelopes in, envelopes out: how they travel is worker.py's business, and that they are QMP to the client is control.py's.
Commands that must wait (for a guest's answer, for a long walk through memory) wait here, bounded in time, and never hold
up the rings: worker.py calls tick() when due() says so.

QEMU's names and meanings where QEMU has them: balloon, query-balloon, qom-get and qom-set of guest-stats and
guest-stats-polling-interval, the event BALLOON_CHANGE; their words were read off QEMU 11.1.3.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hostdev import footprint, queries, sandbox
from hostdev.balloon import Balloon
from hostdev.errors import CommandError
from hostdev.estimates import Estimates
from hostdev.session import Session
from hostdev.target import Target, logical_size
from hostdev.wire.balloon import Feature, Role
from hostdev.wire.control import Envelope, Kind, refusal, result

# Seconds that a guest gets to answer a question for statistics: it takes some milliseconds. As in cloud-hypervisor.
STATISTICS_SECONDS = 1.0
# Seconds between two events of one name, as QEMU limits them (monitor/monitor.c).
EVENT_SECONDS = 1.0

# The one object, under the names by which QEMU would know it.
PATHS = ("/machine/peripheral/balloon0", "balloon0")
DEVICE_TYPE = "virtio-balloon"
INTERVAL = "guest-stats-polling-interval"

# What a handler returns when the answer comes later.
_LATER = object()


@dataclass(frozen=True, slots=True)
class _Command:
    id: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A client that waits for fresh statistics. known: the number of updates when it asked."""

    known: int
    deadline: float


class Commands:
    """Carries out commands on one device. ``outgoing`` is for the worker to send, in order."""

    def __init__(
        self, balloon: Balloon, session: Session, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._balloon = balloon
        self._session = session
        self._clock = clock
        self.outgoing: deque[Envelope] = deque()
        self._waiting: dict[int, _Waiting] = {}
        self._estimates = Estimates(balloon, session, clock, self._answer)
        self._walks: dict[int, footprint.Slices] = {}
        # The size of the balloon that clients were told of last.
        self.told_actual = balloon.space.actual
        self._next_event = 0.0
        # What this process is confined by, in words of sandbox.py.
        self.sandbox = sandbox.NONE
        self._handlers: dict[str, Callable[[_Command], object]] = {
            "balloon": lambda command: self._set_target(Target(size=_size(command, "value"))),
            "set-target": self._set_any_target,
            "query-balloon": lambda _command: {"actual": self._actual()},
            "qom-get": self._qom_get,
            "qom-set": self._qom_set,
            "query-balloon-stats": self._query_statistics,
            "query-status": lambda _command: queries.status(self._balloon) | {"sandbox": self.sandbox},
            "query-memory": self._query_memory,
            "query-rings": lambda _command: queries.rings(self._session, self._balloon),
            "inhibit": lambda _command: self._inhibit(inhibited=True),
            "allow": lambda _command: self._inhibit(inhibited=False),
            "estimate-free": self._estimate_free,
        }

    def handle(self, envelope: Envelope) -> None:
        """Take one envelope of the control process."""
        if envelope.kind == Kind.CANCEL:
            self._forget(envelope.id)
            return
        try:
            value = self._execute(envelope)
        except CommandError as error:
            self._refuse(envelope.id, error)
        else:
            if value is not _LATER:
                self._answer(envelope.id, value)

    def fail(self, number: int) -> None:
        """Answer a command that broke with an error of ours."""
        self._forget(number)
        self._refuse(number, CommandError("an unexpected error: the device's log has it"))

    def fail_all(self) -> None:
        """Answer so whatever waits."""
        for number in self._open():
            self.fail(number)

    def _open(self) -> set[int]:
        """Return the commands that wait for their answer."""
        return self._waiting.keys() | self._walks.keys() | self._estimates.asking

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the clock; None for never."""
        if self._walks:
            return self._clock()
        times = [waiting.deadline for waiting in self._waiting.values()]
        if (next_round := self._estimates.due()) is not None:
            times.append(next_round)
        if self._balloon.space.actual != self.told_actual:
            times.append(self._next_event)
        return min(times, default=None)

    def tick(self) -> None:
        """Answer whose answer has come, or whose time has; tell of a balloon that has changed."""
        if not self._open() and self._balloon.space.actual == self.told_actual:
            return
        now = self._clock()
        for number, waiting in list(self._waiting.items()):
            self._look_for_statistics(number, waiting, now)
        self._estimates.tick()
        # One slice, whoever waits: the rings are not to wait for many who ask at once.
        if self._walks:
            self._walk_on(next(iter(self._walks)))
        self._tell_change(now)

    def _execute(self, envelope: Envelope) -> object:
        command = json.loads(envelope.text)
        handler = self._handlers.get(command["execute"])
        if handler is None:
            raise CommandError(f"The command {command['execute']} has not been found", "CommandNotFound")
        return handler(_Command(envelope.id, command.get("arguments", {})))

    def _answer(self, number: int, value: object) -> None:
        self.outgoing.append(result(number, value))

    def _refuse(self, number: int, error: CommandError) -> None:
        self.outgoing.append(refusal(number, str(error), error.error_class))

    def _forget(self, number: int) -> None:
        """The client has gone: nothing is owed to it."""
        self._waiting.pop(number, None)
        self._walks.pop(number, None)
        self._estimates.forget(number)

    def forget_all(self) -> None:
        """The control process has gone, and everybody with it."""
        for number in self._open():
            self._forget(number)
        self.outgoing.clear()

    # Target

    def _set_any_target(self, command: _Command) -> object:
        if ("size" in command.arguments) == ("percent" in command.arguments):
            raise CommandError("give either 'size', in bytes, or 'percent'")
        if "size" in command.arguments:
            return self._set_target(Target(size=_size(command, "size")))
        percent = command.arguments["percent"]
        if not 0 < percent <= 100:
            raise CommandError("Parameter 'percent' expects a number from 1 to 100")
        return self._set_target(Target(percent=percent))

    def _set_target(self, target: Target) -> object:
        self._balloon.space.set_target(target, self._balloon.known_memory())
        return {}

    def _actual(self) -> int:
        """Return the guest's logical size by its own account. Raises CommandError while its memory is not known."""
        memory = self._balloon.known_memory()
        if not memory:
            raise CommandError(
                "the guest's driver is not up yet, so its memory is not known", "DeviceNotActive"
            )
        return logical_size(memory, self._balloon.space.actual)

    def _tell_change(self, now: float) -> None:
        """Tell of a changed balloon, at most once in EVENT_SECONDS, and of its latest size then."""
        actual = self._balloon.space.actual
        if actual == self.told_actual or now < self._next_event:
            return
        self._next_event = now + EVENT_SECONDS
        if self.outgoing:
            return  # nobody has taken what was said before: the latest size is what will be told
        self.told_actual = actual
        if self._balloon.known_memory():
            event = {"event": "BALLOON_CHANGE", "data": {"actual": self._actual()}}
            self.outgoing.append(Envelope(Kind.EVENT, 0, json.dumps(event).encode()))

    # Statistics

    def _query_statistics(self, command: _Command) -> object:
        statistics = self._balloon.statistics
        if not command.arguments.get("refresh", False):
            return queries.all_statistics(statistics)
        self._need_ring(Role.STATISTICS, Feature.STATS_VQ)
        statistics.ask_now()
        self._waiting[command.id] = _Waiting(statistics.updates, self._clock() + STATISTICS_SECONDS)
        return _LATER

    def _look_for_statistics(self, number: int, waiting: _Waiting, now: float) -> None:
        if self._balloon.statistics.updates != waiting.known:
            self._answer(number, queries.all_statistics(self._balloon.statistics))
        elif now >= waiting.deadline:
            text = f"the guest did not answer within {STATISTICS_SECONDS:g} s: is it paused or very busy?"
            self._refuse(number, CommandError(text))
        else:
            return
        del self._waiting[number]

    def _need_ring(self, role: Role, feature: Feature) -> None:
        """Raise CommandError unless the guest's driver is up and has this ring."""
        if not self._balloon.is_running:
            raise CommandError("the guest's driver is not up, or the VM is paused", "DeviceNotActive")
        if self._balloon.rings.find(role) is None:
            raise CommandError(f"the guest's driver did not accept {feature.name}")

    def _qom_get(self, command: _Command) -> object:
        values: dict[str, Callable[[], object]] = {
            "type": lambda: DEVICE_TYPE,
            "guest-stats": lambda: queries.guest_stats(self._balloon.statistics),
            INTERVAL: lambda: self._balloon.statistics.interval,
        }
        return values[_property(command, values)]()

    def _qom_set(self, command: _Command) -> object:
        name, value = _property(command, ("type", "guest-stats", INTERVAL)), command.arguments.get("value")
        if name != INTERVAL:
            raise CommandError(f"Property '{DEVICE_TYPE}.{name}' is not writable")
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise CommandError(f"Invalid parameter type for '{name}', expected: integer")
        self._balloon.statistics.set_interval(value)
        return {}

    # Hinting

    def _estimate_free(self, command: _Command) -> object:
        if self._balloon.inert:
            raise CommandError(f"the device is inert: {self._balloon.giver.why_inert}")
        self._need_ring(Role.FREE_PAGE_HINT, Feature.FREE_PAGE_HINT)
        self._estimates.ask(command.id)
        return _LATER

    # Memory

    def _query_memory(self, command: _Command) -> object:
        self._walks[command.id] = footprint.measure(self._balloon.memory)
        return _LATER

    def _walk_on(self, number: int) -> None:
        """Do one slice of a walk through guest memory; answer at its end."""
        try:
            next(self._walks[number])
        except StopIteration as end:
            self._answer(number, queries.memory(self._balloon, end.value))
        except (OSError, ValueError) as error:
            self._refuse(number, CommandError(f"guest memory changed meanwhile, ask again: {error}"))
        else:
            return
        del self._walks[number]

    def _inhibit(self, *, inhibited: bool) -> object:
        self._balloon.giver.inhibit(inhibited=inhibited)
        return {}


def _size(command: _Command, name: str) -> int:
    """Return a size in bytes; what is none is refused in QEMU's words."""
    value: int = command.arguments[name]
    if value <= 0:
        raise CommandError(f"Parameter '{name}' expects a size")
    return value


def _property(command: _Command, known: Collection[str]) -> str:
    """Return the name of a property of our one object. Raises CommandError in QEMU's words."""
    path, name = command.arguments["path"], str(command.arguments["property"])
    if path not in PATHS:
        raise CommandError(f"Device '{path}' not found", "DeviceNotFound")
    if name not in known:
        raise CommandError(f"Property '{DEVICE_TYPE}.{name}' not found")
    return name
