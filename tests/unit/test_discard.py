"""Giving memory back: what is behind a descriptor, which call is chosen for it, and what the call really frees."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from hostdev.discard import AUTO, REQUESTS, Backing, Discarder, Method, backing_of, choose
from hostdev.errors import HostError
from hostdev.fds import Fd
from hostdev.giver import whole_pages
from hostdev.memory import Part, Region
from tests.conftest import HUGE_PAGES
from tests.unit.test_memory import PAGE, memfd, region

MIB = 1 << 20


@pytest.fixture
def full() -> Iterator[Region]:
    """A region of 1 MiB of shared memory, all of it resident."""
    each = region(0, MIB)
    os.pwrite(each.fd.fileno(), b"\xaa" * MIB, 0)
    yield each
    each.close()


def footprint(each: Region) -> int:
    return os.fstat(each.fd.fileno()).st_blocks * 512


def anonymous_kib() -> int:
    """KiB of anonymous memory of this process, wherever the host has it, from the kernel's own count."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    counts = {words[0]: int(words[1]) for words in lines if words[0] in ("Anonymous:", "Swap:")}
    return counts["Anonymous:"] + counts["Swap:"]


def test_remove_frees_shared_memory(full: Region) -> None:
    discarder = Discarder()
    discarder.adopt((full,))
    assert discarder.method(full) is Method.REMOVE
    discarder.release(full, 4 * PAGE, 8 * PAGE)
    assert footprint(full) == MIB - 8 * PAGE
    assert os.lseek(full.fd.fileno(), 0, os.SEEK_HOLE) == 4 * PAGE
    assert os.lseek(full.fd.fileno(), 4 * PAGE, os.SEEK_DATA) == 12 * PAGE
    assert full.mapping[3 * PAGE : 4 * PAGE] == full.mapping[12 * PAGE : 13 * PAGE] == b"\xaa" * PAGE


def test_dontneed_frees_nothing_of_shared_memory(full: Region) -> None:
    discarder = Discarder(Method.DONTNEED)
    discarder.adopt((full,))
    assert discarder.method(full) is Method.DONTNEED
    discarder.release(full, 0, MIB)
    assert footprint(full) == MIB
    assert full.mapping[:PAGE] == b"\xaa" * PAGE


def test_dontneed_frees_private_memory() -> None:
    with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        for start in range(0, 64 * MIB, PAGE):
            private[start] = 1
        before = anonymous_kib()
        private.madvise(mmap.MADV_DONTNEED)
        assert before - anonymous_kib() > 60 * 1024
        assert private[0] == 0


# What is behind a descriptor


def test_memfd_is_shared_memory() -> None:
    with memfd(PAGE) as fd:
        assert backing_of(fd) is Backing.SHARED


def test_no_descriptor_is_private_memory() -> None:
    assert backing_of(None) is Backing.PRIVATE


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, 0x10], ids=["write", "future write"])
def test_sealed_memfd(seal: int) -> None:
    with memfd(PAGE) as fd:
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seal)
        assert backing_of(fd) is Backing.SEALED


def test_seals_that_do_not_matter() -> None:
    with memfd(PAGE) as fd:
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        assert backing_of(fd) is Backing.SHARED


def test_a_file_on_a_disk(on_disk: Fd) -> None:
    """Punching would destroy its data: nothing of it is ever released."""
    os.pwrite(on_disk.fileno(), b"\xaa" * MIB, 0)
    each = region(0, MIB, fd=Fd(os.dup(on_disk.fileno())))
    discarder = Discarder(Method.REMOVE)
    discarder.adopt((each,))
    assert discarder.method(each) is Method.NONE
    each.close()
    assert os.pread(on_disk.fileno(), 2 * MIB, 0) == b"\xaa" * MIB


def test_a_file_on_tmpfs(unmet: Callable[[str], None]) -> None:
    if not os.access("/dev/shm", os.W_OK):
        unmet("/dev/shm")
    path = Path(f"/dev/shm/vhost-user-balloon-test-{os.getpid()}")
    with Fd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)) as fd:
        path.unlink()
        assert backing_of(fd) is Backing.SHARED


