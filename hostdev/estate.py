"""What a worker leaves to its successor: the record of its guest, and the descriptors that the front end sent.

Kept by the keeper, which looks into neither: the worker says, by their tokens, which descriptors are still in use. A
forked successor has both without being sent anything. Used by guest.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hostdev.fds import Fd, close_all
from hostdev.record import make_record


@dataclass
class Estate:
    """record: as it is read and written. source: of another version, read until a worker has written its own.

    held: descriptors in use, by token. arrived: those of the message at hand: it may have taken effect, or not.
    """

    record: Fd = field(default_factory=make_record)
    source: Fd | None = None
    held: dict[int, Fd] = field(default_factory=dict)
    arrived: Sequence[Fd] = ()

    @property
    def known(self) -> dict[int, Fd]:
        """All descriptors of the front end, by token."""
        return self.held | {fd.token: fd for fd in self.arrived}

    def settle(self, tokens: Iterable[int] | None) -> None:
        """The message at hand was answered: keep what is in use, as it was before if tokens is None, and close the rest."""
        known, kept = self.known, self.held if tokens is None else set(tokens)
        self.held = {token: fd for token, fd in known.items() if token in kept}
        self.arrived = ()
        close_all(fd for token, fd in known.items() if token not in kept)

    def copied(self) -> Estate:
        """Return the same with a new record, the old one for its source: that one stays as it is."""
        return Estate(make_record(), self.record, self.held, self.arrived)

    def drop_source(self) -> None:
        """A worker has written a record of its own."""
        if self.source is not None:
            self.source.close()
            self.source = None

    def descriptors(self) -> list[Fd]:
        """Everything that a worker is to have."""
        sources = [] if self.source is None else [self.source]
        return [self.record, *sources, *self.known.values()]

    def close(self) -> None:
        """Close everything: the front end has gone."""
        close_all(self.descriptors())
        self.held, self.arrived = {}, ()
