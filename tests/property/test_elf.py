"""Properties of the ELF readers on damaged files.

- Whatever bytes are changed or cut off, a reader returns or raises ElfError: nothing else, and it ends.
- Reading the same bytes again has the same outcome.
"""

from __future__ import annotations

import io
import struct

from hypothesis import given
from hypothesis import strategies as st

from guest_images.elf import module_info, needs, pvh_entry
from guest_images.errors import ElfError
from tests.unit import elf_files

WHOLE = [
    elf_files.vmlinux(elf_files.note("Xen", 18, struct.pack("<Q", 0x1000))),
    elf_files.module("name=a", "depends=b"),
    elf_files.program("/lib64/ld.so", ["liba.so"]),
]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=6),
    st.integers(0, 600),
)
def test_damage_is_a_typed_error(whole: bytes, changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(whole)
    for at, value in changes:
        data[at % len(data)] = value
    for damaged in (bytes(data), bytes(data[:length])):
        assert outcomes(damaged) == outcomes(damaged)


def outcomes(data: bytes) -> list[str]:
    found = []
    for reader in (pvh_entry, module_info, needs):
        try:
            found.append(repr(reader(io.BytesIO(data), "damaged")))
        except ElfError as error:
            found.append(str(error))
    return found
