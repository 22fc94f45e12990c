"""A connection to the device that is known to be served, before QEMU gets it.

QEMU waits for a back end's answer without a deadline, and its guest stands still meanwhile: a device that serves another
VM lets a second one connect and answers it only when the first has gone. So the first question is asked from here, with
a deadline, and the very connection that was answered is handed to QEMU. Used by attach.py.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Feature
from hostdev.wire.layout import lower
from hostdev.wire.vhost_user import Request
from qmp_glue.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["connect_backend"]

# The device forks its worker and answers within 20 ms; a loaded machine needs its margin.
ANSWER_SECONDS = 5.0
_ONE_AT_A_TIME = (
    "does it serve another VM? It serves one at a time, so start another vhost-user-balloon for this one"
)
_REPLY_SIZE = lower(wire.U64_PAYLOAD.declaration).size
_NEEDED = wire.F_PROTOCOL_FEATURES | Feature.VERSION_1


async def connect_backend(path: Path, *, seconds: float = ANSWER_SECONDS) -> socket.socket:
    """Connect, ask for the features, and return the connection once they came; the caller owns it.

    Asking changes nothing for QEMU, which asks again. Raises BackendError.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        features = await _ask(connection, path, seconds)
        _check(path, features)
        connection.setblocking(True)
    except BaseException:
        connection.close()
        raise
    return connection


async def _ask(connection: socket.socket, path: Path, seconds: float) -> int:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            await loop.sock_connect(connection, str(path))
            await loop.sock_sendall(connection, wire.message(Request.GET_FEATURES, 0, b""))
            header = wire.HEADER.decode(await _exactly(connection, wire.HEADER_SIZE))
            if header.request != Request.GET_FEATURES or header.size != _REPLY_SIZE:
                raise BackendError(
                    f"who listens at {path} does not speak vhost-user: name the device's socket"
                )
            return int(wire.U64_PAYLOAD.decode(await _exactly(connection, header.size)).value)
    except TimeoutError as error:
        raise BackendError(
            f"the device at {path} does not answer in {seconds:g} s: {_ONE_AT_A_TIME}"
        ) from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise BackendError(f"the device at {path} hangs up: {_ONE_AT_A_TIME}") from error
    except OSError as error:
        raise BackendError(
            f"no device at {path} ({error.strerror or error}): start vhost-user-balloon --socket-path={path} first"
        ) from error


def _check(path: Path, features: int) -> None:
    if features & _NEEDED != _NEEDED:
        raise BackendError(
            f"who listens at {path} offers features {features:#x}: that is no modern vhost-user device"
        )


async def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data
