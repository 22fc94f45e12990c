"""Where this machine gets Debian from, read out of its own apt configuration.

Pure text in, values out: both formats of sources.list(5) (one-line ``*.list`` and deb822 ``*.sources``), and the choice
of the entry that serves Debian itself. It downloads nothing, knows no address of its own and opens no file; debian.py
does. Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Source", "choose_mirror", "parse_deb822", "parse_one_line"]

# Names under dists/ of Debian's archive. Third parties use the words "stable" and "testing" as well: see serves_debian().
_RELEASES = "bullseye|bookworm|trixie|forky|duke|sid|oldoldstable|oldstable|stable|testing|unstable"
_DEBIAN_SUITE = re.compile(rf"(?:{_RELEASES})(?:-updates|-backports|-proposed-updates)?/?")

# sources.list(5): "yes", "true", "with", "on" and "enable" are true; only the false words matter here.
_FALSE_WORDS = frozenset({"no", "false", "without", "off", "disable"})


@dataclass(frozen=True)
class Source:
    """One address of a sources entry, with what the entry says about it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""

    def serves_debian(self) -> bool:
        """Whether this looks like Debian's main archive, and not its security archive or somebody else's packages."""
        if "main" not in self.components or not any(map(_DEBIAN_SUITE.fullmatch, self.suites)):
            return False
        if self.signed_by_debian():
            return True
        if self.signed_by and "BEGIN PGP" not in self.signed_by:
            return False  # a keyring of somebody else
        address = urllib.parse.urlsplit(self.uri)
        return address.scheme.startswith("mirror") or address.path.rstrip("/").endswith("/debian")

    def signed_by_debian(self) -> bool:
        """Whether the entry itself names one of the keyrings of the package debian-archive-keyring."""
        return "debian-archive-" in self.signed_by


def choose_mirror(sources: Iterable[Source]) -> str | None:
    """Return the address that serves Debian: entries that name Debian's keyring go first, then the order of the files."""
    found = [source for source in sources if source.serves_debian()]
    found.sort(key=lambda source: not source.signed_by_debian())
    return found[0].uri if found else None


def parse_one_line(text: str) -> Iterator[Source]:
    """Parse the ``deb [option=value ...] URI SUITE COMPONENT...`` format; what is not such a line is passed over."""
    for line in text.splitlines():
        matched = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s*)?(.*)", line.partition("#")[0])
        if matched is None:
            continue
        options = dict(word.split("=", 1) for word in (matched[1] or "").split() if "=" in word)
        match matched[2].split():
            case [uri, suite, *components] if _is_fetchable(uri):
                yield Source(uri, (suite,), tuple(components), options.get("signed-by", ""))


def parse_deb822(text: str) -> Iterator[Source]:
    """Parse the ``Types: deb / URIs: ...`` format: stanzas parted by empty lines, comments from ``#`` on."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields = _deb822_fields(stanza)
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").strip().lower() in _FALSE_WORDS:
            continue
        suites, components = fields.get("suites", "").split(), fields.get("components", "").split()
        for uri in filter(_is_fetchable, fields.get("uris", "").split()):
            yield Source(uri, tuple(suites), tuple(components), fields.get("signed-by", "").strip())


def _deb822_fields(stanza: str) -> dict[str, str]:
    """Join continuation lines (they start with white space) to their field; names compare without case."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1].isspace():
            fields[name] = fields.get(name, "") + "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value
    return fields


def _is_fetchable(uri: str) -> bool:
    """Whether the address has a scheme that needs nobody to insert a disc."""
    scheme, colon, _ = uri.partition(":")
    return bool(colon) and scheme != "cdrom"
