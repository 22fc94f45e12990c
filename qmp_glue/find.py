"""A QEMU that can front a vhost-user balloon: the user's, the system's, or one fetched into the cache.

Looked for in this order: the environment variable QEMU, ``qemu-system-x86_64`` on the PATH, a prefix fetched before, and,
where it may, Debian's trixie-backports unpacked without root (debian.py). Capability is probed, never concluded from a
version: the device has been in QEMU's source since 8.2 and could be created by a user only much later. Everything that
starts a QEMU calls find_qemu(); nothing here starts a machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from qmp_glue import debian
from qmp_glue.device_words import DRIVERS
from qmp_glue.errors import QemuNotFoundError
from qmp_glue.scratch import locked, scratch_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["AcceleratorChoice", "Qemu", "accelerator", "choose_accelerator", "find_qemu", "version_of"]

DEVICE = DRIVERS["pci"]
PROGRAM = "qemu-system-x86_64"
VARIABLE = "QEMU"
SUITE = "trixie-backports"
PACKAGE = "qemu-system-x86"
# Answering takes 0.03 s; a machine under load, a cold disk and an emulated build farm need their margin.
PROBE_SECONDS = 30.0


@dataclass(frozen=True)
class Qemu:
    """A capable QEMU: ``argv`` is how its command line begins, ``env`` what its environment needs beside our own."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    version: str = ""
    origin: Literal["environment", "system", "private"] = "system"


@dataclass(frozen=True)
class _Probe:
    """What a QEMU said of itself; ``problem`` is empty if it can front the device."""

    version: str
    problem: str


def find_qemu(*, fetch: bool = True, progress: Callable[[str], None] = lambda _line: None) -> Qemu:
    """Return a QEMU that has the device. Downloads about 40 MB of packages once if it must and ``fetch`` allows it.

    Raises QemuNotFoundError, and what debian.Archive raises when the download fails.
    """
    if named := os.environ.get(VARIABLE):
        return _from_environment(named)
    problems = []
    if path := shutil.which(PROGRAM):
        probe = _remembered_probe(Path(path))
        if not probe.problem:
            return Qemu((path,), version=probe.version, origin="system")
        problems.append(f"{path} {probe.problem}")
    else:
        problems.append(f"there is no {PROGRAM} on the PATH")
    home = debian.cache_root() / "qemu"
    if (found := _newest_prefix(home)) is not None:
        return found
    if not fetch:
        problems.append(f"none is in {home}, and fetching one was not allowed")
        raise _not_found(problems)
    try:
        return _fetch(home, progress)
    except (debian.AptMissingError, debian.MirrorMissingError, debian.KeyringMissingError) as error:
        raise _not_found([*problems, f"fetching Debian's was not possible: {error}"]) from error


def _not_found(problems: list[str]) -> QemuNotFoundError:
    reasons = "".join(f"\n  {problem}" for problem in problems)
    return QemuNotFoundError(
        f"no QEMU with the device {DEVICE}:{reasons}\n"
        f"install {PACKAGE} from Debian's {SUITE} or newer, or build QEMU 10.2 or newer and name it in {VARIABLE}"
    )


def _from_environment(named: str) -> Qemu:
    """Take the user's word for where, and the probe's for whether: a QEMU named explicitly is never passed over."""
    path = shutil.which(named)
    if path is None:
        raise QemuNotFoundError(f"{VARIABLE}={named} is no executable file: correct or unset {VARIABLE}")
    probe = _remembered_probe(Path(path))
    if probe.problem:
        raise QemuNotFoundError(f"{VARIABLE}={named} {probe.problem}: name another QEMU or unset {VARIABLE}")
    return Qemu((path,), version=probe.version, origin="environment")


