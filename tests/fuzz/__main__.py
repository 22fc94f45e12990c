"""The command behind scripts/fuzz: fuzz a target or all of them, replay inputs, keep what covers more.

Exit status: 0 nothing was found, 1 something was, 2 usage, 3 atheris is not installed, 130 and 143 ended by a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, EXIT_UNSUPPORTED, EXIT_USAGE
from tests.fuzz import campaign, distil, targets
from tests.fuzz.campaign import Job, Outcome

AT_ONCE = 2
DEFAULT_SECONDS = 60
_SIGNALLED = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)
    if options.target is None:
        for name in targets.NAMES:
            print(f"{name:<12}{targets.summary(name)}")
        return EXIT_PASS
    names = targets.NAMES if options.target == "all" else (options.target,)
    if options.replay:
        return _replay(names, options.replay)
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed: .venv/bin/pip install 'atheris>=3,<4'", file=sys.stderr)
        return EXIT_UNSUPPORTED
    try:
        return _fuzz(names, options)
    except KeyboardInterrupt:
        print("fuzz: interrupted, everything that was started has ended", file=sys.stderr)
        return _SIGNALLED + signal.SIGINT
    except OSError as error:
        print(f"fuzz: {error}: name files and folders that can be written", file=sys.stderr)
        return EXIT_USAGE


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(_SIGNALLED + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Fuzz the device; without a target, list them."
    )
    parser.add_argument("target", nargs="?", choices=(*targets.NAMES, "all"), metavar="TARGET")
    parser.add_argument(
        "--time",
        type=positive_number,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="for all together, default 60",
    )
    parser.add_argument(
        "--seed", type=positive_number, default=None, help="of libFuzzer's choices, default another each time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where corpora grow, default in the user's cache"
    )
    parser.add_argument(
        "--keep", action="store_true", help="put what covers more into the repository's corpus"
    )
    parser.add_argument(
        "--replay", type=Path, nargs="+", metavar="FILE", help="run these inputs, without atheris"
    )
    return parser


def positive_number(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError("a whole number above 0 is needed")
    return number


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vhost-user-balloon" / "fuzz"


def _fuzz(names: Sequence[str], options: argparse.Namespace) -> int:
    work = (options.work or _cache()).absolute()
    turns = -(-len(names) // AT_ONCE)
    seconds = max(1, options.time // turns)
    seed = options.seed or time.time_ns() % (1 << 31)
    jobs = [Job(name, seconds, work / name, seed) for name in names]
    outcomes = []
    for outcome in campaign.fuzz(jobs, at_once=AT_ONCE):
        _tell(outcome)
        outcomes.append(outcome)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"seed": seed, "targets": [_plain(each) for each in outcomes]}, indent=2)
        )
    if options.keep:
        for job in jobs:
            _keep(job)
    return EXIT_PASS if all(each.is_well for each in outcomes) else EXIT_CHECK_FAILED


def _tell(outcome: Outcome) -> None:
    print(
        f"{outcome.target}: {outcome.executions} executions in {outcome.seconds:.0f} s, {outcome.edges} edges, "
        f"{outcome.features} features, corpus {outcome.corpus_files} files of {outcome.corpus_bytes} bytes, "
        f"{len(outcome.findings) or 'no'} findings",
        flush=True,
    )
    if not outcome.is_well:
        print(outcome.text)
    for file in outcome.findings:
        print(f"{file}: replay it with: {_command(outcome, file)}", flush=True)


def _command(outcome: Outcome, file: Path) -> str:
    return f"scripts/fuzz {outcome.target} --replay {file}"


def _plain(outcome: Outcome) -> dict[str, object]:
    return {
        "target": outcome.target,
        "seconds": outcome.seconds,
        "executions": outcome.executions,
        "edges": outcome.edges,
        "features": outcome.features,
        "corpus_files": outcome.corpus_files,
        "corpus_bytes": outcome.corpus_bytes,
        "status": outcome.status,
        "text": "" if outcome.is_well else outcome.text,
        "findings": [{"file": str(file), "replay": _command(outcome, file)} for file in outcome.findings],
    }


def _keep(job: Job) -> None:
    """Choose anew of what the repository has and what this machine has come to."""
    files = [*campaign.files(campaign.corpus(job.target)), *campaign.files(job.folder / "corpus")]
    contents = sorted({file.read_bytes() for file in files}, key=lambda data: (len(data), data))
    check = targets.load(job.target)
    with targets.silence():
        covered = {data: distil.steps(check, data) for data in contents}
    chosen = distil.choose(covered)
    distil.replace(campaign.corpus(job.target), chosen)
    every = len(frozenset().union(*covered.values()))
    kept = len(frozenset().union(*(covered[data] for data in chosen)))
    print(
        f"{job.target}: {len(chosen)} of {len(contents)} inputs are kept, with {kept} of {every} steps of the code"
    )


def _replay(names: Sequence[str], files: Sequence[Path]) -> int:
    status = EXIT_PASS
    for name in names:
        check = targets.load(name)
        for file in files:
            try:
                data = file.read_bytes()
            except OSError as error:
                print(f"fuzz: {file}: {error.strerror}: name a file with an input", file=sys.stderr)
                return EXIT_USAGE
            status = max(status, _replay_one(name, check, file, data))
    return status


def _replay_one(name: str, check: targets.Check, file: Path, data: bytes) -> int:
    try:
        with targets.silence():
            check(data)
    except Exception:  # noqa: BLE001  (whatever is raised is what was looked for)
        print(f"{name}: {file}: a finding\n{traceback.format_exc()}")
        return EXIT_CHECK_FAILED
    print(f"{name}: {file}: no finding")
    return EXIT_PASS


if __name__ == "__main__":
    sys.exit(main())
