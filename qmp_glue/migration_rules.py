"""Which migration forbids giving memory back, and which only will: part of inspect.py's rules.

Pure. One machine has one migration at a time, so it gets one finding, the most telling one. Sources: QEMU's
virtio_balloon_inhibited() (incoming postcopy, background snapshot), migration/rdma.c and COLO's
ram_block_discard_disable(); and of our own any other migration, whose reader must not meet holes that the guest has
filled again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from qmp_glue.machine_setup import Setup

__all__ = ["migration_rule"]

Found: TypeAlias = tuple[Literal["error", "warning"], str, str]

_REASONS = {
    "postcopy": "postcopy keeps account of each page that has not come yet, and a hole looks like one",
    "background-snapshot": "a background snapshot saves each page before it changes, and a hole is no write that it sees",
    "colo": "COLO compares the memory of two machines",
    "rdma": "RDMA pins guest memory for the network",
    "migration": "a migration reads guest memory while it changes",
}
# Rule: the capability that makes it one of this kind. The first that holds is told.
_CAPABILITIES = {
    "rdma": "rdma-pin-all",
    "postcopy": "postcopy-ram",
    "background-snapshot": "background-snapshot",
    "colo": "colo",
}


def migration_rule(setup: Setup) -> Found | None:
    """Return the finding's severity, rule and message; None where no migration is under way or prepared."""
    if setup.migration or setup.incoming:
        rule = _rule_of_active(setup)
        state = f"is in state {setup.migration}" if setup.migration else "is awaited (-incoming)"
        message = f"a migration {state}; {_REASONS[rule]}: add the balloon when it is over, or cancel it"
        return "error", rule, message
    prepared = next((rule for rule, name in _CAPABILITIES.items() if name in setup.capabilities), None)
    if prepared is None:
        return None
    capability = _CAPABILITIES[prepared]
    message = (
        f"the migration capability {capability} is on, and while such a migration runs nothing may be given back "
        f"({_REASONS[prepared]}): turn it off, or inhibit the device for that time"
    )
    return "warning", prepared, message


def _rule_of_active(setup: Setup) -> str:
    if setup.incoming.startswith("rdma") or '"rdma"' in setup.incoming:
        return "rdma"
    for kind in ("postcopy", "colo"):
        if setup.migration.startswith(kind):
            return kind
    return next((rule for rule, name in _CAPABILITIES.items() if name in setup.capabilities), "migration")
