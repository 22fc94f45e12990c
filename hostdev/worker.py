"""The loop of one guest: the keeper's channel first, then commands, then the rings, in bounded steps.

A process of its own, forked by the keeper. It has the guest's memory mapped and its eventfds open, and nothing else: its
first act is to close every descriptor that is not on its list. It never sees the front end's socket.

It may end at any instruction: what it does, and in which order it writes that down (journal.py), leaves a successor able to
go on. Still it is one of the two loops that should never die: an unexpected error makes the device inert, with a traceback
in the log, and the loop goes on answering. It ends when the keeper closes the channel; one that hangs ends itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hostdev import fds, snapshot
from hostdev.balloon import Balloon
from hostdev.commands import Commands
from hostdev.config_teller import ConfigTeller
from hostdev.control_end import ControlEnd
from hostdev.discard import AUTO, Discarder
from hostdev.errors import BalloonError, RingError, StreamError
from hostdev.estate import Estate
from hostdev.isolation import isolate
from hostdev.journal import RecordJournal, recall
from hostdev.metrics import Metrics
from hostdev.record import Record
from hostdev.rings import Step
from hostdev.session import Session
from hostdev.snapshot import Done, Parts
from hostdev.trace import TraceFile, Tracer
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature
from hostdev.wire.channel import ANSWER, FRAME, MAX_DATAGRAM, Answer, Frame, ToKeeper, ToWorker, token
from hostdev.wire.record import InHand
from hostdev.wire.vhost_user import HEADER, HEADER_SIZE

log = logging.getLogger(__name__)

# How stale the metrics file may be, in seconds, while something changes. While nothing does there is no wake-up.
METRICS_PERIOD = 0.5
# Turns of rings that always have more to do, 10 ms each at the most, after which timers and commands have theirs as well.
BUSY_TURNS = 8
# Milliseconds that poll() is asked to wait at the most: it takes no more than a C int, and statistics may be wanted every
# 136 years. To look up once an hour for nothing costs nothing.
MAX_WAIT_MS = 3_600_000


# Workers that die with one message until it is refused unread.
MAX_MESSAGE_DEATHS = 3
# Seconds that one turn may take: a message, a command and a step of each ring, some milliseconds. By the clock, for a process
# may hang without using any CPU; on a host that swaps, a turn takes a second.
TURN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says about the device. guest: a label of its metrics, none if empty."""

    discard: str = AUTO
    hugetlb_release: bool = False
    features: Feature = DEFAULT_FEATURES
    metrics_file: Path | None = None
    trace_file: Path | None = None
    guest: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """How a worker begins. blamed: its predecessor died of itself. why_inert: it is to release nothing."""

    blamed: bool = False
    why_inert: str = ""


