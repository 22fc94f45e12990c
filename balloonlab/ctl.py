"""The command balloonlab ctl: a friendly face for the control socket of a running device.

Everything it does any QMP client can do (docs/guide.md has the commands); it adds human sizes, waiting with a bar, and
tables. Talks to vhost-user-balloon --control, never to QEMU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from balloonlab import ctl_text, signals
from balloonlab.durations import parse_duration
from balloonlab.errors import UsageError
from balloonlab.options import Commands, Parser
from balloonlab.progress import Progress
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from hostdev.schema import COMMANDS, Place
from qmp_glue.errors import DeadlineError
from qmp_glue.monitor import DEVICE_SERVES, Monitor, open_monitor

# Seconds between two looks at the balloon while it changes.
LOOK_SECONDS = 0.1
# A guest inflates some 300 MiB a second under emulation; one that takes longer than this has no more to give.
DEFAULT_TIMEOUT = "30s"
DEFAULT_WATCH = "2s"
# The device says that it ends before it closes.
SHUTDOWN_SECONDS = 1.0

# What a query answers is a shape of hostdev/schema.py.
Answer = dict[str, Any]
Show = Callable[[Answer], None]


@dataclass(frozen=True)
class _Session:
    """One invocation: the device, and where to print."""

    device: Monitor
    options: argparse.Namespace
    progress: Progress

    async def ask(self, command: str, arguments: Answer | None = None) -> Any:  # noqa: ANN401
        """Execute a command and return its answer. One about a guest is about the guest that was named."""
        arguments = dict(arguments or {})
        if COMMANDS[command].place is Place.DEVICE and self.options.guest is not None:
            arguments["guest"] = self.options.guest
        return await self.device.execute(command, arguments)

    def show(self, value: object, *lines: str) -> None:
        """Print a value: exact as JSON if that was asked for, else as lines for people."""
        if self.options.json:
            self.progress.say(json.dumps(value, indent=2))
        else:
            for line in lines:
                self.progress.say(line)


Action = Callable[[_Session], Awaitable[int]]


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("ctl", help="look at a running device, and tell it what to do")
    parser.add_argument(
        "--control", type=Path, required=True, metavar="PATH", help="the device's --control socket"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    _add_set(actions)
    _add_stats(actions)
    for name, action, text in (
        ("status", _status, "the device at a glance"),
        ("memory", _memory, "what the host holds of each region, and what was given back"),
        ("rings", _rings, "where each virtqueue stands"),
        ("estimate-free", _estimate, "how much the guest could give up now, by its own account"),
        ("inhibit", _inhibit, "answer everything and release nothing from now on"),
        ("allow", _allow, "release again"),
    ):
        _declare_for_guest(actions, name, action, text)
    _declare(actions, "guests", _guests, "who is served, and where")
    _add_changes(actions)
    _declare(actions, "upgrade", _upgrade, "have the device go on as the version that is installed now")
    ending = _declare(actions, "quit", _quit, "end the device")
    ending.add_argument(
        "--force", action="store_true", help="also under a running guest, which QEMU does not survive"
    )


def _declare(actions: Commands, name: str, action: Action, text: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("--json", action="store_true", help="exact values, for programs")
    parser.set_defaults(run=run, action=action)
    return parser


def _declare_for_guest(actions: Commands, name: str, action: Action, text: str) -> argparse.ArgumentParser:
    parser = _declare(actions, name, action, text)
    parser.add_argument(
        "--guest", metavar="NAME", help="which, where several are served (default: the only one)"
    )
    return parser


def _add_changes(actions: Commands) -> None:
    adding = _declare(actions, "guest-add", _guest_add, "serve one more guest")
    adding.add_argument(
        "socket_path", type=Path, metavar="PATH", help="where the device is to listen for its front end"
    )
    removing = _declare(actions, "guest-remove", _guest_remove, "listen for a guest no longer")
    removing.add_argument("name", metavar="NAME", help="of one whose VM has ended: see the action guests")


def _add_set(actions: Commands) -> None:
    parser = _declare_for_guest(actions, "set", _set, "ask the guest for a size")
    parser.add_argument(
        "size", metavar="SIZE", help="what the guest is to have left: 512M, 1.5G, or 50%% of its memory"
    )
    parser.add_argument("--wait", action="store_true", help="until it has come to that")
    parser.add_argument(
        "--timeout", default=DEFAULT_TIMEOUT, metavar="TIME", help="with --wait (default: %(default)s)"
    )


def _add_stats(actions: Commands) -> None:
    parser = _declare_for_guest(actions, "stats", _stats, "what the guest says of its memory, asked now")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=DEFAULT_WATCH,
        metavar="TIME",
        help=f"go on until Ctrl-C, every so often (default: {DEFAULT_WATCH})",
    )
    parser.add_argument("--count", type=int, metavar="N", help="with --watch: end after N times")


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 done, 1 not in time."""

    async def work() -> int:
        async with open_monitor(options.control, fix=DEVICE_SERVES) as device:
            return int(await options.action(_Session(device, options, progress)))

    return signals.run(work())


# Doing


