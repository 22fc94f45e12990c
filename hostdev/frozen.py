"""One front end as it stands still between two workers: all that a keeper knows of it.

Nothing runs in it. It goes to another version of the keeper (parcels.py), or into a Guest of that. Used by guest.py.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from hostdev.estate import Estate
from hostdev.fds import Fd, close_all


@dataclass
class Message:
    """A message that was not answered yet. deaths: workers that died with it. curtailed: its descriptors were lost."""

    number: int
    data: bytes
    deaths: int = 0
    curtailed: bool = False


@dataclass(frozen=True, slots=True)
class FrozenGuest:
    """number: of the message read last. begun: what was read of the next. outgoing: what is left of a reply."""

    connection: socket.socket
    estate: Estate
    number: int = 0
    message: Message | None = None
    begun: bytes = b""
    begun_with: Sequence[Fd] = ()
    outgoing: bytes = b""
    closing: bool = False
    why_inert: str = ""
    restarts: int = 0
    begun_curtailed: bool = False

    def close(self) -> None:
        """Close everything: somebody else has it."""
        self.connection.close()
        self.estate.close()
        close_all(self.begun_with)