def _probe(qemu: Qemu) -> _Probe:
    """Ask a QEMU for its version and its devices. A broken or hanging one has a problem, it raises nothing."""
    environment = os.environ | dict(qemu.env)
    try:
        version, devices = (
            subprocess.run(
                [*qemu.argv, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
                check=True,
            ).stdout
            for words in (["-version"], ["-machine", "none", "-device", "help"])
        )
    except subprocess.TimeoutExpired:
        return _Probe("", f"did not answer in {PROBE_SECONDS:.0f} s")
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return _Probe("", f"ended with status {error.returncode} ({last})")
    except OSError as error:
        return _Probe("", f"does not start ({error.strerror})")
    return _Probe(version_of(version), "" if f'name "{DEVICE}"' in devices else f"has no device {DEVICE}")


def version_of(output: str) -> str:
    """Return the version out of what ``-version`` prints, or the first line where that looks otherwise."""
    matched = re.search(r"version (\d+(?:\.\d+)+\S*)", output)
    return matched[1] if matched else output.strip().partition("\n")[0]


def _remembered_probe(path: Path) -> _Probe:
    """Probe a program once; what it said holds while the file's time of change and size do."""
    memory = debian.cache_root() / "probes.json"
    status = path.stat()
    key = f"{path.resolve()} {status.st_mtime_ns} {status.st_size}"
    known = _read_probes(memory)
    if key not in known:
        probe = _probe(Qemu((str(path),)))
        if "did not answer" in probe.problem:
            return probe  # the machine may have been busy: ask again the next time
        known[key] = {"version": probe.version, "problem": probe.problem}
        with scratch_directory(memory.parent, "probes") as scratch:
            (scratch / "new").write_text(json.dumps(known))
            (scratch / "new").replace(memory)
    return _Probe(known[key]["version"], known[key]["problem"])


def _read_probes(memory: Path) -> dict[str, dict[str, str]]:
    """Read what was remembered; a file that is damaged is as good as none."""
    try:
        known = json.loads(memory.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        key: said
        for key, said in known.items()
        if isinstance(said, dict) and {"version", "problem"} <= said.keys()
    }


def _private(prefix: Path, version: str) -> Qemu:
    """Describe an unpacked QEMU: its own loader and libraries, since the host's C library may be older."""
    libraries = prefix / "usr/lib/x86_64-linux-gnu"
    argv = (
        str(libraries / "ld-linux-x86-64.so.2"),
        "--library-path",
        str(libraries),
        str(prefix / "usr/bin" / PROGRAM),
        "-L",
        str(prefix / "usr/share/qemu"),
        "-L",
        str(prefix / "usr/share/seabios"),
    )
    return Qemu(argv, MappingProxyType({"QEMU_MODULE_DIR": str(libraries / "qemu")}), version, "private")


def _newest_prefix(home: Path) -> Qemu | None:
    """Return what was fetched last: a prefix is put in its place only after it has been verified."""
    wrappers = sorted(home.glob(f"[!.]*/{PROGRAM}"), key=lambda path: path.stat().st_mtime)
    return _private(wrappers[-1].parent, wrappers[-1].parent.name) if wrappers else None


def _fetch(home: Path, progress: Callable[[str], None]) -> Qemu:
    """Download, unpack, verify, and only then put in place; whoever comes second takes what the first made."""
    if ":" in str(home) or ";" in str(home):
        raise QemuNotFoundError(
            f"{home}: a loader's library path cannot hold ':' or ';': choose another XDG_CACHE_HOME"
        )
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / "lock"), scratch_directory(home, "unpack") as scratch:
        if (found := _newest_prefix(home)) is not None:
            return found
        packages = debian.Archive(SUITE, progress=progress).fetch(PACKAGE)
        progress(f"unpacking QEMU: {len(packages)} packages")
        debian.unpack(packages, scratch / "prefix")
        probe = _probe(_private(scratch / "prefix", ""))
        if probe.problem or not probe.version:
            raise QemuNotFoundError(
                f"the QEMU of Debian's {SUITE} {probe.problem or 'tells no version'}: name another in {VARIABLE}"
            )
        qemu = _private(home / probe.version, probe.version)
        _write_wrapper(scratch / "prefix" / PROGRAM, qemu)
        (scratch / "prefix").rename(home / probe.version)
    progress(f"QEMU {qemu.version} is at {home / probe.version / PROGRAM}")
    return qemu


def _write_wrapper(path: Path, qemu: Qemu) -> None:
    """Write the program that a person types by hand."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in qemu.env.items())
    path.write_text(f'#!/bin/sh\nexec env {settings} {shlex.join(qemu.argv)} "$@"\n')
    path.chmod(0o755)


@dataclass(frozen=True)
class AcceleratorChoice:
    """How QEMU should run the guest's instructions, and why."""

    name: Literal["kvm", "tcg"]
    reason: str


def choose_accelerator(
    cpuinfo: Path = Path("/proc/cpuinfo"), kvm: Path = Path("/dev/kvm")
) -> AcceleratorChoice:
    """Choose KVM only where it can run Linux: the device alone proves nothing, it exists in places without VMX or SVM."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    if flags is None or not {"vmx", "svm"} & set(flags[1].split()):
        return AcceleratorChoice(
            "tcg", f"{cpuinfo} shows neither vmx nor svm: this CPU gives no virtualization"
        )
    try:
        os.close(os.open(kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return AcceleratorChoice(
            "tcg", f"{kvm} does not open ({error.strerror}): join the group kvm to use it"
        )
    return AcceleratorChoice("kvm", f"{kvm} opens and the CPU has hardware virtualization")


def accelerator() -> Literal["kvm", "tcg"]:
    """Return the name of the accelerator for this machine; choose_accelerator() tells the reason as well."""
    return choose_accelerator().name