def huge_memfd(size: int) -> Fd:
    fd = Fd(os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB))
    os.ftruncate(fd.fileno(), size)
    return fd


def test_hugetlb() -> None:
    try:
        with huge_memfd(2 * MIB) as fd:
            assert backing_of(fd) is Backing.HUGETLB
    except OSError as error:
        pytest.skip(f"not run: the kernel makes no hugetlb memfd: {error.strerror}")


def test_hugetlb_regions_need_not_begin_or_end_with_a_huge_page(huge_pages: int) -> None:
    """As on q35: 640 KiB below the VGA window and the rest above it; both must be mapped, written and closed."""
    with huge_memfd(8 * MIB) as fd:
        low = region(0, 0xA0000, fd=Fd(os.dup(fd.fileno())))
        high = region(0xC0000, 8 * MIB - 0xC0000, fd=Fd(os.dup(fd.fileno())), offset=0xC0000)
        assert (low.page_size, high.page_size) == (2 * MIB, 2 * MIB)
        low.view(0x9FFFF, 1)[0] = 1
        high.view(0, 1)[0] = 2
        assert os.pread(fd.fileno(), 1, 0x9FFFF) == b"\1"
        assert os.pread(fd.fileno(), 1, 0xC0000) == b"\2"
        for each in (low, high):
            each.close()
    # A mapping that could not be undone would keep its page.
    assert int((HUGE_PAGES / "free_hugepages").read_text()) >= huge_pages


def test_whole_huge_pages_are_given_back_where_that_was_asked_for(huge_pages: int) -> None:
    with huge_memfd(8 * MIB) as fd:
        each = region(0xC0000, 8 * MIB - 0xC0000, fd=Fd(os.dup(fd.fileno())), offset=0xC0000)
        for page in range(4):
            each.view(0 if page == 0 else page * 2 * MIB - 0xC0000, 1)[0] = 0xAA
        assert footprint(each) == 8 * MIB
        pieces = whole_pages(Part(each, 0, each.size - 1))  # all but the last byte
        discarder = Discarder(hugetlb_release=True)
        discarder.adopt((each,))
        for piece in pieces:
            discarder.release(*piece)
        assert footprint(each) == 4 * MIB  # the first page is not all named, the last lacks a byte
        assert os.pread(fd.fileno(), 1, 0xC0000) == os.pread(fd.fileno(), 1, 6 * MIB) == b"\xaa"
        each.close()


# The choice


@pytest.mark.parametrize("backing", Backing)
@pytest.mark.parametrize("request_", REQUESTS)
def test_choices(backing: Backing, request_: str) -> None:
    """What would destroy data or kill the guest is never chosen, whatever is asked; each choice has its reason."""
    choice = choose(request_, backing)
    never = (Backing.HUGETLB, Backing.FILE, Backing.SEALED, Backing.DOUBLED)
    if backing in never or request_ == Method.NONE:
        assert choice.method is Method.NONE
    elif backing is Backing.PRIVATE or request_ == Method.DONTNEED:
        assert choice.method is Method.DONTNEED
    else:
        assert choice.method is Method.REMOVE
    assert choice.reason


@pytest.mark.parametrize("request_", REQUESTS)
def test_hugetlb_is_given_back_only_if_asked_for(request_: str) -> None:
    choice = choose(request_, Backing.HUGETLB, hugetlb_release=True)
    expected = {Method.NONE: Method.NONE, Method.DONTNEED: Method.DONTNEED}
    assert choice.method is expected.get(
        Method(request_) if request_ != AUTO else Method.REMOVE, Method.REMOVE
    )
    assert "--hugetlb-release" in choose(request_, Backing.HUGETLB).reason


def test_requests_are_plain_words() -> None:
    assert REQUESTS == (AUTO, "remove", "dontneed", "none")
    assert {type(word) for word in REQUESTS} == {str}


def test_a_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    regions = (region(0, PAGE), region(PAGE, PAGE))
    discarder = Discarder()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            discarder.adopt(regions)
    assert len(caplog.records) == 1
    assert "shared memory: discard method is remove" in caplog.text
    for each in regions:
        each.close()


