"""What somebody does who has taken a process of the device over: acts for confined.py. Not a test."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from tests.confined import Act

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
# Numbers and constants that Python has no names for (asm/unistd_64.h, linux/ptrace.h, sys/mount.h, sched.h).
PROCESS_VM_READV, PROCESS_VM_WRITEV, PIDFD_GETFD, PERSONALITY, OPENAT2 = 310, 311, 438, 135, 437
PTRACE_SEIZE = 0x4206
MS_REC, MS_PRIVATE, CLONE_FILES, CLONE_NEWNS = 0x4000, 1 << 18, 0x400, 0x20000
PR_SET_NAME = 15
F_ADD_SEALS = 1033


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _syscall(number: int, *arguments: int) -> int:
    result = int(_LIBC.syscall(number, *(ctypes.c_long(each) for each in arguments)))
    _check(result)
    return result


def _victim() -> int:
    """Another process, ours to do with what we can. It ends with us."""
    ends, kept = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(kept)
        os.read(ends, 1)
        os._exit(0)
    return pid


def _wait(pid: int) -> None:
    os.waitpid(pid, 0)


# Files


def open_for_reading(folder: Path) -> Iterator[None]:
    (folder / "there").touch()
    yield
    os.close(os.open(folder / "there", os.O_RDONLY))


def open_for_writing(folder: Path) -> Iterator[None]:
    (folder / "there").touch()
    yield
    os.close(os.open(folder / "there", os.O_WRONLY))


def make_a_file(folder: Path) -> Iterator[None]:
    yield
    os.close(os.open(folder / "new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC))


def open_by_openat2(folder: Path) -> Iterator[None]:
    (folder / "there").touch()
    path = ctypes.create_string_buffer(bytes(folder / "there"))
    how = ctypes.create_string_buffer(24)
    yield
    _syscall(OPENAT2, -100, ctypes.addressof(path), ctypes.addressof(how), 24)


def remove_a_file(folder: Path) -> Iterator[None]:
    (folder / "there").touch()
    yield
    (folder / "there").unlink()


def rename_a_file(folder: Path) -> Iterator[None]:
    (folder / "there").touch()
    yield
    (folder / "there").rename(folder / "elsewhere")


def make_a_folder(folder: Path) -> Iterator[None]:
    yield
    (folder / "new").mkdir()


def link_a_file(folder: Path) -> Iterator[None]:
    yield
    (folder / "new").symlink_to("there")


def list_a_folder(folder: Path) -> Iterator[None]:
    yield
    list(folder.iterdir())


def change_folder(folder: Path) -> Iterator[None]:
    yield
    os.chdir(folder)


def cut_guest_memory(_folder: Path) -> Iterator[None]:
    memory = os.memfd_create("guest-ram")
    os.ftruncate(memory, 4096)
    yield
    os.ftruncate(memory, 0)


def punch_guest_memory(_folder: Path) -> Iterator[None]:
    memory = os.memfd_create("guest-ram")
    os.ftruncate(memory, 8192)
    yield
    _check(_LIBC.fallocate(memory, 3, ctypes.c_long(0), ctypes.c_long(4096)))


def seal_guest_memory(_folder: Path) -> Iterator[None]:
    memory = os.memfd_create("guest-ram", os.MFD_ALLOW_SEALING)
    yield
    fcntl.fcntl(memory, F_ADD_SEALS, 0x10)


def make_a_memfd(_folder: Path) -> Iterator[None]:
    yield
    os.close(os.memfd_create("new"))


# Processes


def fork(_folder: Path) -> Iterator[None]:
    yield
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    _wait(pid)


def spawn(_folder: Path) -> Iterator[None]:
    yield
    _wait(os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {}))


def execute(_folder: Path) -> Iterator[None]:
    yield
    os.execv(sys.executable, [sys.executable, "-S", "-c", ""])


def trace_a_process(_folder: Path) -> Iterator[None]:
    victim = _victim()
    yield
    _check(_LIBC.ptrace(PTRACE_SEIZE, victim, 0, 0))


def kill_a_process(_folder: Path) -> Iterator[None]:
    victim = _victim()
    yield
    os.kill(victim, signal.SIGKILL)
    _wait(victim)


def kill_by_pidfd(_folder: Path) -> Iterator[None]:
    pidfd = os.pidfd_open(_victim())
    yield
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def open_a_pidfd(_folder: Path) -> Iterator[None]:
    victim = _victim()
    yield
    os.pidfd_open(victim)


def take_a_descriptor(_folder: Path) -> Iterator[None]:
    pidfd = os.pidfd_open(_victim())
    yield
    _syscall(PIDFD_GETFD, pidfd, 2, 0)


def _transfer(call: int) -> Iterator[None]:
    memory = ctypes.create_string_buffer(b"secret")
    victim = _victim()
    vector = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(memory), 6))
    at = ctypes.addressof(vector)
    yield
    assert _syscall(call, victim, at, 1, at, 1, 0) == 6


def read_a_process(_folder: Path) -> Iterator[None]:
    yield from _transfer(PROCESS_VM_READV)


def write_to_a_process(_folder: Path) -> Iterator[None]:
    yield from _transfer(PROCESS_VM_WRITEV)


# Sockets


def _make_socket(family: int, kind: int) -> Act:
    def act(_folder: Path) -> Iterator[None]:
        yield
        socket.socket(family, kind).close()

    return act


unix_socket = _make_socket(socket.AF_UNIX, socket.SOCK_STREAM)
tcp_socket = _make_socket(socket.AF_INET, socket.SOCK_STREAM)
udp_socket = _make_socket(socket.AF_INET, socket.SOCK_DGRAM)
netlink_socket = _make_socket(socket.AF_NETLINK, socket.SOCK_RAW)


def socket_pair(_folder: Path) -> Iterator[None]:
    yield
    for each in socket.socketpair():
        each.close()


def _connect(address: str) -> Iterator[None]:
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    yield
    client.connect(address)


def connect_to_a_path(folder: Path) -> Iterator[None]:
    yield from _connect(str(folder / "socket"))


def connect_to_an_abstract_name(folder: Path) -> Iterator[None]:
    yield from _connect(f"\0{folder}")


def bind_a_path(folder: Path) -> Iterator[None]:
    sock = socket.socket(socket.AF_UNIX)
    yield
    sock.bind(str(folder / "socket"))


def bind_an_abstract_name(folder: Path) -> Iterator[None]:
    sock = socket.socket(socket.AF_UNIX)
    yield
    sock.bind(f"\0{folder}")


def bind_a_port(_folder: Path) -> Iterator[None]:
    sock = socket.socket(socket.AF_INET)
    yield
    sock.bind(("127.0.0.1", 0))


def listen(folder: Path) -> Iterator[None]:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0{folder}")
    yield
    sock.listen()


def accept(folder: Path) -> Iterator[None]:
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{folder}")
    listener.listen()
    client.connect(f"\0{folder}")
    yield
    listener.accept()


# Code and memory


def map_code(_folder: Path) -> Iterator[None]:
    yield
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC)


def make_code_of_data(_folder: Path) -> Iterator[None]:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    yield
    code = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    _check(_LIBC.mprotect(ctypes.c_void_p(at), mmap.PAGESIZE, code))


def give_memory_back(_folder: Path) -> Iterator[None]:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    yield
    memory.madvise(mmap.MADV_REMOVE)


def have_memory_read_ahead(_folder: Path) -> Iterator[None]:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    yield
    memory.madvise(mmap.MADV_WILLNEED)


# The rest


def set_its_name(_folder: Path) -> Iterator[None]:
    yield
    _check(_LIBC.prctl(PR_SET_NAME, b"harmless", 0, 0, 0))


def raise_a_limit(_folder: Path) -> Iterator[None]:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    yield
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, min(hard, 256)))
    except ValueError as error:  # as CPython has EPERM
        raise PermissionError(errno.EPERM, str(error)) from error


def make_a_descriptor_non_blocking(_folder: Path) -> Iterator[None]:
    reader, _writer = os.pipe()
    yield
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK)


def ask_a_device(_folder: Path) -> Iterator[None]:
    reader, _writer = os.pipe()
    yield
    fcntl.ioctl(reader, termios.FIONREAD, bytes(4))


def unshare(_folder: Path) -> Iterator[None]:
    yield
    _check(_LIBC.unshare(CLONE_FILES))


def be_another_kind_of_process(_folder: Path) -> Iterator[None]:
    yield
    _syscall(PERSONALITY, 0xFFFFFFFF)


def mount(folder: Path) -> Iterator[None]:
    """As root, in a namespace that ends with the process."""
    _check(_LIBC.unshare(CLONE_NEWNS))
    _check(_LIBC.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    yield
    _check(_LIBC.mount(b"none", bytes(folder), b"tmpfs", ctypes.c_ulong(0), None))
