"""The seeded faults: each a change of a line or two that somebody could make by mistake, and the tests that are to notice.

What they have in common is that the device would go on working in everyday use: each is about an edge, an order or a bound.
Not a test. Used by run.py; test_faults.py keeps them applicable.
"""

from __future__ import annotations

from dataclasses import dataclass

PURE = ("tests/property/test_pages.py",)
BALLOON = ("tests/unit/test_balloon.py",)
RINGS = ("tests/unit/test_virtqueue.py", "tests/property/test_virtqueue.py")
SESSION = ("tests/unit/test_session.py", "tests/property/test_session.py")
MEMORY = ("tests/unit/test_memory.py", "tests/property/test_memory.py")


@dataclass(frozen=True, slots=True)
class Edit:
    """file: in hostdev. old: what stands there once; new: what stands there with the fault."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Fault:
    """what: in a few words. tests: files, one of whose tests must fail."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def _one(  # noqa: PLR0917  (a table, read by column)
    name: str, what: str, file: str, old: str, new: str, tests: tuple[str, ...]
) -> Fault:
    return Fault(name, what, (Edit(file, old, new),), tests)


FAULTS: tuple[Fault, ...] = (
    # What is released
    _one(
        "start-rounded-down",
        "the first page of a range is released although a part of it was not named",
        "pages.py",
        "start = -(-span.start // page_size) * page_size",
        "start = span.start // page_size * page_size",
        PURE,
    ),
    _one(
        "end-rounded-up",
        "the last page of a range is released although a part of it was not named",
        "pages.py",
        "end = span.end // page_size * page_size",
        "end = -(-span.end // page_size) * page_size",
        PURE,
    ),
    _one(
        "merge-forgets-the-longer",
        "a range inside another one cuts that short",
        "pages.py",
        "max(last.end, span.end) - last.start",
        "span.end - last.start",
        PURE,
    ),
    _one(
        "gap-of-a-page-joined",
        "page frame numbers with a page between them become one range",
        "pages.py",
        "        if address != end:\n",
        "        if address > end + page:\n",
        PURE,
    ),
    _one(
        "aligned-on-guest-address",
        "whole pages are found by the address and not by the offset in the file",
        "giver.py",
        "    base = part.region.file_offset\n",
        "    base = part.region.guest_address\n",
        ("tests/unit/test_giver.py",),
    ),
    _one(
        "split-past-the-region",
        "a range that crosses a region's end goes a byte too far",
        "memory.py",
        "min(end, region.guest_end)",
        "min(end, region.guest_end + 1)",
        MEMORY,
    ),
    _one(
        "readable-buffers-released",
        "a report's readable buffers are taken for pages",
        "chains.py",
        "Span(entry.address, entry.length) for entry in chain.descriptors if entry.is_writable",
        "Span(entry.address, entry.length) for entry in chain.descriptors",
        BALLOON,
    ),
    _one(
        "poison-ignored",
        "reported pages are released although the guest's pattern must stay in them",
        "giver.py",
        "cause is Cause.REPORT and self.poisoned",
        "cause is Cause.INFLATE and self.poisoned",
        BALLOON,
    ),
    _one(
        "hints-released",
        "hinted pages, which are not free, are released",
        "jobs.py",
        "        if role is Role.REPORTING:\n",
        "        if role in (Role.REPORTING, Role.FREE_PAGE_HINT):\n",
        (*BALLOON, "tests/unit/test_hinting.py"),
    ),
    _one(
        "roles-always-dense",
        "with a driver that follows the text, statistics are taken for a report",
        "roles.py",
        "    if any(index >= len(present) for index in configured):\n",
        "    if False:\n",
        BALLOON,
    ),
    # Orders
    Fault(
        "answer-before-release",
        "a large report is answered before all of it is released",
        (
            Edit(
                "balloon.py",
                "        size = calls = 0\n",
                "        early = self._finish(index, ring, job.head) if job.following else None\n        size = calls = 0\n",
            ),
            Edit(
                "balloon.py",
                "        return self._finish(index, ring, job.head)\n\n    def _finish",
                "        return early or self._finish(index, ring, job.head)\n\n    def _finish",
            ),
        ),
        BALLOON,
    ),
    _one(
        "index-before-element",
        "the used index is published before the element that it is for",
        "virtqueue.py",
        "        USED_ELEMENT_STRUCT.pack_into(self._used, at, head, length)\n"
        "        self._used_index[_INDEX_SLOT] = (index + 1) & INDEX_MASK\n",
        "        self._used_index[_INDEX_SLOT] = (index + 1) & INDEX_MASK\n"
        "        USED_ELEMENT_STRUCT.pack_into(self._used, at, head, length)\n",
        RINGS,
    ),
    _one(
        "counted-after-the-answer",
        "counters are written down after the used index: a worker killed in between loses them",
        "balloon.py",
        "        self.journal.put_back(index, ring.queue.used_index + 1)\n        ring.queue.put(head)\n",
        "        ring.queue.put(head)\n        self.journal.put_back(index, ring.queue.used_index)\n",
        ("tests/driver/test_killed_workers.py",),
    ),
    _one(
        "image-counts-too-early",
        "a record's image counts before it is written",
        "record.py",
        "        self._mapping[at : at + len(data)] = data\n        self._words[word] = generation\n",
        "        self._words[word] = generation\n        self._mapping[at : at + len(data)] = data\n",
        ("tests/unit/test_record.py", "tests/driver/test_killed_workers.py"),
    ),
    # Rings
    _one(
        "head-out-by-one",
        "a head just behind the descriptor table is followed",
        "virtqueue.py",
        "        if head >= self.size:\n",
        "        if head > self.size:\n",
        RINGS,
    ),
    _one(
        "index-unbounded",
        "an available index that lies is believed",
        "virtqueue.py",
        "        if ahead > self.size:\n",
        "        if ahead > INDEX_MASK:\n",
        RINGS,
    ),
    _one(
        "endless-chain-accepted",
        "a chain in a circle is taken for one of as many descriptors as there are",
        "virtqueue.py",
        '        raise ChainError(head, "loop", f"chain does not end within {most} descriptors")\n',
        "        return chain\n",
        RINGS,
    ),
    _one(
        "base-forgets-the-held",
        "the statistics buffer that is held is lost at a pause",
        "virtqueue.py",
        "        return (self.next_available - len(self._outstanding)) & INDEX_MASK\n",
        "        return self.next_available\n",
        (*RINGS, *BALLOON),
    ),
    _one(
        "wrap-of-the-used-ring",
        "the used element goes into the slot behind",
        "virtqueue.py",
        "USED_ELEMENT_SIZE * (index % self.size)",
        "USED_ELEMENT_SIZE * ((index + 1) % self.size)",
        RINGS,
    ),
    _one(
        "same-head-twice",
        "a chain that is in hand is taken a second time",
        "virtqueue.py",
        "        if head in self._outstanding:\n",
        "        if head in ():\n",
        (*RINGS, *BALLOON),
    ),
    _one(
        "broken-chain-kept",
        "a chain that cannot be used is not returned, and its guest waits for ever",
        "balloon.py",
        "            return self._finish(index, ring, error.head)\n",
        "            return _IDLE\n",
        BALLOON,
    ),
    _one(
        "lost-call",
        "the guest is not signalled while its ring has more to do",
        "worker.py",
        "        if step.returned:\n            self._signal(index)\n",
        "        if step.returned and step.more:\n            pass\n        elif step.returned:\n            self._signal(index)\n",
        ("tests/driver/test_device_reports.py", "tests/driver/test_killed_workers.py"),
    ),
    _one(
        "served-while-disabled",
        "a ring that the front end has disabled is served",
        "worker.py",
        "            if ring.started and ring.enabled and ring.kick is not None\n",
        "            if ring.started and ring.kick is not None\n",
        ("tests/catalogue/test_ring_setup.py",),
    ),
    # Messages and memory
    _one(
        "gate-on-what-is-offered",
        "messages are allowed by what was offered and not by what was negotiated",
        "session.py",
        "not shape.gate & self.protocol_features:",
        "not shape.gate & OFFERED_PROTOCOL_FEATURES:",
        SESSION,
    ),
    _one(
        "descriptors-kept",
        "descriptors of a refused message are never closed",
        "session.py",
        "            close_all(arrived.fds)\n",
        "            self._kept = getattr(self, '_kept', []) + arrived.fds\n",
        SESSION,
    ),
    _one(
        "setter-leaks",
        "a second eventfd for the same ring leaves the first one open",
        "vrings.py",
        "        if old is not None:\n            old.close()\n",
        "        if old is not None:\n            old.detach()\n",
        SESSION,
    ),
    _one(
        "offset-left-out",
        "a region may lie behind the end of its file",
        "memory.py",
        "st_size < description.mmap_offset + description.size:",
        "st_size < description.size:",
        MEMORY,
    ),
    _one(
        "overlap-allowed",
        "two regions may have guest addresses in common",
        "memory.py",
        "        if start < end:\n            raise",
        "        if start < end - (1 << 20):\n            raise",
        MEMORY,
    ),
    _one(
        "half-a-buffer-read",
        "a buffer that is partly outside memory is read as far as it is not",
        "memory.py",
        "        return data if len(data) == length else None\n",
        "        return data\n",
        MEMORY,
    ),
    _one(
        "old-target-comes-back",
        "the driver's write of all of config space overwrites the target",
        "config_space.py",
        "replace(self._config, actual=written.actual, poison_val=written.poison_val)",
        "replace(self._config, num_pages=written.num_pages, actual=written.actual, poison_val=written.poison_val)",
        (*BALLOON, "tests/unit/test_commands.py"),
    ),
    _one(
        "never-inert",
        "a host that refuses is asked for ever",
        "giver.py",
        "        if self.host_errors >= MAX_HOST_ERRORS:\n",
        "        if self.host_errors == -1:\n",
        BALLOON,
    ),
)
