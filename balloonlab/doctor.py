"""The commands balloonlab doctor and balloonlab env: what this machine can do, and where its parts are.

Looks and changes nothing; only "env" and "doctor --fetch" download. Each line that is not well has its fix.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from balloonlab.options import Commands, add_guest_options, guest_options
from balloonlab.progress import Progress
from balloonlab.setup import build_image
from hostdev import sandbox
from hostdev.errors import EXIT_PASS, EXIT_UNSUPPORTED
from qmp_glue import debian
from qmp_glue.errors import QmpGlueError
from qmp_glue.find import Qemu, choose_accelerator, find_qemu

SCHEMA = 1
_MARKS = {"ok": "ok  ", "note": "note", "missing": "MISS"}


@dataclass(frozen=True)
class Check:
    """One line. missing: without it nothing boots here; note: slower or less, but it works."""

    name: str
    status: Literal["ok", "note", "missing"]
    detail: str
    fix: str = ""


def add_parsers(commands: Commands) -> None:
    """Declare the commands."""
    parser = commands.add_parser("doctor", help="say what this machine can do, and how to mend what it can't")
    parser.add_argument(
        "--json", action="store_true", help="for programs; adds the exact command that runs the QEMU found"
    )
    parser.add_argument(
        "--fetch", action="store_true", help="fetch a QEMU that can front the device if there is none"
    )
    parser.set_defaults(run=run)
    env = commands.add_parser(
        "env", help="print QEMU, KERNEL and INITRD as shell assignments, for commands by hand"
    )
    add_guest_options(env)
    env.set_defaults(run=run_env)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Print the checks. Returns 0, or 3 if no guest can be booted here."""
    qemu, first = _qemu(fetch=options.fetch, progress=progress, quiet=options.json)
    checks = [
        _host(),
        first,
        _kvm(),
        _memfd(),
        _sandbox(),
        *_memory_settings(),
        _pressure(),
        _cgroup(),
        _apt(),
        _kernels(),
    ]
    if options.json:
        print(json.dumps(_document(checks, qemu), indent=2))  # noqa: T201
    else:
        for check in checks:
            progress.say(f"{_MARKS[check.status]}  {check.name}: {check.detail}")
            if check.fix:
                progress.say(f"      -> {check.fix}")
    return EXIT_UNSUPPORTED if any(check.status == "missing" for check in checks) else EXIT_PASS


def _document(checks: list[Check], qemu: Qemu | None) -> dict[str, Any]:
    document: dict[str, Any] = {"schema": SCHEMA, "checks": [asdict(check) for check in checks], "qemu": None}
    if qemu is not None:
        document["qemu"] = {
            "argv": list(qemu.argv),
            "env": dict(qemu.env),
            "version": qemu.version,
            "origin": qemu.origin,
        }
    return document


def _qemu(*, fetch: bool, progress: Progress, quiet: bool) -> tuple[Qemu | None, Check]:
    tell = (lambda _line: None) if quiet else progress.say
    try:
        qemu = find_qemu(fetch=fetch, progress=tell)
    except QmpGlueError as error:
        fix = "run scripts/demo, or balloonlab doctor --fetch, which unpacks Debian's into the cache without root"
        return None, Check("qemu", "missing", str(error).replace("\n", " "), fix)
    where = {"environment": "named by QEMU=", "system": "the system's", "private": "in the private cache"}
    return qemu, Check("qemu", "ok", f"{qemu.version}, {where[qemu.origin]}, can front the device")


def _host() -> Check:
    machine = platform.machine()
    if machine == "x86_64":
        return Check("host", "ok", f"Linux {platform.release()} on x86-64, {os.cpu_count()} CPUs")
    return Check("host", "missing", f"{machine}", "the device needs the store order of x86-64")


def _kvm() -> Check:
    choice = choose_accelerator()
    if choice.name == "kvm":
        return Check("kvm", "ok", choice.reason)
    return Check(
        "kvm", "note", f"not usable: {choice.reason}", "guests run under TCG, about ten times slower"
    )


def _memfd() -> Check:
    try:
        os.close(os.memfd_create("doctor", os.MFD_CLOEXEC))
    except OSError as error:
        return Check("memfd", "missing", f"memfd_create fails: {error.strerror}", "use Linux 3.17 or newer")
    return Check("memfd", "ok", "shared guest memory can be made")


def _sandbox() -> Check:
    lacks = sandbox.missing()
    if not lacks:
        return Check("sandbox", "ok", "seccomp filters and Landlock: the device confines its processes")
    return Check(
        "sandbox",
        "note",
        f"this kernel has {'; '.join(lacks)}",
        "use Linux 5.13 or newer with lsm=landlock,...",
    )


def _memory_settings() -> list[Check]:
    pages = _read("/proc/sys/vm/nr_hugepages")
    shmem = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = shmem.partition("[")[2].partition("]")[0] or "unknown"
    huge = Check("huge pages", "ok", f"{pages or 'unknown'} reserved; guests of the lab use none")
    if chosen in ("always", "advise", "within_size", "force"):
        return [huge, Check("shmem THP", "ok", f"{chosen}: giving 2 MiB back costs about 10 us")]
    detail = f"{chosen}: guest RAM is 4 KiB pages, giving 2 MiB back costs about 200 us"
    return [
        huge,
        Check("shmem THP", "note", detail, "for large guests: echo advise > .../shmem_enabled, as root"),
    ]


def _pressure() -> Check:
    if _read("/proc/pressure/memory"):
        return Check("psi", "ok", "/proc/pressure/memory can be read")
    return Check(
        "psi", "note", "/proc/pressure/memory is not there", "boot the host with psi=1 to measure stalls"
    )


def _cgroup() -> Check:
    controllers = _read("/sys/fs/cgroup/cgroup.controllers").split()
    if "memory" in controllers:
        return Check("cgroup", "ok", "version 2 with the memory controller")
    return Check(
        "cgroup", "note", "no version 2 memory controller here", "only experiments with memory limits need it"
    )


def _apt() -> Check:
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        return Check("apt", "ok", "Debian's packages can be fetched and unpacked without root")
    return Check(
        "apt",
        "note",
        "no apt-get and dpkg-deb: no guest can be built that is not cached, since its user space is Debian's",
        "install apt, dpkg and debian-archive-keyring, or run the device beside guests of your own",
    )


def _kernels() -> Check:
    records = sorted(path.stem for path in (debian.cache_root() / "guests").glob("*.json"))
    if records:
        return Check("guests", "ok", f"built and cached: {', '.join(records)}")
    return Check(
        "guests", "note", "none built yet", "the first run of a suite fetches its kernel, about 30 MB"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def run_env(options: argparse.Namespace, _progress: Progress) -> int:
    """Print where the parts are, fetching and building what is missing."""
    silent = lambda _line: None  # noqa: E731
    qemu = find_qemu(progress=silent)
    image = build_image(guest_options(options), silent)
    words = [f"{name}={value}" for name, value in qemu.env.items()]
    command = shlex.join(["env", *words, *qemu.argv] if words else qemu.argv)
    for name, value in (("QEMU", command), ("KERNEL", str(image.kernel)), ("INITRD", str(image.initrd))):
        print(f"{name}={shlex.quote(value)}")  # noqa: T201
    return EXIT_PASS
