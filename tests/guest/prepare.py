"""Fetch QEMU and build the guests that the tests boot, saying so: the first time that is most of the wait.

scripts/test runs it, so that no test's time-out covers a download; with --full for what only the long tier needs.
"""

from __future__ import annotations

import sys

from guest_images.build import build_guest
from guest_images.errors import GuestError
from guest_images.kernel import CLOUD, GENERIC
from qmp_glue.errors import QmpGlueError
from qmp_glue.find import find_qemu

SUITES = ("bookworm", "bookworm-backports", "trixie-backports")
ALL_SUITES = (*SUITES, "forky")
# Whose amd64 kernels are booted as well, to poison pages: 70 to 110 MB each.
POISONING_SUITES = ALL_SUITES


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, or that of what could not be had."""
    wanted = [(suite, CLOUD) for suite in ALL_SUITES]
    if "--full" in arguments:
        wanted += [("trixie", CLOUD), *((suite, GENERIC) for suite in POISONING_SUITES)]
    try:
        qemu = find_qemu(progress=print)
        print(f"QEMU {qemu.version} ({qemu.origin})")
        for suite, flavour in wanted:
            image = build_guest(suite, flavour=flavour, progress=print)
            print(f"{suite}: Linux {image.kernel_version}")
    except (QmpGlueError, GuestError) as error:
        print(f"guest tests cannot run: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
