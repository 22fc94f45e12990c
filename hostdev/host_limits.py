"""What the keeper asks of the host for itself and its children: descriptors, and not to be the first to go.

Both are inherited by a fork, and both only asked for: where the host refuses, the device works all the same. Used by
launch.py.
"""

from __future__ import annotations

import logging
import resource
from pathlib import Path

log = logging.getLogger(__name__)

# A guest takes some 20 descriptors (a connection, a region or two, 10 eventfds, a channel, its record) and 60 at the most.
MAX_DESCRIPTORS = 1 << 16
# When memory runs out, killing a device of 10 MiB frees nothing and ends a VM. Not -1000, which would make a leak of ours
# somebody else's end. As dbus and udev have it.
OOM_SCORE_ADJUST = -900

_OOM_FILE = Path("/proc/self/oom_score_adj")


def protect() -> None:
    """Raise the limit of open descriptors as far as it may be, and ask for a protected OOM score."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        if int(_OOM_FILE.read_text()) > OOM_SCORE_ADJUST:
            _OOM_FILE.write_text(str(OOM_SCORE_ADJUST))
    except OSError as error:
        log.debug("no protection when memory runs out: %s", error.strerror)