class Worker:
    """One guest's device at work."""

    def __init__(
        self,
        channel: socket.socket,
        options: Options,
        control: socket.socket | None = None,
        estate: Estate | None = None,
    ) -> None:
        """channel: to the keeper. control: to the control process, if there is one. estate: of the predecessors."""
        self._channel = channel
        self._estate = estate or Estate()
        self._metrics = Metrics(options.guest)
        self._metrics_file = options.metrics_file
        self._metrics_due: float | None = None
        self._trace: Tracer = TraceFile(options.trace_file) if options.trace_file else Tracer()
        self._trace.guest()
        self._record = Record(self._estate.record)
        self._journal = RecordJournal(self._record, self._metrics, self._gather)
        discarder = Discarder(options.discard, hugetlb_release=options.hugetlb_release)
        self.balloon = Balloon(options.features, discarder, self._metrics, self._trace, self._journal)
        self.session = Session(self.balloon, self._metrics, self._trace, self._journal)
        self._commands = Commands(self.balloon, self.session)
        self._teller = ConfigTeller(self.balloon, self.session)
        self._parts = Parts(self.session, self.balloon, self._commands, self._metrics)
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._control = ControlEnd(control, self._commands, self._poll)
        self._done = Done()
        self._noted: object = None
        # None: a predecessor may have told what is in use now, or not.
        self._told_held: tuple[int, ...] | None = None
        self._kicks: dict[int, int] = {}
        self._runnable: set[int] = set()
        self._awaited: int | None = None
        self._turns = 0

    # Taking over

    def take_over(self, start: Start) -> None:
        """Go on where a predecessor was killed, if there was one, and say that this worker serves."""
        try:
            self._adopt(start)
        except (BalloonError, KeyError, OSError, ValueError):
            log.exception("what the predecessor left cannot be taken over")
            self.balloon.make_inert("its predecessor's state cannot be taken over")
        if start.why_inert:
            self.balloon.make_inert(start.why_inert)
        self._journal.begin(self._done.number)
        self._note()
        for ring in self.session.rings:
            # Unconditionally: the predecessor may have returned a chain and not said so.
            if ring.call is not None:
                fds.signal_event(ring.call)
        self._watch_kicks()
        self._touch_metrics()
        held = self.session.held()
        fds.close_all(fd for token, fd in self._estate.known.items() if token not in held)
        for record in (self._estate.record, self._estate.source):
            if record is not None:
                record.close()  # its mapping has a descriptor of its own
        with contextlib.suppress(BrokenPipeError):  # the front end has gone already
            self._channel.send(ANSWER.encode(Answer(ToKeeper.READY, b"")))

    def _adopt(self, start: Start) -> None:
        source = self._record if self._estate.source is None else Record(self._estate.source)
        if not source.state:
            return
        image = snapshot.parse(source.state)
        self._done = image.done
        snapshot.restore(self._parts, image, self._estate.known)
        queues = {index: ring.queue for index, ring in self.balloon.rings.started.items()}
        used = {index: queue.used_index for index, queue in queues.items()}
        counts = recall(source, image.session.number, used)
        self._metrics.restore(dict(zip(image.samples, counts, strict=False)))
        self._note_deaths(source, {index: queue.base for index, queue in queues.items()}, start)
        if source.telling and self.session.backend_channel is not None:
            self.session.backend_channel.recover()
            self.balloon.space.changed = True

    def _note_deaths(self, source: Record, bases: Mapping[int, int], start: Start) -> None:
        """Count a death against the chains that the predecessor had in hand."""
        for index, position in bases.items():
            known = source.in_hand(index)
            if known is not None and known.position == position:
                self._record.note_in_hand(index, InHand(position, known.deaths + start.blamed))
        self.balloon.judge_deaths()

    def _gather(self) -> bytes:
        return snapshot.gather(self._parts, self._done)

    def _note(self) -> None:
        """Write down what has changed without a message, if anything has."""
        balloon = self.balloon
        now = (
            balloon.statistics.due,
            balloon.hinting.is_open,
            balloon.space.changed,
            balloon.inert,
            self._commands.told_actual,
        )
        if now != self._noted:
            self._noted = now
            self._journal.changed()

    # The loop

    def run(self) -> None:
        """Serve until the keeper closes the channel."""
        try:
            while self._turn():
                pass
        finally:
            self.session.close()
            self._trace.close()
            self._write_metrics()

    def _turn(self) -> bool:
        """Wait, then handle at most one message, one command and one step of each ring that has work."""
        events = dict(self._poll.poll(self._timeout()))
        # Its action is the default one: a turn that takes too long is the last.
        signal.setitimer(signal.ITIMER_REAL, TURN_SECONDS)
        going_on = self._act(events)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return going_on

    def _act(self, events: dict[int, int]) -> bool:
        if events.pop(self._channel.fileno(), 0) and not self._serve_channel():
            return False
        if (number := self._control.number) is not None and (mask := events.pop(number, 0)):
            self._serve_control(mask)
        for number in events:
            self._take_kick(number)
        for index in sorted(self._runnable):
            self._serve_ring(index)
        self._turns += 1
        # A ring with more to do has its next turn at once: the rest can wait for that, though not for ever.
        if not self._runnable or self._turns % BUSY_TURNS == 0:
            self._tick()
        return True

    def _timeout(self) -> float | None:
        """Milliseconds until the loop must look up without being called; None for as long as it takes."""
        if self._runnable:
            return 0
        moments = [self._metrics_due, self.balloon.due(), self._commands.due(), self._teller.due()]
        next_one = min((moment for moment in moments if moment is not None), default=None)
        # Rounded up, or poll() comes back a moment before the time and the loop spins until then.
        if next_one is None:
            return None
        return min(MAX_WAIT_MS, math.ceil(max(0.0, next_one - time.monotonic()) * 1000))

    def _tick(self) -> None:
        """Do what the time has come for, and what the steps before have left to be said."""
        try:
            for index in self.balloon.tick(self._kicks.values()):
                self._signal(index)
            self._commands.tick()
            self._teller.tell(self._has_message)
            self._watch_teller()
            self._note()
        except Exception:
            log.exception("unexpected error between two steps")
            self.balloon.make_inert("an unexpected error between two steps")
            # Or the same would come again, at once and for ever.
            self.balloon.statistics.due = None
            self._commands.fail_all()
        if self._teller.is_settled:
            self._control.flush()
        if self._metrics_due is not None and time.monotonic() >= self._metrics_due:
            self._write_metrics()

    def _watch_teller(self) -> None:
        """Wait for the front end to take what it is being told, as long as it is."""
        wanted = self._teller.waits_for()
        if wanted != self._awaited:
            if self._awaited is not None:
                self._poll.unregister(self._awaited)
            if wanted is not None:
                self._poll.register(wanted, select.POLLIN)
            self._awaited = wanted

    # The keeper's channel

    def _has_message(self) -> bool:
        """True if there is one to handle first: it may be the first of those that stop the rings."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        return bool(poll.poll(0))

    def _serve_channel(self) -> bool:
        """Answer one message with one datagram. False when the keeper has closed."""
        try:
            data, received = fds.receive(self._channel, MAX_DATAGRAM)
        except ConnectionResetError:
            return False  # the keeper closed with an answer of ours unread
        if not data:
            return False
        frame = FRAME.decode(data)
        if frame.kind == ToWorker.INERT:
            self.balloon.make_inert(frame.data.decode())
            return True
        for place, fd in enumerate(received):
            fd.token = token(frame.number, place)
        self._handle(frame, received)
        self._watch_kicks()
        self._touch_metrics()
        try:
            self._channel.send(ANSWER.encode(self._answer()))
        except BrokenPipeError:
            return False  # the keeper closed meanwhile: nobody waits for the answer
        return True

    def _handle(self, frame: Frame, received: list[fds.Fd]) -> None:
        """Have a message take effect, once: a predecessor may have been killed after it had, and before it said so."""
        if frame.number == self._done.number:
            fds.close_all(received)
            return
        reply, closing = self._effect(frame, received)
        self._done = Done(frame.number, reply, closing)
        self._journal.handled(frame.number)

    def _effect(self, frame: Frame, received: list[fds.Fd]) -> tuple[bytes, bool]:
        """Return the reply, and whether the connection is to be closed."""
        header, payload = HEADER.decode(frame.data[:HEADER_SIZE]), frame.data[HEADER_SIZE:]
        if frame.deaths >= MAX_MESSAGE_DEATHS:
            fds.close_all(received)
            self.balloon.make_inert(f"{frame.deaths} workers died with one message: it is refused")
            return self.session.refusal(header, payload), False
        try:
            return self.session.handle(header, payload, received), False
        except StreamError as error:
            log.error("closing the connection: %s", error)  # noqa: TRY400  (the peer's fault: no traceback)
            return b"", True
        except Exception:
            log.exception("unexpected error in a message")
            self.balloon.make_inert("an unexpected error in a message")
            return self.session.refusal(header, payload), False

    def _answer(self) -> Answer:
        """Answer the message that was handled last."""
        if self._done.closing:
            return Answer(ToKeeper.CLOSE, b"")
        held = self.session.held()
        if held == self._told_held:
            return Answer(ToKeeper.ANSWER, self._done.reply)
        self._told_held = held
        return Answer(ToKeeper.HOLDING, self._done.reply, held)

    def _watch_kicks(self) -> None:
        """Make the poll set follow the session's rings, and look at each ring that is ready.

        Looked at without waiting for a kick: Linux queues its statistics buffer before DRIVER_OK, what was offered
        before a ring was enabled is not announced again, and a chain abandoned for a new memory table is offered anew.
        """
        ready = {
            ring.kick.fileno(): index
            for index, ring in enumerate(self.session.rings)
            if ring.started and ring.enabled and ring.kick is not None
        }
        for number in self._kicks.keys() - ready.keys():
            # poll() forgets a number without caring if it is still open: a closed kick needs no special case.
            self._poll.unregister(number)
        for number in ready.keys() - self._kicks.keys():
            self._poll.register(number, select.POLLIN)
        self._runnable = set(ready.values())
        self._kicks = ready

    # The control process

    def _serve_control(self, mask: int) -> None:
        """Carry out one command."""
        envelope = self._control.receive(mask)
        if envelope is None:
            return
        try:
            self._commands.handle(envelope)
        except Exception:
            log.exception("unexpected error in a command")
            self._commands.fail(envelope.id)
        self._journal.changed()
        self._touch_metrics()

    # Rings

    def _take_kick(self, number: int) -> None:
        index = self._kicks.get(number)
        if index is None:
            return
        kick = self.session.rings[index].kick
        if kick is not None and fds.drain_event(kick):
            self._runnable.add(index)

    def _serve_ring(self, index: int) -> None:
        """Do one step of a ring and signal the guest if chains were returned."""
        step = self._step(index)
        if not step.more:
            self._runnable.discard(index)
        if step.returned:
            self._signal(index)
            if log.isEnabledFor(logging.DEBUG):
                self._tell(index)
        self._touch_metrics()

    def _signal(self, index: int) -> None:
        call = self.session.rings[index].call
        if call is not None:
            fds.signal_event(call)

    def _tell(self, index: int) -> None:
        """One line a chain, for a person who watches. Asked for by --log-level=debug, so it needs no bound."""
        log.debug(
            "ring %d: chain returned; %d MiB given back so far, the host holds %d MiB of this guest",
            index,
            self._metrics.value("released_bytes_total") >> 20,
            self.session.memory.footprint() >> 20,
        )

    def _step(self, index: int) -> Step:
        """Service a ring. After an unexpected error it is tried once more, inert, so that the guest gets its answer."""
        try:
            return self.balloon.service(index)
        except RingError as error:
            log.warning("%s", error)
            broken = self.session.rings[index].error
            if broken is not None:
                fds.signal_event(broken)
            return Step(returned=False, more=False)
        except Exception:
            log.exception("unexpected error in ring %d", index)
            was_inert = self.balloon.inert
            self.balloon.make_inert(f"an unexpected error in ring {index}")
            return Step(returned=False, more=not was_inert)

    # Metrics

    def _touch_metrics(self) -> None:
        if self._metrics_file is not None and self._metrics_due is None:
            self._metrics_due = time.monotonic() + METRICS_PERIOD

    def _write_metrics(self) -> None:
        self._metrics_due = None
        if self._metrics_file is None:
            return
        try:
            self._metrics.write(self._metrics_file)
        except OSError as error:
            log.error("no more metrics: %s: %s", self._metrics_file, error.strerror)  # noqa: TRY400
            self._metrics_file = None


def start(
    channel: socket.socket,
    options: Options,
    control: socket.socket | None,
    estate: Estate,
    start: Start,
) -> int:
    """Become the worker in a freshly forked process. Returns the exit status.

    control: our end of the pair to the control process.
    """
    isolate(channel, *([] if control is None else [control]), *estate.descriptors())
    worker = Worker(channel, options, control, estate)
    worker.take_over(start)
    worker.run()
    return 0
