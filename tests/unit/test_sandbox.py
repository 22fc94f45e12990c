"""What the device says of the sandbox at its start, and how it goes on where there is less of it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hostdev import landlock, sandbox
from hostdev.sandbox import MAX_KEEPER_FILTERS, Role


@pytest.fixture
def confined(monkeypatch: pytest.MonkeyPatch) -> list[Role]:
    """Who was confined, in place of this process."""
    roles: list[Role] = []

    def confine(role: Role) -> str:
        roles.append(role)
        return sandbox.NONE

    monkeypatch.setattr(sandbox, "confine", confine)
    return roles


def no_filters(_operation: int, _argument: int, _data: bytes | None = None) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_a_kernel_that_has_all_is_not_spoken_of(
    confined: list[Role], caplog: pytest.LogCaptureFixture, unmet: Callable[[str], None]
) -> None:
    if sandbox.missing():
        unmet(f"a kernel with {'; '.join(sandbox.missing())}")
    sandbox.begin(sandbox.AUTO)
    assert confined == [Role.KEEPER]
    assert caplog.messages == []


def test_what_is_missing_is_said_once_each_and_the_rest_is_used(
    confined: list[Role], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    monkeypatch.setattr(sandbox, "_prctl", no_filters)
    monkeypatch.setattr(sandbox, "_has_filters", sandbox._has_filters.__wrapped__)
    sandbox.begin(sandbox.AUTO)
    assert confined == [Role.KEEPER]
    filters, files = caplog.messages
    assert "no seccomp filters: " in filters
    assert "no Landlock: with --metrics-file " in files


def test_none_is_said_too(confined: list[Role], caplog: pytest.LogCaptureFixture) -> None:
    sandbox.begin(sandbox.NONE)
    assert confined == []
    assert "--sandbox none" in caplog.text


def test_what_others_installed_is_no_reason_for_a_first_version(
    confined: list[Role], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A service manager may have many. One that takes over says that it adds none."""
    monkeypatch.setattr(sandbox, "_inherited_filters", lambda: MAX_KEEPER_FILTERS)
    sandbox.begin(sandbox.AUTO)
    assert confined == [Role.KEEPER]
    with caplog.at_level(logging.INFO):
        sandbox.begin(sandbox.AUTO, takes_over=True)
    assert confined == [Role.KEEPER]
    assert "keeps the limits that it has" in caplog.text


def test_a_kernel_that_does_not_count_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _path: "Name:\tpython\nSeccomp:\t2\n")
    assert sandbox._inherited_filters() == 0