async def _set(session: _Session) -> int:
    timeout = parse_duration(session.options.timeout)
    await session.ask("set-target", ctl_text.target_arguments(session.options.size))
    if session.options.wait:
        return await _wait_for_target(session, timeout)
    session.show({}, f"asked for {session.options.size}; the guest takes its time")
    return EXIT_PASS


async def _wait_for_target(session: _Session, timeout: float) -> int:
    """Look until the guest has come to its target, or the time is over."""
    began = time.monotonic()
    status: Answer = await session.ask("query-status")
    with _bar(session) as show:
        while not ctl_text.has_arrived(status) and time.monotonic() - began < timeout:
            show(status)
            await asyncio.sleep(LOOK_SECONDS)
            status = await session.ask("query-status")
    seconds = round(time.monotonic() - began, 3)
    sizes = {name: status.get(name) for name in ("memory", "target", "actual")}
    session.show(sizes | {"seconds": seconds}, ctl_text.outcome(status, seconds))
    return EXIT_PASS if ctl_text.has_arrived(status) else EXIT_CHECK_FAILED


@contextlib.contextmanager
def _bar(session: _Session) -> Iterator[Show]:
    """Yield what shows the way to a target: a bar on a terminal, nothing elsewhere."""
    if not session.progress.console.is_terminal or session.options.json:
        yield lambda _status: None
        return
    columns = (TextColumn("{task.description}"), BarColumn())
    with Bars(*columns, console=session.progress.console, transient=True) as bars:
        task = bars.add_task("waiting for the guest's driver", total=None)
        started: list[int] = []

        def show(status: Answer) -> None:
            if "actual" not in status:
                return
            started.append(status["actual"])
            way = abs(started[0] - status["target"])
            gone = abs(started[0] - status["actual"])
            bars.update(task, description=ctl_text.way_line(status), total=way or 1, completed=gone)

        yield show


async def _inhibit(session: _Session) -> int:
    await session.ask("inhibit")
    session.show({}, "inhibited: everything is answered, nothing is released")
    return EXIT_PASS


async def _allow(session: _Session) -> int:
    await session.ask("allow")
    session.show({}, "allowed: memory is released again")
    return EXIT_PASS


async def _guest_add(session: _Session) -> int:
    path = session.options.socket_path.absolute()  # as it is typed, in our folder and not in the device's
    await session.ask("guest-add", {"socket-path": str(path)})
    session.show({}, f"a front end is waited for at {path}")
    return EXIT_PASS


async def _guest_remove(session: _Session) -> int:
    await session.ask("guest-remove", {"guest": session.options.name})
    session.show({}, f"{session.options.name} is served no longer")
    return EXIT_PASS


async def _upgrade(session: _Session) -> int:
    await session.ask("upgrade")
    session.show({}, "the new version serves")
    return EXIT_PASS


async def _quit(session: _Session) -> int:
    await session.ask("quit", {"force": True} if session.options.force else None)
    with contextlib.suppress(DeadlineError):
        await session.device.wait_event("SHUTDOWN", seconds=SHUTDOWN_SECONDS)
    session.show({}, "the device ends")
    return EXIT_PASS


# Looking


async def _stats(session: _Session) -> int:
    if session.options.count is not None and session.options.count < 1:
        raise UsageError(f"--count {session.options.count}: give one or more")
    if session.options.watch is not None:
        return await _watch(session, parse_duration(session.options.watch))
    answer: Answer = await session.ask("query-balloon-stats", {"refresh": True})
    session.show(answer, *ctl_text.statistic_lines(answer))
    return EXIT_PASS


async def _watch(session: _Session, period: float) -> int:
    """Ask again and again: JSON lines for programs, columns for people."""
    if not session.options.json:
        session.progress.say(ctl_text.watch_header())
    done = 0
    while True:
        answer: Answer = await session.ask("query-balloon-stats", {"refresh": True})
        session.progress.say(json.dumps(answer) if session.options.json else ctl_text.watch_line(answer))
        done += 1
        if done == session.options.count:
            return EXIT_PASS
        await asyncio.sleep(period)


async def _status(session: _Session) -> int:
    status: Answer = await session.ask("query-status")
    session.show(status, *ctl_text.status_lines(status))
    return EXIT_PASS


async def _guests(session: _Session) -> int:
    guests: list[Answer] = await session.ask("query-guests")
    session.show(guests, *ctl_text.guest_lines(guests))
    return EXIT_PASS


async def _memory(session: _Session) -> int:
    regions: list[Answer] = await session.ask("query-memory")
    lines = [ctl_text.region_line(region) for region in regions]
    session.show(regions, *(lines or ["no guest memory is known yet"]))
    return EXIT_PASS


async def _rings(session: _Session) -> int:
    rings: list[Answer] = await session.ask("query-rings")
    session.show(rings, *(ctl_text.ring_line(ring) for ring in rings))
    return EXIT_PASS


async def _estimate(session: _Session) -> int:
    answer: Answer = await session.ask("estimate-free")
    session.show(answer, ctl_text.estimate_line(answer))
    return EXIT_PASS
