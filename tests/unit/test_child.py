"""Forked processes: what the collector passes over in parent and child."""

from __future__ import annotations

import gc

from hostdev.child import Child


def test_a_fork_freezes_the_childs_heap_alone() -> None:
    """What the parent froze at each fork it would never collect."""
    before = gc.get_freeze_count()
    child = Child("child", lambda: 0 if gc.get_freeze_count() > before else 1)
    assert child.reap()
    assert gc.get_freeze_count() == before
