"""What a run must show to pass, in figures. Pure: demo_run.py makes the runs, demo.py shows the verdict."""

from __future__ import annotations

from balloonlab.results import Result
from balloonlab.sizes import human

# The promise: this share of what the guest's MemFree regained has left the footprint.
RETURNED_SHARE = 0.95
# And a device that frees nothing stays within this share of its peak.
STAYED_SHARE = 0.05
# On the shared memory that guests here have.
FREEING_NOTHING = ("dontneed", "none")


def judge(result: Result) -> list[str]:
    """Return what did not go as it should, in words; nothing if the run showed what it was to show.

    A device that is to free must bring RETURNED_SHARE of what the guest's MemFree regained back to the host, less what
    became free in blocks that the guest does not report; one that is not to free (dontneed on shared memory, none) must leave the footprint within STAYED_SHARE of its peak.
    """
    if "REPORTING" not in result.device.negotiated_features:
        accepted = ", ".join(result.device.negotiated_features) or "nothing"
        text = (
            f"the guest does not report free pages, so nothing comes back: its driver accepted {accepted}. A kernel that "
            "initialises or poisons freed pages reports only if PAGE_POISON is offered."
        )
        return [text]
    if result.device.discard in FREEING_NOTHING:
        moved = abs(result.peak_bytes - result.residual_bytes)
        if moved > STAYED_SHARE * result.peak_bytes:
            return [
                f"{human(moved)} left the footprint although --discard {result.device.discard} frees nothing"
            ]
        return []
    guest = result.guest
    wanted = RETURNED_SHARE * (guest.memfree_regained_bytes - max(0, guest.small_blocks_bytes))
    if result.returned_bytes < wanted or guest.memfree_regained_bytes <= 0:
        return [f"only {human(result.returned_bytes)} came back, at least {human(wanted)} should have"]
    return []
