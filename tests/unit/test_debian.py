"""The private apt: which mirror it takes from the machine, and that every way it can fail names its fix.

Repositories here are directories on this machine (file:), so that nothing depends on a network.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from qmp_glue import debian, scratch
from qmp_glue.apt_sources import Source, choose_mirror, parse_deb822, parse_one_line
from qmp_glue.errors import LockTimeoutError

DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)
    return tmp_path / "cache" / "vhost-user-balloon"


def need(program: str) -> None:
    if shutil.which(program) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{program} is missing: run these tests on Debian")
        pytest.skip(f"{program} is missing: this is no Debian")


def test_one_line_format() -> None:
    text = """
    # deb http://commented.example/debian bookworm main
    deb-src http://source.example/debian bookworm main
    deb http://plain.example/debian bookworm main contrib # why
    deb [arch=amd64 signed-by=/k.gpg] https://options.example/debian trixie main
    deb cdrom:[Debian_12]/ bookworm main
    """
    assert list(parse_one_line(text)) == [
        Source("http://plain.example/debian", ("bookworm",), ("main", "contrib")),
        Source("https://options.example/debian", ("trixie",), ("main",), "/k.gpg"),
    ]


def test_deb822_format() -> None:
    text = f"""\
Types: deb deb-src
# URIs: http://commented.example/debian
URIs: mirror+file:/etc/apt/mirrors/debian.list
  http://second.example/debian
Suites: trixie trixie-updates
Components: main
Signed-By: {DEBIAN_KEYRING}

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: trixie
Components: main

types: deb-src
uris: http://source.example/debian
suites: trixie
components: main
"""
    suites = ("trixie", "trixie-updates")
    assert list(parse_deb822(text)) == [
        Source("mirror+file:/etc/apt/mirrors/debian.list", suites, ("main",), DEBIAN_KEYRING),
        Source("http://second.example/debian", suites, ("main",), DEBIAN_KEYRING),
    ]


def test_embedded_key_is_one_field() -> None:
    text = (
        "Types: deb\nURIs: http://key.example/debian\nSuites: sid\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n URIs: not-a-field\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )
    (source,) = parse_deb822(text)
    assert source.uri == "http://key.example/debian"
    assert source.serves_debian()


@pytest.mark.parametrize(
    ("source", "serves"),
    [
        (Source("http://deb.example/debian", ("bookworm",), ("main",)), True),
        (Source("http://deb.example/debian/", ("stable",), ("contrib", "main")), True),
        (Source("mirror+file:/etc/apt/mirrors/debian.list", ("trixie",), ("main",)), True),
        (Source("http://snapshot.example/archive/debian/2025", ("trixie",), ("main",), DEBIAN_KEYRING), True),
        (
            Source("http://deb.example/debian-security", ("bookworm-security",), ("main",), DEBIAN_KEYRING),
            False,
        ),
        (Source("https://node.example/node_20.x", ("nodistro",), ("main",)), False),
        (Source("https://docker.example/linux/debian", ("bookworm",), ("stable",)), False),
        (Source("https://grafana.example/", ("stable",), ("main",)), False),
        (
            Source("https://other.example/debian", ("bookworm",), ("main",), "/usr/share/keyrings/other.gpg"),
            False,
        ),
        (Source("http://deb.example/debian", ("bookworm",), ("non-free-firmware",)), False),
    ],
)
def test_which_sources_serve_debian(source: Source, serves: bool) -> None:
    assert source.serves_debian() is serves


def test_entry_with_debians_keyring_goes_first() -> None:
    plain = Source("http://a.example/debian", ("bookworm",), ("main",))
    signed = Source("http://b.example/debian", ("bookworm",), ("main",), DEBIAN_KEYRING)
    assert choose_mirror([plain, signed]) == signed.uri
    assert choose_mirror([plain]) == plain.uri
    assert choose_mirror([]) is None


def apt_configuration(directory: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Make apt look at these sources instead of the machine's."""
    parts = directory / "parts"
    parts.mkdir()
    for name, text in files.items():
        (parts / name.replace("_", ".")).write_text(text)
    (directory / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{directory}/none.list";\nDir::Etc::sourceparts "{parts}";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(directory / "apt.conf"))


def test_mirror_is_read_where_apt_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("apt-config")
    apt_configuration(
        tmp_path,
        monkeypatch,
        a_list="deb https://docker.example/linux/debian bookworm stable\n",
        b_sources="Types: deb\nURIs: mirror+file:/m\nSuites: trixie\nComponents: main\n",
        c_disabled="deb http://disabled.example/debian bookworm main\n",
    )
    assert debian.find_mirror() == "mirror+file:/m"


def test_no_mirror_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("apt-config")
    apt_configuration(tmp_path, monkeypatch)
    with pytest.raises(debian.MirrorMissingError, match=debian.MIRROR_VARIABLE) as caught:
        debian.Archive("trixie").update()
    assert caught.value.exit_code == 3


def test_named_mirror_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "file:/mirror")
    assert debian.find_mirror() == "file:/mirror"


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(debian.AptMissingError, match="install the packages apt and dpkg") as caught:
        debian.Archive("trixie").closure("hello")
    assert caught.value.exit_code == 3


def test_without_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.MIRROR_VARIABLE, f"file:{tmp_path}")
    monkeypatch.setattr(debian, "KEYRINGS", (tmp_path / "none.gpg",))
    with pytest.raises(debian.KeyringMissingError, match="apt-get install debian-archive-keyring"):
        debian.Archive("trixie").update()