def test_bytes_of_two_regions_are_not_given_back(caplog: pytest.LogCaptureFixture) -> None:
    """Neither region's: which of the two the guest uses is not known. Once one is gone the other is as any."""
    file = memfd(2 * MIB)
    first = region(0, MIB, fd=Fd(os.dup(file.fileno())))
    second = region(MIB, MIB, fd=Fd(os.dup(file.fileno())))
    third = region(2 * MIB, MIB, offset=MIB, fd=file)
    discarder = Discarder()
    discarder.adopt((first, second, third))
    methods = [discarder.method(each) for each in (first, second, third)]
    assert methods == [Method.NONE, Method.NONE, Method.REMOVE]
    assert "may be in use in the other" in caplog.text
    discarder.adopt((second, third))
    assert discarder.method(second) is Method.REMOVE
    for each in (first, second, third):
        each.close()


# Where each region lies in the file, in pages, and whether it shares bytes of it with any other.
MANY = {
    "one around two": [(0, 8, True), (1, 1, True), (5, 1, True), (8, 2, False)],
    "a chain": [(0, 2, True), (1, 2, True), (2, 2, True), (4, 1, False), (5, 1, False)],
    "two pairs": [(0, 2, True), (1, 2, True), (3, 1, False), (4, 2, True), (5, 2, True)],
    "three of the same": [(2, 2, True), (2, 2, True), (0, 2, False), (2, 2, True)],
    "the last with the first": [(0, 6, True), (6, 1, False), (7, 1, False), (8, 1, False), (5, 1, True)],
}


@pytest.mark.parametrize("spans", MANY.values(), ids=MANY)
def test_bytes_of_more_than_two_regions(spans: list[tuple[int, int, bool]]) -> None:
    """Those that share bytes are kept, all of them and no other, whether they come at once or one after the other."""
    file = memfd(16 * PAGE)
    regions = tuple(
        region(number * MIB, count * PAGE, offset=start * PAGE, fd=Fd(os.dup(file.fileno())))
        for number, (start, count, _is_doubled) in enumerate(spans)
    )
    at_once, one_by_one = Discarder(), Discarder()
    at_once.adopt(regions)
    for count in range(1, len(regions) + 1):
        one_by_one.adopt(regions[:count])
    wanted = [Method.NONE if is_doubled else Method.REMOVE for _start, _count, is_doubled in spans]
    assert [at_once.method(each) for each in regions] == wanted
    assert [one_by_one.method(each) for each in regions] == wanted
    for each in regions:
        each.close()
    file.close()


def test_a_choice_that_frees_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    each = region(0, PAGE)
    with caplog.at_level(logging.WARNING):
        Discarder("dontneed").adopt((each,))
        Discarder("none").adopt((each,))
    assert "FREES NOTHING" in caplog.text
    assert "--discard none" in caplog.text
    each.close()


# Bounds and refusals


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-PAGE, PAGE), (0, 0), (0, -PAGE), (0, MIB + PAGE), (MIB, PAGE), (MIB - PAGE, 2 * PAGE)],
)
def test_ranges_outside_the_region(full: Region, offset: int, length: int) -> None:
    """mmap.madvise would clamp the last ones in silence."""
    discarder = Discarder()
    discarder.adopt((full,))
    with pytest.raises(ValueError, match="outside"):
        discarder.release(full, offset, length)
    assert footprint(full) == MIB


def test_the_kernels_refusal_is_the_hosts_fault() -> None:
    """Sealed after the mapping was made: the kernel refuses to punch (EPERM)."""
    each = region(0, MIB)
    discarder = Discarder()
    discarder.adopt((each,))
    fcntl.fcntl(each.fd.fileno(), fcntl.F_ADD_SEALS, 0x10)
    with pytest.raises(HostError) as caught:
        discarder.release(each, 0, MIB)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EPERM
    each.close()


def test_a_file_without_seals_is_what_its_file_system_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_seals(*_arguments: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(fcntl, "fcntl", no_seals)
    with memfd(PAGE) as fd:
        assert backing_of(fd) is Backing.SHARED


def test_what_is_no_file_any_more_is_an_error() -> None:
    class Gone:
        def fileno(self) -> int:
            return 1 << 20

    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        backing_of(cast("Fd", Gone()))
