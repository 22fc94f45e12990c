"""What each virtqueue is for: ring numbers -> roles, from what was negotiated and what was set up.

Pure. Used by balloon.py.
"""

from __future__ import annotations

from collections.abc import Collection

from hostdev.wire.balloon import Feature, Role


def ring_roles(features: int, configured: Collection[int]) -> dict[int, Role]:
    """Tell what each ring number is for.

    Linux (since 5.0, commit ddbeac07a39a) and QEMU number the rings densely over the negotiated features; virtio 1.3,
    5.5.2, fixes the numbers. Both agree while no optional ring is left out. Otherwise a ring that dense numbering does
    not have, being set up, shows that the driver follows the text. configured: the rings that got addresses.
    """
    present = [Role.INFLATE, Role.DEFLATE]
    for role, feature in (
        (Role.STATISTICS, Feature.STATS_VQ),
        (Role.FREE_PAGE_HINT, Feature.FREE_PAGE_HINT),
        (Role.REPORTING, Feature.REPORTING),
    ):
        if features & feature:
            present.append(role)
    if any(index >= len(present) for index in configured):
        return {int(role): role for role in present}
    return dict(enumerate(present))