def test_unknown_suite() -> None:
    with pytest.raises(debian.ResolutionError, match="trixie-backports"):
        debian.Archive("warty")


def test_unreachable_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    need("apt-get")
    monkeypatch.setenv(debian.MIRROR_VARIABLE, f"file:{tmp_path}/nothing")
    with pytest.raises(debian.DownloadError, match="check the network") as caught:
        debian.Archive("trixie").update()
    assert not isinstance(caught.value, debian.SignatureError)
    assert not (own_cache / "apt" / "trixie" / "updated").exists()


def test_refused_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """apt itself calls this a warning, and would go on with no lists at all."""
    need("apt-get")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv(debian.MIRROR_VARIABLE, f"http://127.0.0.1:{taken.getsockname()[1]}/debian")
        with pytest.raises(debian.DownloadError, match="Failed to fetch"):
            debian.Archive("trixie").update()


def test_unsigned_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("apt-get")
    release = tmp_path / "dists" / "trixie" / "Release"
    release.parent.mkdir(parents=True)
    release.write_text(
        "Origin: Debian\nSuite: stable\nCodename: trixie\nComponents: main\nArchitectures: amd64\n"
    )
    monkeypatch.setenv(debian.MIRROR_VARIABLE, f"file:{tmp_path}")
    with pytest.raises(debian.SignatureError, match="does not trust"):
        debian.Archive("trixie").update()


def test_what_apt_leaves_behind_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("apt-config")
    fake = tmp_path / "bin" / "apt-get"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\ntouch "$TMPDIR/left" && echo "$TMPDIR" >{tmp_path}/where && exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv(debian.MIRROR_VARIABLE, f"file:{tmp_path}")
    with pytest.raises(debian.DownloadError):
        debian.Archive("trixie").update()
    assert not Path((tmp_path / "where").read_text().strip()).exists()


def test_old_lists_serve_where_none_can_be_had(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    need("apt-get")
    monkeypatch.setenv(debian.MIRROR_VARIABLE, f"file:{own_cache}/gone")
    stamp = own_cache / "apt" / "trixie" / "updated"
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    os.utime(stamp, (0, 0))
    said: list[str] = []
    archive = debian.Archive("trixie", progress=said.append)
    archive.update()
    assert "hours ago are used" in said[-1]
    assert stamp.stat().st_mtime == 0
    with pytest.raises(debian.DownloadError):
        archive.update(force=True)


def test_command_line_returns_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert debian.main(["unpack", "--suite", "trixie", "--into", str(tmp_path / "into"), "hello"]) == 3
    assert "error: apt-" in capsys.readouterr().err
    assert not (tmp_path / "into").exists()


def make_deb(directory: Path, name: str, files: dict[str, str]) -> debian.Package:
    """Build a package with these files."""
    need("dpkg-deb")
    root = directory / f"{name}.root"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@invalid>\nDescription: test\n"
    )
    deb = directory / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, deb], check=True, capture_output=True)
    return debian.Package(name, "1", deb)


def test_unpack_merges_usr(tmp_path: Path) -> None:
    packages = [make_deb(tmp_path, "old", {"lib/a": "1"}), make_deb(tmp_path, "new", {"usr/lib/b": "2"})]
    debian.unpack(packages, tmp_path / "into")
    assert (tmp_path / "into/usr/lib/a").read_text() == "1"
    assert (tmp_path / "into/lib/b").read_text() == "2"


def test_unpack_leaves_nothing_half_done(tmp_path: Path) -> None:
    good = make_deb(tmp_path, "good", {"usr/lib/a": "1"})
    bad = debian.Package("bad", "1", tmp_path / "bad_1_all.deb")
    bad.deb.write_bytes(good.deb.read_bytes()[:-40])
    with pytest.raises(debian.UnpackError, match="remove it from the cache"):
        debian.unpack([good, bad], tmp_path / "sub" / "into")
    assert list((tmp_path / "sub").iterdir()) == []


def test_unpack_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(debian.UnpackError, match="not empty"):
        debian.unpack([], tmp_path)
    assert (tmp_path / "kept").exists()


def test_scratch_removes_only_dead_ones(tmp_path: Path) -> None:
    (tmp_path / ".work.dead").mkdir()
    with scratch.scratch_directory(tmp_path, "work") as living:
        assert not (tmp_path / ".work.dead").exists()
        with scratch.scratch_directory(tmp_path, "work") as second:
            assert living.exists()
            assert second != living
    assert list(tmp_path.glob(".work.*")) == []


def test_lock_has_a_deadline(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        scratch.locked(lock),
        pytest.raises(LockTimeoutError, match="fuser"),
        scratch.locked(lock, seconds=0),
    ):
        pytest.fail("taken twice")
    with scratch.locked(lock, seconds=0):
        assert lock.exists()


def test_cache_root_ignores_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    root = debian.cache_root()
    assert root == tmp_path / ".cache" / "vhost-user-balloon"
    assert root.stat().st_mode & 0o777 == 0o700


def test_cache_root_that_cannot_be_made_has_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(debian.CacheError, match="XDG_CACHE_HOME"):
        debian.cache_root()


def test_without_any_home_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(debian.CacheError, match="XDG_CACHE_HOME"):
        debian.cache_root()


def test_interruption_has_its_status_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(debian, "Archive", interrupted)
    assert debian.main(["unpack", "--suite", "trixie", "--into", str(tmp_path / "into"), "hello"]) == 130
    assert capsys.readouterr().err.startswith("interrupted")
