"""The parent: listens, owns the front end's connection, relays whole messages to the worker and forks the worker.

It looks at nothing but the size in a message's header: what a message means is the worker's business, in a process of
its own. One message at a time: the next is read once the worker's answer to this one has been forwarded, so a front end
that does not read its answers is not read from either.

No threads, no asyncio, no guest memory: asyncio does not survive the fork that every worker comes from. The other of
the two loops that may never die, for QEMU's generic vhost-user device does not survive a closed socket.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import selectors
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from hostdev import fds, worker
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from hostdev.wire.channel import ANSWER, MAX_DATAGRAM, Action
from hostdev.wire.vhost_user import HEADER, HEADER_SIZE, MAX_PAYLOAD

log = logging.getLogger(__name__)

# Seconds that a worker has to finish its slice (some 10 ms) and to unmap after its channel was closed.
WORKER_END_DEADLINE = 2.0

TERMINATING = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _Incoming:
    """A message that is being read: exactly its header, then exactly its payload."""

    data: bytearray = field(default_factory=bytearray)
    received: list[fds.Fd] = field(default_factory=list)

    def missing(self) -> int:
        """Bytes still to be read. Raises OverflowError for a size or a number of descriptors that no message has."""
        if len(self.received) > fds.MAX_RECEIVED:
            raise OverflowError(f"more than {fds.MAX_RECEIVED} descriptors with one message")
        if len(self.data) < HEADER_SIZE:
            return HEADER_SIZE - len(self.data)
        size = HEADER.decode(bytes(self.data[:HEADER_SIZE])).size
        if size > MAX_PAYLOAD:
            raise OverflowError(f"a message of {size} bytes, at most {MAX_PAYLOAD} are allowed")
        return HEADER_SIZE + size - len(self.data)


class Guest:
    """One front end's connection and the worker that serves it."""

    def __init__(self, connection: socket.socket, options: worker.Options) -> None:
        self.connection = connection
        self._incoming = _Incoming()
        self._outgoing = b""
        self._waiting = False
        self._closing = False
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = _fork_worker(theirs, options)
        theirs.close()
        self.pidfd = fds.Fd(os.pidfd_open(self.pid))

    @property
    def interest(self) -> int:
        """What to wait for on the connection: nothing while the worker has a message, writing while a reply is due."""
        if self._outgoing:
            return selectors.EVENT_WRITE
        return 0 if self._waiting else selectors.EVENT_READ

    def receive(self) -> bool:
        """Read on; pass the message to the worker when it is whole. False when the connection is to be closed."""
        try:
            data, received = fds.receive(self.connection, self._incoming.missing())
            self._incoming.received += received
            self._incoming.data += data
            if not data:
                return self._ended()
            # Before the next read: a header with an impossible size may be all that ever comes.
            return self._incoming.missing() > 0 or self._pass_on()
        except BlockingIOError:
            return True
        except (OSError, OverflowError) as error:
            log.error("closing the connection: %s", error)  # noqa: TRY400  (the peer's fault: no traceback)
            return False

    def _ended(self) -> bool:
        if self._incoming.data:
            log.warning("the front end closed in the middle of a message")
        return False

    def _pass_on(self) -> bool:
        """Pass the whole message to the worker. False if the worker is gone."""
        message, self._incoming = self._incoming, _Incoming()
        try:
            fds.send(self.channel, bytes(message.data), message.received)
        except (BrokenPipeError, ConnectionResetError):
            return False  # close() says how it ended
        finally:
            fds.close_all(message.received)
        self._waiting = True
        return True

    def forward(self) -> bool:
        """Take the worker's answer and forward it. False when the connection is to be closed."""
        try:
            data, _none = fds.receive(self.channel, MAX_DATAGRAM)
        except ConnectionResetError:
            return False  # the worker died with a message unread
        if not data:
            return False
        answer = ANSWER.decode(data)
        self._waiting = False
        self._closing = answer.action == Action.CLOSE
        self._outgoing = answer.reply
        return self.flush()

    def flush(self) -> bool:
        """Write what is due. False when the connection is to be closed."""
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[fds.send(self.connection, self._outgoing) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return not self._closing or bool(self._outgoing)

    def has_gone(self) -> bool:
        """True if the front end has closed, whatever of it is still unread."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> bool:
        """End the worker by closing its channel, reap it, close everything. False if the worker had crashed."""
        fds.close_all(self._incoming.received)
        self.channel.close()
        status = self._reap()
        self.connection.close()
        if status:
            log.error("the worker ended with %s", _describe(status))
        return status == 0

    def _reap(self) -> int:
        """Wait for the worker's end and return its wait status; a worker that hangs is killed."""
        with self.pidfd:
            poll = select.poll()
            poll.register(self.pidfd.fileno(), select.POLLIN)
            if not poll.poll(WORKER_END_DEADLINE * 1000):
                log.error("the worker does not end: killing process %d", self.pid)
                signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)
            return os.waitpid(self.pid, 0)[1]


