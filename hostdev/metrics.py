"""Counters of one guest's device, and their text form with Prometheus names.

Bytes and counts only ever grow; labels are few and never chosen by the guest. Written to a file for the lab and for a
textfile collector (--metrics-file); no server here. Used by balloon.py and worker.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

PREFIX = "vhost_user_balloon"

# Family, labels, help. A sample of a family that is not here is a defect, so add() refuses it.
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    "released_bytes_total": (
        ("cause", "method"),
        "Bytes given back, by what named them and by the call that was used.",
    ),
    "withheld_bytes_total": (("cause", "reason"), "Bytes that the guest named and that were not given back."),
    "chains_total": (("queue",), "Descriptor chains returned to the guest."),
    "buffers_total": (("queue",), "Descriptors (scatterlist entries) in those chains."),
    "deflated_pages_total": ((), "Pages of 4096 bytes that the guest took back from the balloon."),
    "guest_errors_total": (("kind",), "Chains and rings that broke the virtio rules."),
    "host_errors_total": (("errno",), "Refusals of madvise."),
    "messages_total": (("request",), "vhost-user messages handled."),
    "refused_messages_total": (("request",), "vhost-user messages that could not be granted."),
}
# Counters of the same kind that are not shown: they answer commands, and are to outlive a worker as the others do.
INTERNAL: dict[str, tuple[str, ...]] = {
    "region_bytes": ("guest_address", "fate"),
    "ring_chains": ("ring",),
}
GAUGES: dict[str, str] = {
    "negotiated_features": "virtio feature bits that the guest's driver accepted, as a number.",
    "inert": "1 if the device answers everything and releases nothing after an error of its own.",
    "inhibited": "1 while the control socket has the device release nothing.",
    "guest_memory_bytes": "Size of the guest memory in the memory table.",
    "worker_cpu_seconds": "User and system time of the worker process.",
}

# A log line at the first, second, fourth, eighth ... occurrence: a guest can grow the log only with the logarithm of
# what it does.


def worth_logging(count: int) -> bool:
    """True at powers of two."""
    return count & (count - 1) == 0


Sample: TypeAlias = tuple[str, tuple[str, ...]]


class Metrics:
    """The counters and gauges of one device. guest: a label that each sample has, none if empty.

    scope: where counts go for now instead, until merge(): a chain's count only once it is returned, so that what a worker
    did of one that its successor does again is not there twice.
    """

    def __init__(self, guest: str = "") -> None:
        self._guest = guest
        self._counters: dict[Sample, int] = {}
        self.scope: Counter[Sample] | None = None
        self.gauges: dict[str, float] = dict.fromkeys(GAUGES, 0)

    def add(self, family: str, amount: int = 1, *labels: str) -> int:
        """Add amount to one sample and return its new value. Raises KeyError or ValueError for an undeclared sample."""
        names = INTERNAL[family] if family in INTERNAL else FAMILIES[family][0]
        if len(names) != len(labels):
            raise ValueError(f"{family} has the labels {names}")
        sample = family, labels
        if self.scope is None:
            self._counters[sample] = self._counters.get(sample, 0) + amount
            return self._counters[sample]
        self.scope[sample] += amount
        return self._counters.get(sample, 0) + self.scope[sample]

    def merge(self, counts: Counter[Sample]) -> None:
        """Add what was counted in a scope, and empty it."""
        for sample, amount in counts.items():
            self._counters[sample] = self._counters.get(sample, 0) + amount
        counts.clear()

    def drop(self, family: str, *labels: str) -> None:
        """Forget the samples of a family that begin with these labels."""
        for sample in [each for each in self._counters if _matches(each, family, labels)]:
            del self._counters[sample]

    def value(self, family: str, *labels: str) -> int:
        """Return one sample; with fewer labels than the family has, the sum over the missing ones."""
        return sum(count for sample, count in self._counters.items() if _matches(sample, family, labels))

    @property
    def samples(self) -> Mapping[Sample, int]:
        """All counters, in the order in which they came to be."""
        return self._counters

    def restore(self, samples: Mapping[Sample, int]) -> None:
        """Go on from these. What this version does not count any more is kept and not shown."""
        self._counters = dict(samples)

    def exposition(self) -> str:
        """Return all samples in Prometheus' text format."""
        lines: list[str] = []
        for family, (names, description) in FAMILIES.items():
            lines += [f"# HELP {PREFIX}_{family} {description}", f"# TYPE {PREFIX}_{family} counter"]
            for (name, labels), count in sorted(self._counters.items()):
                if name == family:
                    lines.append(f"{PREFIX}_{family}{self._labels(names, labels)} {count}")
        for gauge, description in GAUGES.items():
            lines += [f"# HELP {PREFIX}_{gauge} {description}", f"# TYPE {PREFIX}_{gauge} gauge"]
            lines.append(f"{PREFIX}_{gauge}{self._labels((), ())} {self.gauges[gauge]}")
        return "\n".join(lines) + "\n"

    def _labels(self, names: tuple[str, ...], values: tuple[str, ...]) -> str:
        pairs = [*zip(names, values, strict=True)]
        if self._guest:
            pairs.insert(0, ("guest", self._guest))
        text = ",".join(f'{name}="{value}"' for name, value in pairs)
        return f"{{{text}}}" if text else ""

    def write(self, path: Path) -> None:
        """Replace the file at path by the current samples; a reader sees the old or the new, never half."""
        self.gauges["worker_cpu_seconds"] = time.process_time()
        # Always the same: a worker that is killed here leaves it behind, and its successor takes it.
        fresh = path.with_name(f".{path.name}.new")
        try:
            fresh.write_text(self.exposition())
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def _matches(sample: Sample, family: str, labels: tuple[str, ...]) -> bool:
    return sample[0] == family and sample[1][: len(labels)] == labels
