"""The config space (virtio 1.3, 5.5.4), and the target that stands in it.

num_pages and free_page_hint_cmd_id are the device's to write, actual and poison_val the driver's. The target outlives
everything but the front end: a driver that is loaded again, or a guest that reboots, finds it there. What the driver
says in actual is for people to look at; nothing is worked out from it but the size that they are shown.

No I/O. Owned by balloon.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hostdev.errors import RequestError
from hostdev.target import Target, balloon_pages
from hostdev.wire.balloon import CONFIG, CONFIG_SIZE, Config


class ConfigSpace:
    """The 16 bytes, and whether the driver is to be told that they have changed."""

    def __init__(self, shown_id: Callable[[], int]) -> None:
        """shown_id: what the hinting's state lets free_page_hint_cmd_id be."""
        self._shown_id = shown_id
        self._config = Config()
        # What was asked for while the guest's memory was not known.
        self.pending: Target | None = None
        # Whether the driver is to be told.
        self.changed = False

    @property
    def config(self) -> Config:
        """All fields as they are now."""
        return replace(self._config, free_page_hint_cmd_id=self._shown_id())

    @property
    def actual(self) -> int:
        """What the driver says that it holds, in pages of 4096 bytes."""
        return self._config.actual

    def read(self, offset: int, size: int) -> bytes:
        """Return a piece. Raises RequestError if it is not all inside."""
        if offset + size > CONFIG_SIZE:
            raise RequestError(
                f"config space is {CONFIG_SIZE} bytes, not {offset + size}: give QEMU config_size=16"
            )
        return CONFIG.encode(self.config)[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Take what a driver may write: actual and poison_val. Raises RequestError if it is not all inside.

        QEMU always sends all 16 bytes, num_pages as it last read it; taking that would bring an old target back.
        """
        if offset + len(data) > CONFIG_SIZE:
            raise RequestError(f"config space is {CONFIG_SIZE} bytes, not {offset + len(data)}")
        image = bytearray(CONFIG.encode(self._config))
        image[offset : offset + len(data)] = data
        written = CONFIG.decode(bytes(image))
        self._config = replace(self._config, actual=written.actual, poison_val=written.poison_val)

    def restore(
        self, *, num_pages: int, actual: int, poison_val: int, pending: Target | None, changed: bool
    ) -> None:
        """Go on with what another process had."""
        self._config = Config(num_pages=num_pages, actual=actual, poison_val=poison_val)
        self.pending = pending
        self.changed = changed

    def set_target(self, target: Target, memory: int) -> None:
        """Ask the guest for a size. memory: of the guest, in bytes; while that is 0 the target waits for settle()."""
        self.pending = target
        if memory:
            self.settle(memory)

    def settle(self, memory: int) -> None:
        """Turn a target that waits into pages: the memory of the guest is known from now on.

        Pages that stand there already stay when memory comes or goes, as with QEMU's device.
        """
        if self.pending is None:
            return
        pages = balloon_pages(memory, self.pending.bytes_of(memory))
        self.pending = None
        if pages != self._config.num_pages:
            self._config = replace(self._config, num_pages=pages)
            self.changed = True
