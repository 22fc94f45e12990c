"""The control process: QMP for any number of people, beside the workers.

Forked by the keeper, which holds the front ends' connections, and apart from the workers, which have guest memory mapped:
clients' JSON is parsed in neither. It has the listening socket, its clients, a channel to the keeper and the one end of
a pair to each worker, which it is sent for each front end. What it cannot answer itself it passes on as one datagram
(wire/control.py) and answers when the answer comes; it never waits for anybody.

Not one of the loops that may never die: the keeper starts another, and neither VM nor worker notice. Ends when the
keeper closes the channel. qmp_session.py is a client's conversation, schema.py the commands; control_guests.py asks the
workers, control_keeper.py the keeper, whose side is control_link.py.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from hostdev import fds, sandbox
from hostdev.acceptor import Acceptor
from hostdev.client import Client
from hostdev.control_guests import Guests
from hostdev.control_keeper import KeeperEnd
from hostdev.control_peer import ask_guest, ids
from hostdev.errors import CommandError
from hostdev.isolation import isolate
from hostdev.log_limit import limit_log
from hostdev.metrics import worth_logging
from hostdev.qmp_session import Command, version
from hostdev.qom import qom_list
from hostdev.schema import COMMANDS, Place, query_commands, query_qmp_schema
from hostdev.wire.control import Kind

log = logging.getLogger(__name__)

# Clients at once. Each may hold some 350 KiB (client.py), and a program that forgets to close its connections must not
# take all descriptors.
MAX_CLIENTS = 64

_HANDLERS: Mapping[str, Callable[[Mapping[str, Any]], object]] = {
    "query-version": lambda _arguments: version(),
    "query-commands": lambda _arguments: query_commands(),
    "query-qmp-schema": lambda _arguments: query_qmp_schema(),
    "qom-list": lambda arguments: qom_list(arguments["path"]),
}


def start(
    channel: socket.socket, listener: socket.socket, generation: int, confined: str = sandbox.AUTO
) -> int:
    """Become the control process in a freshly forked process. Returns the exit status.

    generation: how many there were before, so that no answer to one of them is taken for ours. confined: as --sandbox has it.
    """
    isolate(channel, listener)
    limit_log()
    if confined != sandbox.NONE:
        sandbox.confine(sandbox.Role.CONTROL)
    Control(channel, listener, generation).run()
    return 0


class Control:
    """The clients, the keeper and the workers."""

    def __init__(self, channel: socket.socket, listener: socket.socket, generation: int = 0) -> None:
        numbers = ids(generation)
        self._keeper = KeeperEnd(channel, numbers)
        self._guests = Guests(numbers, self._tell)
        self._acceptor = Acceptor(listener, "client of the control socket")
        self._clients: dict[int, Client] = {}
        self._turned_away = 0
        self._given_up = 0
        # True once another version of the device is there: who connects now is for its control process.
        self._is_succeeded = False
        self._unreadable = 0
        self._poll = select.poll()
        # What poll() was told, by number: told again only when it changes.
        self._watched: dict[int, int] = {}

    def run(self) -> None:
        """Serve until the keeper closes the channel, then send what is owed as far as it can be sent at once."""
        while self._turn():
            pass
        self._guests.end()
        for client in list(self._clients.values()):
            client.flush()
            self._drop(client)

    def _turn(self) -> bool:
        events = dict(self._poll.poll(self._watch_all()))
        # Told apart before anything is done: a number may be somebody else's a moment later.
        clients = [
            (self._clients[number], mask) for number, mask in events.items() if number in self._clients
        ]
        guests = self._guests.ready(events)
        is_told = self._keeper.number in events
        if is_told and not self._serve_keeper():
            return False
        for guest, peer, mask in guests:
            guest.serve(peer, mask)
        # Not before all is heard that the keeper has to say: a client may ask of it at once.
        if not is_told and self._acceptor.listener.fileno() in events and not self._is_succeeded:
            self._accept()
        for client, mask in clients:
            if not client.serve(mask):
                self._drop(client)
        self._get_on()
        return True

    def _get_on(self) -> None:
        """Look at what clients have sent, a bounded part of it each, and send them what is due."""
        for client in list(self._clients.values()):
            command = client.session.next_command()
            if command is not None:
                self._execute(client, command)
            if not client.flush() or client.is_done:
                self._drop(client)
            elif client.is_too_slow:
                self._give_up(client)

    # Waiting

    def _watch_all(self) -> float | None:
        """Have poll() watch what is to be watched. Returns for how many milliseconds; None for as long as it takes."""
        wanted = {number: client.wanted() for number, client in self._clients.items()}
        wanted[self._keeper.number] = select.POLLIN
        wanted |= self._guests.wanted()
        pause = self._acceptor.pause()
        if pause is None and not self._is_succeeded:
            wanted[self._acceptor.listener.fileno()] = select.POLLIN
        self._watch(wanted)
        if any(client.session.is_ready for client in self._clients.values()):
            return 0
        return None if pause is None else pause * 1000

    def _watch(self, wanted: dict[int, int]) -> None:
        for number in self._watched.keys() - wanted.keys():
            self._poll.unregister(number)
        for number, mask in wanted.items():
            if self._watched.get(number) != mask:
                self._poll.register(number, mask)
        self._watched = wanted

    # Clients

    def _accept(self) -> None:
        connection = self._acceptor.accept()
        if connection is None:
            return
        if len(self._clients) < MAX_CLIENTS:
            self._clients[connection.fileno()] = Client(connection)
            return
        connection.close()
        self._turned_away += 1
        if worth_logging(self._turned_away):
            log.warning("a client is turned away, %d are served: %d so far", MAX_CLIENTS, self._turned_away)

    def _give_up(self, client: Client) -> None:
        self._given_up += 1
        if worth_logging(self._given_up):
            log.warning("a client that does not read is given up: %d so far", self._given_up)
        self._drop(client)

    def _drop(self, client: Client) -> None:
        """Close a client's connection and call off what it asked a worker for. What the keeper was asked is not."""
        if self._clients.pop(client.connection.fileno(), None) is None:
            return
        self._guests.cancel(client)
        client.connection.close()

    def _execute(self, client: Client, command: Command) -> None:
        place = COMMANDS[command.name].place
        try:
            if place is Place.CONTROL:
                client.session.answer(_HANDLERS[command.name](command.arguments))
            elif place is Place.KEEPER:
                self._keeper.ask(client, command)
            else:
                self._guests.ask(command.arguments.get("guest"), ask_guest(client, command))
        except CommandError as error:
            client.session.refuse(error)

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        now = time.time_ns()
        for client in self._clients.values():
            client.session.tell(event, data, now)

    def _note_done(self, command: str | None) -> None:
        """The keeper has done what was asked."""
        if command == "quit":
            self._tell("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._is_succeeded = self._is_succeeded or command == "upgrade"

    def _serve_keeper(self) -> bool:
        """Take one envelope. False when the keeper has closed the channel."""
        try:
            envelope, received = self._keeper.receive()
        except EOFError:
            return False
        if envelope.kind in (Kind.GUEST, Kind.GONE):
            self._guests.take(envelope, received)
        else:
            self._note_done(self._keeper.answer(envelope))
        fds.close_all(received)
        return True
