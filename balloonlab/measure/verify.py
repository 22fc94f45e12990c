"""--verify: proof, and not trust, that a run gave back what was free and nothing else.

    verifier = Verifier(rig, folder)           # of a rig that runs; it need not have booted
    watching = create_task(verifier.watch())   # looks again and again: the more often, the less is missed
    await verifier.start()                     # after rig.boot(): holds memory with known contents from here on
    await verifier.look("fill")                # at the end of each phase
    await verifier.compare(handle)             # before a fill is freed
    checks = await verifier.conclude(handles)  # last of all, once every figure is taken
    check = await verifier.prove_holes()       # instead, where guest or QEMU has ended: of all that was looked at

Four proofs, each a Check; what each proves and what it does not is at the head of its module:

    verify-holes       what became a hole was released, says the device's trace        verify_holes.py
    verify-pageflags   no hole is a page that the guest has in use and has written     verify_pages.py
    verify-contents    memory that the guest held has the contents that it wrote       here
    verify-dump        QEMU sees what the file holds, and zeroes where it has holes     verify_dump.py

Contents are compared where the memory is held no longer, and at the end, rather than again and again: what was lost stays
lost, for nobody writes a fill twice. The order matters: comparing contents fills a hole that is in them, so it comes after the
page flags; a dump fills all.

The machine is paused twice, and goes on whatever happens. Nothing here raises for what the guest, QEMU or the device does
wrong in conclude(). What could not be proved is a check that failed, for a proof was asked for: a guest without
/proc/kpageflags, nothing that was given back, a trace that is full. Skipped is only what this arm or this machine has no way
for: verify-holes without our device, and a dump for which there is no room. It measures nothing. runner.py is its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from elftools.common.exceptions import ELFError

from balloonlab.decode import read_trace
from balloonlab.errors import LabError
from balloonlab.measure.looking import in_thread, pause
from balloonlab.measure.ranges import PAGE, Places, counted, subtract, total
from balloonlab.measure.report import Check
from balloonlab.measure.verify_dump import NAME as DUMP
from balloonlab.measure.verify_dump import Comparison, Dump, Known, check_dump, has_no_room
from balloonlab.measure.verify_holes import NAME as HOLES
from balloonlab.measure.verify_holes import (
    Look,
    ReleaseLog,
    Releases,
    Step,
    between,
    check_holes,
    judge_holes,
    step,
    take_look,
    trace_is_full,
    trace_length,
)
from balloonlab.measure.verify_pages import NAME as PAGES
from balloonlab.measure.verify_pages import Flags, Pages, check_pages, judge_pages, survey
from balloonlab.printable import printable
from balloonlab.rig import Rig
from balloonlab.sizes import human
from balloonlab.trace_check import violations
from guest_images.agent import BLOCK, MAX_PAGE_FLAGS
from guest_images.agent_client import Checked
from guest_images.errors import AgentRefusedError, GuestError
from hostdev.wire.layout import LayoutError
from qmp_glue.errors import CommandFailedError, QmpGlueError, VmError

CONTENTS = "verify-contents"
# Memory of known contents that is held throughout: a sixteenth of a guest, and no more than makes its pages known at once.
CANARY_BYTES = 32 << 20
CANARY_SHARE = 16
CANARY_SEED = 0x5EED
# A page that is lost and taken anew within so long may not be seen.
WATCH_SECONDS = 0.2
# How often the guest's page flags are read anew because too much of it changed meanwhile.
ATTEMPTS = 3
# A dump writes 500 MB/s here; a disk that is ten times slower, and QEMU does nothing else meanwhile.
DUMP_SECONDS = 60.0
DUMP_BYTES_A_SECOND = 50 << 20
# A longer trace is not judged as a whole: 16 MiB are some 12,000 full reports, and half a minute of reading if this machine
# is busy. Its releases are read in any case.
MAX_JUDGED_TRACE = 16 << 20
# Of a line of the device's log.
LOG_CHARACTERS = 300
# The kernel says so once, early (mm/mm_init.c, mem_init_print_info).
INIT_ON_FREE = "heap free:on"

_FAILURES = (GuestError, QmpGlueError, LabError, LayoutError, ELFError, OSError)


class Verifier:
    """The proofs of one run. ``canary_bytes``: what the guest holds for it, from start() to the end."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        """rig: runs; for verify-holes its device must write a trace. folder: on whose disk a dump has room."""
        self._rig = rig
        self._folder = folder
        self.canary_bytes = min(CANARY_BYTES, rig.setup.memory_bytes // CANARY_SHARE) // BLOCK * BLOCK
        self._canary: int | None = None
        self._began = time.monotonic()
        self._places = Places(())
        # One at a time, each compared with the one before it.
        self._looking = asyncio.Lock()
        self._last: Look | None = None
        self._steps: list[Step] = []
        self._compared: list[Checked] = []
        self._log: ReleaseLog | None = None

    @property
    def _trace(self) -> Path | None:
        setup = self._rig.setup
        return self._rig.device.trace_file if setup.balloon == "vhost-user" and setup.trace else None

    async def start(self) -> None:
        """Have the guest hold memory with known contents, and take the first look. Raises GuestError, QmpGlueError.

        A guest that has no room holds nothing, and then its contents are not proved.
        """
        # Anew: as long as its firmware runs, a part of the guest's RAM is behind that.
        self._places = Places(await self._rig.vm.ram_sections())
        with contextlib.suppress(AgentRefusedError):
            filled = await self._rig.agent.fill("anonymous", self.canary_bytes, seed=CANARY_SEED)
            self._canary = filled.handle
        await self.look("start")

    async def watch(self) -> None:
        """Look again and again until cancelled, or until QEMU has ended."""
        with contextlib.suppress(VmError):
            while True:
                began = time.monotonic()
                await self.look(f"second {began - self._began:.1f}")
                await asyncio.sleep(pause(time.monotonic() - began, WATCH_SECONDS))

    async def look(self, name: str) -> Look:
        """Look at what the host holds; it costs the run some milliseconds of this machine and nothing of the guest's.

        Raises VmError once QEMU has ended.
        """
        async with self._looking:
            if not self._places.sections:
                self._places = Places(await self._rig.vm.ram_sections())
            files = self._rig.vm.ram_files
            look = await in_thread(partial(take_look, name, files, self._trace))
            if self._last is not None:
                self._steps.append(step(self._last, look))
            self._last = look
        return look

    async def compare(self, handle: int) -> None:
        """Compare what a fill holds with what was written, before it is freed. Raises GuestError."""
        self._compared.append(await self._rig.agent.checksum(handle))

    async def conclude(self, handles: Sequence[int] = ()) -> list[Check]:
        """Prove. handles: of fills that are held still. Nothing can be measured afterwards, and the guest goes on."""
        pages = await _proved(PAGES, self._prove_pages)
        contents = await _proved(CONTENTS, partial(self._prove_contents, handles))
        dump = await _proved(DUMP, self._prove_dump)
        # Last, for the other proofs have looked as well.
        holes = await self.prove_holes()
        return [holes if self._trace is None else _demanded(holes), *map(_demanded, (pages, contents)), dump]

    # Holes

    async def prove_holes(self) -> Check:
        """Judge what has been looked at so far. Needs neither guest nor QEMU: a run that died of a device shows why."""
        return await _proved(HOLES, self._prove_holes)

    async def _prove_holes(self) -> Check:
        if self._trace is None:
            return Check(name=HOLES, outcome="skip", message="only our device writes down what it releases")
        return await asyncio.to_thread(self._judge_holes, self._trace)

    def _judge_holes(self, trace: Path) -> Check:
        if said := trace_is_full(self._rig.device.log_text()):
            message = f"run less, or make room on the disk: {printable(said, LOG_CHARACTERS)}"
            return Check(name=HOLES, outcome="skip", message=message)
        check = check_holes(judge_holes(self._steps, self._releases(trace), self._places), self._places)
        broken = violations(read_trace(trace)) if trace_length(trace) <= MAX_JUDGED_TRACE else []
        if broken:
            what = f"the trace itself breaks {len(broken)} promises, first in record {broken[0].number}: {broken[0].text}"
            return Check(name=HOLES, outcome="fail", message=f"{what}; {check.message}")
        return check

    def _releases(self, trace: Path) -> Releases:
        if self._log is None:
            self._log = ReleaseLog(trace)
        return self._log.read()

    # Page flags

    async def _prove_pages(self) -> Check:
        init_on_free = INIT_ON_FREE in await self._rig.agent.dmesg()
        for _ in range(ATTEMPTS):
            pages = await self._look_at_pages(init_on_free=init_on_free)
            if pages.lost or not pages.is_restless:
                break
        return check_pages(pages, self._places)

    async def _look_at_pages(self, *, init_on_free: bool) -> Pages:
        begin = trace_length(self._trace)
        before = await self._read_flags()
        async with self._paused():
            look = await self.look("page flags")
        after, released = await self._read_flags(), []
        if self._trace is not None:
            released = between(await asyncio.to_thread(self._releases, self._trace), begin, look.end)
        readings = [Flags(first, one, after[first]) for first, one in before.items()]
        found = await asyncio.to_thread(survey, readings, init_on_free=init_on_free)
        return judge_pages(found, look.held, released, self._places)

    async def _read_flags(self) -> dict[int, array[int]]:
        """Return the flags of all RAM by the number of the first page frame."""
        found = {}
        for section in self._places.sections:
            end = section.end // PAGE
            for first in range(section.address // PAGE, end, MAX_PAGE_FLAGS):
                count = min(MAX_PAGE_FLAGS, end - first)
                flags = await self._rig.agent.page_flags(first, count)
                # Memory at the very top may be no page of the guest's, and then says nothing.
                found[first] = flags + array("Q", bytes(flags.itemsize * (count - len(flags))))
        return found

    # Contents

    async def _prove_contents(self, handles: Sequence[int]) -> Check:
        gone = []
        for handle in [*handles] if self._canary is None else [self._canary, *handles]:
            try:
                await self.compare(handle)
            except AgentRefusedError as error:  # most likely the guest's OOM killer has it
                gone.append(str(error))
        return _check_contents(self._compared, gone)

    # Dump

    async def _prove_dump(self) -> Check:
        async with self._paused():
            look = await self.look("dump")
            with tempfile.TemporaryFile(dir=self._folder) as file:
                filled = total(subtract(self._places.all, look.held))
                if why := has_no_room(file, self._folder, total(self._places.all), filled):
                    return Check(name=DUMP, outcome="skip", message=why)
                return check_dump(await self._dump(file, look), self._places)

    async def _dump(self, file: IO[bytes], look: Look) -> Dump:
        vm = self._rig.vm
        await vm.monitor.pass_fd(DUMP, file.fileno())
        seconds = DUMP_SECONDS + total(self._places.all) / DUMP_BYTES_A_SECOND
        arguments = {"paging": False, "protocol": f"fd:{DUMP}"}
        await vm.execute("dump-guest-memory", arguments, seconds=seconds)
        known = Known(self.canary_bytes if self._canary is not None else 0, CANARY_SEED)
        comparison = Comparison(file, vm.ram_files, self._places, look.held)
        return await asyncio.to_thread(comparison.compare, known)

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Pause the guest. It goes on afterwards, also where the pause came too late for its deadline."""
        try:
            await self._rig.vm.stop()
            yield
        except BaseException:
            with contextlib.suppress(QmpGlueError):  # what came first tells more
                await self._rig.vm.cont()
            raise
        await self._rig.vm.cont()


