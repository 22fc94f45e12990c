"""The command vhost-user-balloon: the part of it that must answer at once.

QEMU's docs/interop/vhost-user.rst, "Backend program conventions": --print-capabilities is asked at each start of a VM,
answers whatever else is on the command line, and exits with 0. So it is looked for before anything is parsed or
imported; everything else is launch.py's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

CAPABILITIES = {
    "type": "balloon",
    "features": [
        "inflate",
        "stats",
        "free-page-hint",
        "free-page-reporting",
        "page-poison",
        "deflate-on-oom",
        "must-tell-host",
        "discard",
        "hugetlb-release",
        "metrics-file",
        "trace",
        "control",
        "upgrade",
        "sandbox",
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 ended as asked, 1 failed, 2 usage or set-up, 3 unsupported host."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--print-capabilities" in arguments:
        print(json.dumps(CAPABILITIES, indent=2))  # noqa: T201  (this is the answer)
        return 0
    from hostdev import launch  # noqa: PLC0415  (costs 60 ms, which --print-capabilities must not pay)

    return launch.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
