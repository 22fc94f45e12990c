"""The object tree that clients see: what of QEMU's a script needs to find the balloon where it would find QEMU's.

Only what qom-list answers; the properties' values are the device's (qom-get and qom-set go to the worker). Used by
control.py.
"""

from __future__ import annotations

from hostdev.errors import CommandError

_CONTAINER = "child<container>"

_TREE: dict[str, dict[str, str]] = {
    "/": {"machine": _CONTAINER},
    "/machine": {"peripheral": _CONTAINER},
    "/machine/peripheral": {"balloon0": "child<virtio-balloon>"},
    "/machine/peripheral/balloon0": {
        "type": "string",
        "guest-stats": "guest statistics",
        "guest-stats-polling-interval": "int",
    },
}


def qom_list(path: str) -> list[dict[str, str]]:
    """Answer qom-list. path: absolute, or partial ("balloon0") as QEMU allows. Raises CommandError if there is none."""
    if not path:
        raise CommandError("Path '' is ambiguous")
    steps = [step for step in path.split("/") if step]
    for node, members in _TREE.items():
        known = [step for step in node.split("/") if step]
        partial = bool(steps) and not path.startswith("/") and known[-len(steps) :] == steps
        if known == steps or partial:
            return [{"name": name, "type": kind} for name, kind in members.items()]
    raise CommandError(f"Device '{path}' not found", "DeviceNotFound")