async def _proved(name: str, prove: Callable[[], Awaitable[Check]]) -> Check:
    """Return what a proof says, or why it could not be made."""
    try:
        return await prove()
    except (AgentRefusedError, CommandFailedError) as error:
        return Check(name=name, outcome="skip", message=f"cannot be proved here: {error}")
    except _FAILURES as error:
        return Check(name=name, outcome="fail", message=f"could not be proved: {error}")


def _demanded(check: Check) -> Check:
    """Return a check of what had to be proved: where it could not be made, it has failed."""
    if check.outcome != "skip":
        return check
    return Check(name=check.name, outcome="fail", message=f"not proved: {check.message}")


def _check_contents(compared: Sequence[Checked], gone: Sequence[str]) -> Check:
    size = sum(one.bytes for one in compared)
    told = f"{human(size)} of memory in {len(compared)} fills compared byte by byte"
    bad = [one for one in compared if one.mismatched_pages]
    if bad:
        pages = sum(one.mismatched_pages for one in bad)
        what = f"not as it was written: {counted(pages * PAGE)} in {len(bad)} of the fills"
        first = f"the first at byte {bad[0].first_mismatch:,} of its fill"
        return Check(name=CONTENTS, outcome="fail", message=f"{what}, {first}; {told}")
    if gone or not compared:
        why = gone[0] if gone else "the guest holds nothing with known contents: call start()"
        return Check(name=CONTENTS, outcome="skip", message=f"{why}; {told}")
    return Check(name=CONTENTS, outcome="pass", message=f"{told}: all as they were written")
