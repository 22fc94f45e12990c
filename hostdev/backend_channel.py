"""The channel on which a back end may speak first: SET_BACKEND_REQ_FD gave it, and a balloon says one thing on it.

It asks for no reply, so nothing is ever read from it. session.py owns it, worker.py uses it.
"""

from __future__ import annotations

import logging
import socket

from hostdev import fds
from hostdev.wire.vhost_user import BackendRequest, message

log = logging.getLogger(__name__)


class BackendChannel:
    """Our end of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._broken = False

    def tell_config_change(self) -> bool:
        """Have the front end tell its guest to read config space again. False if it takes no message at the moment.

        A front end that has closed its end is not told: its guest finds the change when it looks.
        """
        if self._broken:
            return True
        try:
            fds.send(self._socket, message(BackendRequest.CONFIG_CHANGE_MSG, 0, b""))
        except BlockingIOError:
            return False
        except OSError as error:
            self._broken = True
            log.warning("the front end takes no messages any more: %s", error.strerror)
        return True

    def close(self) -> None:
        """Close it."""
        self._socket.close()