def _fork_worker(channel: socket.socket, options: worker.Options) -> int:
    """Fork from the already imported state. Everything is frozen first: the child's collector copies no page of ours."""
    gc.freeze()
    pid = os.fork()
    if pid:
        return pid
    status = EXIT_CHECK_FAILED
    try:
        status = worker.start(channel, options)
    except BaseException:
        log.exception("the worker ends")
    finally:
        os._exit(status)


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


class Keeper:
    """Serves one front end after another until told to end."""

    def __init__(self, options: worker.Options, *, listener: socket.socket | None, once: bool) -> None:
        """listener: where to wait for the next front end; None if there is only the one given to run()."""
        self._options = options
        self._listener = listener
        self._once = once
        self._guest: Guest | None = None
        self._stopping = False
        self._crashed = False
        self._selector = selectors.DefaultSelector()

    def run(self, connection: socket.socket | None = None) -> int:
        """Serve connection if given, then those that arrive. Returns the exit status."""
        with self._signals() as wakeup, self._selector:
            self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._drain(wakeup))
            if self._listener is not None:
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            if connection is not None:
                self._begin(connection)
            while not self._stopping and (self._guest is not None or self._listener is not None):
                self._turn()
            self._end_guest()
        return EXIT_CHECK_FAILED if self._crashed else EXIT_PASS

    def _turn(self) -> None:
        for key, _events in self._selector.select():
            try:
                key.data()
            except Exception:
                log.exception("unexpected error in the keeper")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Turn SIGTERM and SIGINT into a readable socket, so that select() wakes up for them."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        previous = {number: signal.signal(number, self._stop) for number in TERMINATING}
        old = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATING)
        try:
            yield ours
        finally:
            # Held back again: what is left to do, such as removing the socket, is not to be cut short.
            signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATING)
            signal.set_wakeup_fd(old)
            for number, handler in previous.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        name = signal.Signals(number).name
        if self._guest is None:
            log.info("%s: ending", name)
        else:
            log.warning(
                "%s: ending while a front end is connected: QEMU aborts at its guest's next look", name
            )

    @staticmethod
    def _drain(wakeup: socket.socket) -> None:
        wakeup.recv(64, socket.MSG_DONTWAIT)

    # Guests

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _address = self._listener.accept()
        except OSError as error:
            log.warning("accept: %s", error)
            return
        if self._guest is not None and self._guest.has_gone():
            self._end_guest()  # a VM that is started again at once must not find its predecessor in the way
        if self._guest is not None or self._stopping:
            log.warning("a second front end is turned away: one is being served")
            connection.close()
            return
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        guest = self._guest = Guest(connection, self._options)
        log.info("front end connected, worker is process %d", guest.pid)
        self._selector.register(connection, guest.interest, lambda: self._serve(guest))
        self._selector.register(guest.channel, selectors.EVENT_READ, lambda: self._relay(guest))

    def _serve(self, guest: Guest) -> None:
        if guest is not self._guest:
            return  # ended by an event of the same select()
        if guest.interest == selectors.EVENT_WRITE:
            self._settle(guest, going_on=guest.flush())
        else:
            self._settle(guest, going_on=guest.receive())

    def _relay(self, guest: Guest) -> None:
        if guest is self._guest:
            self._settle(guest, going_on=guest.forward())

    def _settle(self, guest: Guest, *, going_on: bool) -> None:
        """Make the selector follow the guest's state, or end it."""
        if not going_on:
            self._end_guest()
            return
        registered = guest.connection.fileno() in self._selector.get_map()
        if not guest.interest:
            if registered:
                self._selector.unregister(guest.connection)
        elif registered:
            self._selector.modify(guest.connection, guest.interest, lambda: self._serve(guest))
        else:
            self._selector.register(guest.connection, guest.interest, lambda: self._serve(guest))

    def _end_guest(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        for file in (guest.connection, guest.channel):
            with contextlib.suppress(KeyError):
                self._selector.unregister(file)
        self._crashed = not guest.close() or self._crashed
        log.info("front end has gone")
        self._stopping = self._stopping or self._once
