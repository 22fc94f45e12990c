"""What the control process may ask of the keeper, and the answers. Used by keeper.py.

Texts come as bare names and paths and go as JSON: the keeper writes some and parses none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hostdev.errors import CommandError, SetupError
from hostdev.place import Place
from hostdev.wire.control import QUIT_ACCEPTED, QUIT_FORCED, QUIT_REFUSED, Envelope, Kind, refusal, result

if TYPE_CHECKING:
    from hostdev.keeper import Keeper


class Wishes:
    """Grants or refuses them."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def grant(self, asked: Envelope) -> Envelope | None:
        """Do what is asked. Returns the answer, None if that is nothing that may be asked."""
        if asked.kind == Kind.QUIT:
            return self._quit(asked)
        try:
            if asked.kind == Kind.GUESTS:
                return result(asked.id, self._guests())
            name = asked.text.decode(errors="surrogateescape")
            if asked.kind == Kind.ADD:
                self._add(name)
                return result(asked.id, {})
            if asked.kind == Kind.REMOVE:
                self._keeper.remove(name)
                return result(asked.id, {})
        except (CommandError, SetupError) as error:
            return refusal(asked.id, str(error))
        except OSError as error:
            return refusal(asked.id, f"the host refuses: {error.strerror}")
        return None

    def _add(self, path: str) -> None:
        place = Place.at(path, "socket-path")
        try:
            self._keeper.add(place)
        except CommandError:
            place.close()
            raise

    def _quit(self, asked: Envelope) -> Envelope:
        """End as asked, unless that would kill a VM and nobody said that it may."""
        if self._keeper.is_serving and asked.text != QUIT_FORCED:
            return Envelope(Kind.ERROR, asked.id, QUIT_REFUSED)
        self._keeper.end_now("quit over the control socket")
        return Envelope(Kind.RETURN, asked.id, QUIT_ACCEPTED)

    def _guests(self) -> list[dict[str, Any]]:
        return [_describe(place) for place in self._keeper.places.values()]


def _describe(place: Place) -> dict[str, Any]:
    values: dict[str, Any] = {"name": place.name, "connected": place.is_connected, "restarts": 0}
    if place.path:
        values["socket-path"] = place.path
    if place.guest is not None:
        values["restarts"] = place.guest.restarts
        if place.guest.worker is not None:
            values["worker"] = place.guest.worker
    return values
