"""Debian packages without root: a private apt beside the system's, one for each suite.

apt itself resolves, downloads and verifies (signatures by Debian's archive keyring, then hashes); this module only gives
it a state directory, an empty dpkg status and a sources list of its own, and unpacks what came. The mirror's address is
the machine's own. Nothing of the system is changed and no maintainer script ever runs, so what is unpacked is files,
not an installed system. find.py gets QEMU through it, guest_images kernels, and scripts/demo runs it as a program:

    python3 -m qmp_glue.debian unpack --suite trixie --into DIR NAME...

Standard library only, Python 3.11: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from qmp_glue import apt_sources
from qmp_glue.errors import (
    AptMissingError,
    CacheError,
    DebianError,
    DownloadError,
    KeyringMissingError,
    MirrorMissingError,
    QmpGlueError,
    ResolutionError,
    SignatureError,
    UnpackError,
)
from qmp_glue.packages import LOCAL_SECONDS, Package, run_tool, unpack
from qmp_glue.scratch import locked, scratch_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "SUITES",
    "AptMissingError",
    "Archive",
    "CacheError",
    "DebianError",
    "DownloadError",
    "KeyringMissingError",
    "MirrorMissingError",
    "Package",
    "ResolutionError",
    "SignatureError",
    "UnpackError",
    "cache_root",
    "find_mirror",
    "main",
    "unpack",
]

# A backports suite is no distribution of its own: it needs its base beside it.
SUITES: dict[str, tuple[str, ...]] = {
    "bookworm": ("bookworm",),
    "bookworm-backports": ("bookworm", "bookworm-backports"),
    "trixie": ("trixie",),
    "trixie-backports": ("trixie", "trixie-backports"),
    "forky": ("forky",),
}

# Both names under which the package debian-archive-keyring has installed all archive keys in one file.
KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
MIRROR_VARIABLE = "DEBIAN_MIRROR"
FRESH_SECONDS = 24 * 3600  # Debian keeps superseded files on its mirrors for longer than a day.
UPDATE_SECONDS = 600.0  # 10 MB of lists at 20 kB/s, the slowest line worth waiting for.
DOWNLOAD_SECONDS = 3600.0  # 60 MB at the same pace.


def cache_root() -> Path:
    """Return ``${XDG_CACHE_HOME:-~/.cache}/vhost-user-balloon``, made with mode 0700 if it is not there.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification asks. Raises CacheError.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        root = (named if named.is_absolute() else Path.home() / ".cache") / "vhost-user-balloon"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    except (OSError, RuntimeError) as error:  # RuntimeError: neither HOME nor the user database names a home
        raise CacheError(
            f"no cache directory: {error}; name one that you can write to in the environment variable XDG_CACHE_HOME"
        ) from error
    return root


def find_mirror() -> str:
    """Return the address of the Debian mirror that this machine's apt uses, or that the environment names.

    Raises AptMissingError and MirrorMissingError.
    """
    if named := os.environ.get(MIRROR_VARIABLE):
        return named
    mirror = apt_sources.choose_mirror(_configured_sources())
    if mirror is None:
        raise MirrorMissingError(
            "no Debian mirror in this machine's apt sources: add one to /etc/apt/sources.list.d, "
            f"or put the address of one into the environment variable {MIRROR_VARIABLE}"
        )
    return mirror


def _configured_sources() -> Iterator[apt_sources.Source]:
    """Read the files apt would read: Dir::Etc::sourcelist, then *.list and *.sources of Dir::Etc::sourceparts by name."""
    shell = run_tool(
        ["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"]
    )
    found = dict(re.findall(r"^(\w+)='(.*)'$", shell.stdout, re.MULTILINE))
    files = [Path(found["LIST"])] if "LIST" in found else []
    if "PARTS" in found and (parts := Path(found["PARTS"])).is_dir():
        files += sorted(path for path in parts.iterdir() if path.suffix in {".list", ".sources"})
    for path in files:
        if path.is_file():
            parse = apt_sources.parse_deb822 if path.suffix == ".sources" else apt_sources.parse_one_line
            yield from parse(path.read_text("utf-8", errors="replace"))


