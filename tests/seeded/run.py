"""Puts one seeded fault after another into a copy of the project and sees that its tests notice.

    scripts/seeded-faults [NAME ...] [--json FILE]

Exit status: 0 all were noticed, 1 one was not, 2 set-up (the tests do not pass without a fault, say).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.seeded.faults import FAULTS, Fault

ROOT = Path(__file__).parent.parent.parent
# Seconds for the tests of one fault: a fault may well make something hang.
DEADLINE = 300
EXIT_NOTICED, EXIT_MISSED, EXIT_SETUP = 0, 1, 2
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
# pytest's exit statuses: tests failed. Others say that it did not come to running them.
_TESTS_FAILED = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """noticed_by: the first test that failed; empty if none did."""

    fault: str
    what: str
    noticed_by: str
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(prog="seeded-faults", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="faults to try; all of them if none is named"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    if unknown := set(options.names) - {fault.name for fault in FAULTS}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))} (see --list)")
    if options.list:
        print("\n".join(f"{fault.name:28} {fault.what}" for fault in FAULTS))
        return EXIT_NOTICED
    verdicts = try_all(chosen)
    if verdicts is None:
        return EXIT_SETUP
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=2) + "\n")
    noticed = sum(bool(verdict.noticed_by) for verdict in verdicts)
    print(f"{noticed} of {len(verdicts)} noticed")
    return EXIT_NOTICED if noticed == len(verdicts) else EXIT_MISSED


def try_all(faults: Sequence[Fault]) -> list[Verdict] | None:
    """Try each fault. None if the tests fail as it is."""
    with tempfile.TemporaryDirectory(prefix="seeded-faults-") as folder:
        copy = Path(folder)
        _copy_to(copy)
        paths = sorted({path for fault in faults for path in fault.tests})
        print(f"without a fault: {len(paths)} files of tests")
        if failed := _first_failure(copy, paths):
            print(f"they do not pass as it is: {failed}", file=sys.stderr)
            return None
        return [_try(copy, fault) for fault in faults]


def _copy_to(folder: Path) -> None:
    """Copy what git knows of, as it is in the working tree."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def _try(copy: Path, fault: Fault) -> Verdict:
    started = time.monotonic()
    originals = {edit.file: (copy / "hostdev" / edit.file).read_text() for edit in fault.edits}
    texts = dict(originals)
    for edit in fault.edits:
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    try:
        for file, text in texts.items():
            (copy / "hostdev" / file).write_text(text)
        noticed_by = _first_failure(copy, fault.tests)
    finally:
        for file, text in originals.items():
            (copy / "hostdev" / file).write_text(text)
    verdict = Verdict(fault.name, fault.what, noticed_by, round(time.monotonic() - started, 1))
    print(f"{fault.name:28} {verdict.seconds:6.1f} s  {noticed_by or 'NOT NOTICED'}", flush=True)
    return verdict


def _first_failure(copy: Path, paths: Sequence[str]) -> str:
    """Run tests until one fails. Returns its name, nothing if all pass."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not guest and not full", *paths]
    try:
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=DEADLINE, check=False)
    except subprocess.TimeoutExpired:
        return f"no test: they did not end within {DEADLINE} s"
    if run.returncode == 0:
        return ""
    found = _FAILED.search(run.stdout)
    if run.returncode != _TESTS_FAILED or found is None:
        raise SystemExit(f"pytest could not run the tests:\n{run.stdout}{run.stderr}")
    return found[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
