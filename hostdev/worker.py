"""The loop of one guest: the keeper's channel first, then commands, then the rings, in bounded steps.

A process of its own, forked by the keeper. It has the guest's memory mapped and its eventfds open, and nothing else: its
first act is to close every descriptor that is not on its list. It never sees the front end's socket.

It may end at any instruction: what it does, and in which order it writes that down (journal.py), leaves a successor able to
go on. Still it is one of the two loops that should never die: an unexpected error makes the device inert, with a traceback
in the log, and the loop goes on answering. It ends when the keeper closes the channel; one that hangs ends itself.
"""

from __future__ import annotations

import logging
import math
import select
import signal
import socket
import time
from dataclasses import replace

from hostdev import fds, sandbox
from hostdev.balloon import Balloon
from hostdev.commands import Commands
from hostdev.config_teller import ConfigTeller
from hostdev.control_end import ControlEnd
from hostdev.discard import Discarder
from hostdev.errors import RecordError, RingError
from hostdev.estate import Estate
from hostdev.isolation import isolate
from hostdev.journal import RecordJournal
from hostdev.log_limit import limit_log
from hostdev.message_end import MessageEnd
from hostdev.metrics import Metrics
from hostdev.metrics_file import MetricsFile
from hostdev.options import Options, Start
from hostdev.record import Record, make_record
from hostdev.rings import Step
from hostdev.session import OFFERED_PROTOCOL_FEATURES, Session
from hostdev.snapshot import Done, Parts, gather
from hostdev.succession import succeed
from hostdev.trace import open_trace

log = logging.getLogger(__name__)

# Turns of rings that always have more to do, 10 ms each at the most, after which timers and commands have theirs as well.
BUSY_TURNS = 8
# Milliseconds that poll() is asked to wait at the most: it takes no more than a C int, and statistics may be wanted every
# 136 years. To look up once an hour for nothing costs nothing.
MAX_WAIT_MS = 3_600_000
# Seconds that one turn may take: a message, a command and a step of each ring, some milliseconds. By the clock, for a process
# may hang without using any CPU; on a host that swaps, a turn takes a second.
TURN_SECONDS = 10.0


class Worker:
    """One guest's device at work."""

    def __init__(
        self,
        channel: socket.socket,
        options: Options,
        control: socket.socket | None = None,
        estate: Estate | None = None,
        *,
        makeshift: bool = False,
    ) -> None:
        """channel: to the keeper. control: to the control process, if there is one. estate: of the predecessors.

        makeshift: do without a record that cannot be read. Raises RecordError otherwise.
        """
        self._estate = estate or Estate()
        self._metrics = Metrics(options.guest)
        self._file = MetricsFile(self._metrics, options.metrics_file)
        self._trace = open_trace(options.trace_file)
        self._trace.guest()
        self._is_without = False
        try:
            self._record = Record(self._estate.record)
        except RecordError:
            if not makeshift:
                raise
            self._is_without = True
            self._record = Record(make_record())
        self._journal = RecordJournal(self._record, self._metrics, self._gather)
        discarder = Discarder(options.discard, hugetlb_release=options.hugetlb_release)
        self.balloon = Balloon(options.features, discarder, self._metrics, self._trace, self._journal)
        self.session = Session(self.balloon, self._metrics, self._trace, self._journal)
        self._commands = Commands(self.balloon, self.session)
        self._teller = ConfigTeller(self.balloon, self.session)
        self._parts = Parts(self.session, self.balloon, self._commands, self._metrics)
        self._messages = MessageEnd(channel, self.session, self.balloon, self._journal)
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._control = ControlEnd(control, self._commands, self._poll)
        self._noted: object = None
        self._kicks: dict[int, int] = {}
        self._runnable: set[int] = set()
        self._awaited: int | None = None
        self._turns = 0

    def confine(self, options: Options) -> None:
        """Lock this process in: all that it needs is open. A successor's first look at a guest comes after that."""
        self._commands.sandbox = sandbox.confine(
            sandbox.Role.WORKER, trace=options.trace_file is not None, metrics_file=options.metrics_file
        )

    def take_over(self, start: Start) -> None:
        """Go on where a predecessor was killed, if there was one, and say that this worker serves."""
        signal.setitimer(signal.ITIMER_REAL, TURN_SECONDS)
        try:
            self._messages.done = self._succeed(start)
        except Exception:
            if not start.makeshift:
                raise
            log.exception("what the predecessors left cannot be taken over")
            self._make_do()
        if start.why_inert:
            self.balloon.make_inert(start.why_inert)
        self._journal.handled(self._messages.done.number)
        self._journal.telling(begins=False)
        for ring in self.session.rings:
            # Unconditionally: the predecessor may have returned a chain and not said so.
            if ring.call is not None:
                fds.signal_event(ring.call)
        self._watch_kicks()
        self._file.touch()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._messages.say_ready()

    def _succeed(self, start: Start) -> Done:
        if start.lost or self._is_without:
            raise RecordError("there is no record that could be gone on with")
        return succeed(self._parts, self._estate, self._record, start)

    def _make_do(self) -> None:
        """Answer messages, at least: the front end waits for that, and its guest with it."""
        self._journal.suspend()
        self._messages.is_makeshift = True
        # What was negotiated is not known; nothing that was not is asked for.
        self.session.protocol_features = OFFERED_PROTOCOL_FEATURES

    def wait(self) -> bool:
        """Wait to be told to serve. False if that will not be."""
        return self._messages.wait_for_go()

    def _gather(self) -> bytes:
        return gather(self._parts, self._messages.done)

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
            self._file.write()

    def _turn(self) -> bool:
        """Wait, then handle at most one message, one command and one step of each ring that has work."""
        events = dict(self._poll.poll(self._timeout()))
        # Its action is the default one: a turn that takes too long is the last.
        signal.setitimer(signal.ITIMER_REAL, TURN_SECONDS)
        going_on = self._act(events)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return going_on

    def _act(self, events: dict[int, int]) -> bool:
        if events.pop(self._messages.fileno(), 0) and not self._serve_channel():
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
        moments = [self._file.due, self.balloon.due(), self._commands.due(), self._teller.due()]
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
            self._teller.tell(self._messages.has_message)
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
        self._file.tick()

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

    def _serve_channel(self) -> bool:
        """Answer one message. False when the keeper has closed."""
        going_on = self._messages.serve()
        self._watch_kicks()
        self._file.touch()
        return going_on

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
        self._file.touch()

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
        self._file.touch()

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
    limit_log()
    if start.makeshift:
        # They may be what its predecessors died of: a disk that is full, broken or gone.
        options = replace(options, metrics_file=None, trace_file=None)
    if start.bus_errors and options.trace_file is not None:
        log.error("the trace ends: a worker died of SIGBUS, and somebody may have cut the file short")
        options = replace(options, trace_file=None)
    logging.disable(logging.ERROR if start.quiet else logging.NOTSET)
    worker = Worker(channel, options, control, estate, makeshift=start.makeshift)
    if options.sandbox != sandbox.NONE:
        worker.confine(options)
    worker.take_over(start)
    logging.disable(logging.NOTSET)
    if not start.waits or worker.wait():
        worker.run()
    return 0
