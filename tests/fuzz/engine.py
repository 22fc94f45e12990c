"""One process of the fuzzer: libFuzzer, through atheris, on one target. Not for people: campaign.py starts it.

    python -m tests.fuzz.engine TARGET [libFuzzer's arguments]

Nothing of the device is imported before it is instrumented, so this module imports nothing that imports it.
"""

from __future__ import annotations

import logging
import sys

from tests.fuzz import targets

INSTRUMENTED = ("hostdev", "balloonlab")


def main() -> None:
    """Instrument the device, and fuzz. Does not return: libFuzzer ends the process."""
    import atheris  # noqa: PLC0415  (not installed everywhere: campaign.py asks first)

    logging.disable(logging.CRITICAL)
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        check = targets.load(name)
    atheris.Setup([name, *arguments], check, enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