class Archive:
    """A private apt state (lists, cache, status, sources) for one suite, under ``cache_root()/apt/<suite>``.

    Processes may share it: each operation holds a lock file of the suite. ``progress`` is told in one line what takes
    long. Every method raises DebianError's children, and LockTimeoutError.
    """

    def __init__(
        self, suite: str, *, cache: Path | None = None, progress: Callable[[str], None] = lambda _line: None
    ) -> None:
        if suite not in SUITES:
            raise ResolutionError(f"no suite {suite!r}: choose one of {', '.join(SUITES)}")
        root = cache if cache is not None else cache_root()
        self.suite = suite
        self._progress = progress
        self._home = root / "apt" / suite
        self._debs = root / "debs"
        self._updated = False
        self._lock_fd = -1

    def update(self, *, force: bool = False) -> None:
        """Fetch and verify the suite's lists: at most once an instance, and not while they are fresh, unless forced."""
        with self._locked():
            self._update(force=force)

    def closure(self, *names: str) -> list[tuple[str, str]]:
        """Return (name, version) of what ``apt-get install`` would take on an empty system, without recommendations."""
        with self._locked():
            self._update(force=False)
            return self._closure(names)

    def download(self, packages: Iterable[tuple[str, str]]) -> list[Package]:
        """Fetch these packages unless they are in the cache; apt verifies each. Whole files or none come to lie there."""
        with self._locked():
            self._update(force=False)
            return self._download(list(packages))

    def fetch(self, *names: str) -> list[Package]:
        """Resolve and download; where the mirror has moved on since the lists came, once more with new lists."""
        wanted = self.closure(*names)
        try:
            return self.download(wanted)
        except SignatureError:
            raise
        except DownloadError:
            self.update(force=True)
            return self.download(self.closure(*names))

    def _update(self, *, force: bool) -> None:
        """Update under the lock. The stamp is written last, so that first lists which came half do not count.

        Where nothing newer can be had, older lists still do: apt keeps them as they were verified, and what is in the
        cache goes on working without a network.
        """
        stamp = self._home / "updated"
        age = _age_seconds(stamp)
        if not force and (self._updated or age < FRESH_SECONDS):
            return
        self._write_configuration()
        self._progress(f"apt: fetching the package lists of {self.suite}")
        try:
            self._apt_get("update", seconds=UPDATE_SECONDS, failure=DownloadError)
        except SignatureError:
            raise
        except DownloadError:
            if force or not stamp.exists():
                raise
            self._progress(f"apt: they could not be had, so those of {age / 3600:.0f} hours ago are used")
        else:
            stamp.touch()
        self._updated = True

    def _closure(self, names: Sequence[str]) -> list[tuple[str, str]]:
        done = self._apt_get(
            "install",
            "--simulate",
            "-t",
            self.suite,
            "--",
            *names,
            seconds=LOCAL_SECONDS,
            failure=ResolutionError,
        )
        return re.findall(r"^Inst (\S+) \((\S+) ", done.stdout, re.MULTILINE)

    def _download(self, packages: Sequence[tuple[str, str]]) -> list[Package]:
        self._debs.mkdir(parents=True, exist_ok=True)
        missing = [pair for pair in packages if self._cached(*pair) is None]
        if missing:
            self._progress(f"apt: downloading {len(missing)} packages of {self.suite}")
            with scratch_directory(self._debs, "download") as scratch:
                wanted = [f"{name}={version}" for name, version in missing]
                self._apt_get(
                    "download", "--", *wanted, seconds=DOWNLOAD_SECONDS, failure=DownloadError, cwd=scratch
                )
                for deb in scratch.glob("*.deb"):
                    deb.replace(self._debs / deb.name)
        return [self._required(name, version) for name, version in packages]

    def _cached(self, name: str, version: str) -> Path | None:
        """Find NAME_VERSION_ARCH.deb as apt names it: the colon of an epoch is written %3a."""
        quoted = urllib.parse.quote(version, safe="+~.-").replace("%3A", "%3a")
        return next(
            (
                path
                for arch in ("amd64", "all")
                if (path := self._debs / f"{name}_{quoted}_{arch}.deb").is_file()
            ),
            None,
        )

    def _required(self, name: str, version: str) -> Package:
        deb = self._cached(name, version)
        if deb is None:
            raise DownloadError(
                f"apt-get download left no file for {name} {version} in {self._debs}: try again"
            )
        return Package(name, version, deb)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the suite's lock. apt inherits it: where this process is killed, the lock is held while apt still works."""
        self._home.mkdir(parents=True, exist_ok=True)
        with locked(self._home / "lock") as self._lock_fd:
            yield

    def _write_configuration(self) -> None:
        """Lay out the state directory. A '-' for sources would name a file; a directory that stays empty is exact."""
        for directory in ("lists/partial", "cache/archives/partial", "empty"):
            (self._home / directory).mkdir(parents=True, exist_ok=True)
        (self._home / "status").write_text("")
        mirror, keyring = find_mirror(), _keyring()
        lines = [
            f"deb [arch=amd64 signed-by={keyring}] {mirror} {suite} main\n" for suite in SUITES[self.suite]
        ]
        (self._home / "sources.list").write_text("".join(lines))

    def _settings(self) -> dict[str, str]:
        """Given as -o, which overrides all files; the machine's own proxies, credentials and CA settings stay in force."""
        return {
            "Dir::State": f"{self._home}",
            "Dir::State::Lists": f"{self._home}/lists",
            "Dir::State::status": f"{self._home}/status",
            "Dir::Cache": f"{self._home}/cache",
            "Dir::Cache::archives": f"{self._home}/cache/archives",
            "Dir::Etc::sourcelist": f"{self._home}/sources.list",
            "Dir::Etc::sourceparts": f"{self._home}/empty",
            "Dir::Etc::preferences": f"{self._home}/empty/preferences",
            "Dir::Etc::preferencesparts": f"{self._home}/empty",
            "APT::Architecture": "amd64",
            "APT::Default-Release": "",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",  # none: as an ordinary user there is nobody to change to
            "APT::Update::Error-Mode": "any",  # without it a list that did not come is only a warning
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            "Debug::NoLocking": "true",  # ours is the lock
        }

    def _apt_get(
        self, *words: str, seconds: float, failure: type[DebianError], cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        options = [word for key, value in self._settings().items() for word in ("-o", f"{key}={value}")]
        # apt leaves its temporary files where it is interrupted.
        with scratch_directory(self._home, "tmp") as temporary:
            done = run_tool(
                ["apt-get", "-q", *options, *words],
                seconds=seconds,
                cwd=cwd,
                pass_fds=[self._lock_fd],
                variables={"TMPDIR": str(temporary)},
            )
        if done.returncode != 0:
            raise _apt_failure(done.stderr, self.suite, failure)
        return done


def _apt_failure(stderr: str, suite: str, failure: type[DebianError]) -> DebianError:
    """Translate apt's complaint, keeping its own words: the reader may know them."""
    said = [line for line in stderr.splitlines() if line.startswith(("E:", "W:"))] or stderr.splitlines()[-3:]
    words = "\n  ".join(said[:6])
    if failure is ResolutionError:
        return ResolutionError(f"apt cannot take these packages from {suite}: check the names\n  {words}")
    if re.search(r"NO_PUBKEY|not signed|signature|GPG error|Hash Sum mismatch", stderr, re.IGNORECASE):
        return SignatureError(
            f"apt does not trust what the mirror sent for {suite}: upgrade the package debian-archive-keyring, "
            f"check the clock, or choose another mirror with {MIRROR_VARIABLE}\n  {words}"
        )
    return failure(
        f"apt could not download from {suite}: check the network and apt's proxy settings, "
        f"or choose another mirror with {MIRROR_VARIABLE}\n  {words}"
    )


def _keyring() -> Path:
    """Return the file that holds all of Debian's archive keys."""
    for path in KEYRINGS:
        if path.is_file():
            return path
    raise KeyringMissingError(
        f"{KEYRINGS[0]} is missing: run 'apt-get install debian-archive-keyring' as root"
    )


def _age_seconds(path: Path) -> float:
    """Return how long ago the file was touched; infinity where there is none, or it claims to be from the future."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    return age if age >= 0 else float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is its exit code: 0, 2 for usage and set-up, 3 where this machine cannot, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python3 -m qmp_glue.debian", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("unpack", help="download packages with all they depend on, and unpack them")
    command.add_argument("--suite", choices=SUITES, required=True)
    command.add_argument(
        "--into", type=Path, required=True, metavar="DIR", help="a directory that is not there yet"
    )
    command.add_argument("names", nargs="+", metavar="NAME", help="binary packages")
    chosen = parser.parse_args(arguments)
    try:
        archive = Archive(chosen.suite, progress=lambda line: print(line, file=sys.stderr))  # noqa: T201
        unpack(archive.fetch(*chosen.names), chosen.into)
    except QmpGlueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what came whole is kept", file=sys.stderr)  # noqa: T201
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
