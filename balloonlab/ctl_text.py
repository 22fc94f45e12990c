"""What the device's control socket answers, as lines for people; and what people write, as its arguments.

Pure. Sizes are rounded for the eye, --json has exact bytes. Used by ctl.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from balloonlab.errors import UsageError
from balloonlab.sizes import human, parse_size
from hostdev.statistics import ABSENT

# Of the statistics, those that count things and not bytes.
COUNTS = frozenset(
    f"stat-{name}"
    for name in (
        "major-faults",
        "minor-faults",
        "htlb-pgalloc",
        "htlb-pgfail",
        "oom-kills",
        "alloc-stalls",
    )
)
# The columns of stats --watch.
WATCHED = ("free-memory", "available-memory", "disk-caches", "swap-out", "major-faults")


def target_arguments(text: str) -> dict[str, int]:
    """Return the arguments of set-target for "512M" or "50%". Raises UsageError."""
    if not text.endswith("%"):
        return {"size": parse_size(text)}
    number = text.removesuffix("%").strip()
    if not (number.isascii() and number.isdecimal()) or not 0 < int(number) <= 100:
        raise UsageError(f"{text!r} is no share of the guest's memory: write it like 50%, from 1% to 100%")
    return {"percent": int(number)}


def has_arrived(status: dict[str, Any]) -> bool:
    """Whether the guest has the size that it was asked for."""
    return "actual" in status and bool(status["actual"] == status["target"])


def way_line(status: dict[str, Any]) -> str:
    """Say how far the guest has come on its way to a target."""
    return f"{human(status['actual'])} of {human(status['target'])}"


def outcome(status: dict[str, Any], seconds: float) -> str:
    """Say how waiting for a target has ended."""
    if "actual" not in status:
        return f"the guest's driver is not up after {seconds:.1f} s: the target is kept until it is"
    if has_arrived(status):
        return f"the guest has {human(status['actual'])} after {seconds:.1f} s"
    return (
        f"the guest has {human(status['actual'])} after {seconds:.1f} s, and not {human(status['target'])}: it gives "
        "no more, or its driver does not answer; ask for a size that it can reach"
    )


def statistic(name: str, value: int) -> str:
    """Write one statistic: bytes as sizes, counts as they are."""
    if value == ABSENT:
        return "-"
    return str(value) if name in COUNTS else human(value)


def statistic_lines(answer: dict[str, Any]) -> list[str]:
    """Return a line for each statistic that the guest has sent."""
    known = [
        f"{name.removeprefix('stat-'):<18}{statistic(name, value):>14}"
        for name, value in answer["stats"].items()
        if value != ABSENT
    ]
    return known + [f"tag {each['tag']:<14}{each['value']:>14}" for each in answer["unknown"]]


def watch_header() -> str:
    """Return the names over the columns of a watch."""
    return "time      " + "".join(f"{name:>18}" for name in WATCHED)


def watch_line(answer: dict[str, Any]) -> str:
    """Return one line of a watch: when the guest answered, by the host's clock, and the columns."""
    moment = datetime.fromtimestamp(answer["last-update"]).astimezone().strftime("%H:%M:%S")
    values = (statistic(f"stat-{name}", answer["stats"][f"stat-{name}"]) for name in WATCHED)
    return f"{moment}  " + "".join(f"{value:>18}" for value in values)


def status_lines(status: dict[str, Any]) -> list[str]:
    """Return the device at a glance, a line for each thing that a person would ask."""
    if not status["connected"]:
        return ["no front end is connected: start QEMU"]
    lines = [
        "guest      " + ("its driver is up" if status["running"] else "its driver is not up, or it is paused")
    ]
    if "memory" in status:
        sizes = (human(status[name]) for name in ("memory", "target", "actual"))
        lines.append("memory     {}, target {}, actual {}".format(*sizes))
    lines.append(f"released   {human(status['released'])} so far")
    if status["inhibited"]:
        lines.append("inhibited  nothing is released until it is allowed again")
    if status["inert"]:
        lines.append(f"inert      nothing is released any more: {status['reason']}")
    if status["poison-value"]:
        lines.append(f"poison     {status['poison-value']:#x}: reported pages are kept")
    lines.append(f"negotiated {', '.join(status['negotiated']) or 'nothing'}")
    return lines


def guest_lines(guests: list[dict[str, Any]]) -> list[str]:
    """Return a line for each guest: its name, who serves it, and where its front end connects."""
    if not guests:
        return ["no guest is served: guest-add makes a place for one"]
    rows = [
        (guest["name"], _served(guest), guest.get("socket-path", "an inherited socket")) for guest in guests
    ]
    names, served = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{name:<{names}}  {by:<{served}}  {where}" for name, by, where in rows]


def _served(guest: dict[str, Any]) -> str:
    if not guest["connected"]:
        return "no front end"
    text = f"worker {guest['worker']}" if "worker" in guest else "between two workers"
    return text + (f", restarts: {guest['restarts']}" if guest["restarts"] else "")


def region_line(region: dict[str, Any]) -> str:
    """Return what the host holds of one region, and what was given back."""
    held = human(region["footprint"]) if "footprint" in region else "an unknown part"
    return (
        f"{region['guest-address']:#12x}  {human(region['size'])} of {region['backing']}, {held} held; "
        f"released {human(region['released-report'])} reported, {human(region['released-inflate'])} inflated; "
        f"{human(region['withheld'])} withheld (method {region['method']})"
    )


def ring_line(ring: dict[str, Any]) -> str:
    """Return where one ring stands."""
    if not ring["started"]:
        return f"{ring['index']}  not started"
    return (
        f"{ring['index']}  {ring.get('role', 'no role'):<15} size {ring['size']}, next {ring['next-available']}, "
        f"used {ring['used']}, {ring['outstanding']} in hand, {ring['chains']} chains returned"
        + ("" if ring["enabled"] else ", disabled")
    )


def estimate_line(answer: dict[str, Any]) -> str:
    """Return what a round of hinting has brought."""
    text = f"{human(answer['bytes'])} in {answer['blocks']} blocks, hinted in {answer['seconds']:.2f} s"
    if not answer["complete"]:
        text += "; at least that, for the guest did not come to its end in time"
    return text
