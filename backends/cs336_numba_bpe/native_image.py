"""Machine code as one block that runs wherever it is put, so that running it takes neither llvmlite nor a linker.

Loading llvmlite alone takes about 40 MB and 0.08 s. What it would do at every start is done once, when the kernels are
compiled: the object file's sections are laid out behind one another and the distances between them filled in. That is
all there is to link where code refers to its own constants alone and by distance, as these kernels do on x86-64 ELF
systems. `flatten` gives None for anything else, and llvmlite goes on linking that.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_ELF_64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
_X86_64 = 62
_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITABLE, _ALLOCATED = 1, 2
_BY_DISTANCE = (2, 4)
"""R_X86_64_PC32 and R_X86_64_PLT32: target + addend - place, in 32 bits."""
_UNWINDING = ".eh_frame"


@dataclass(frozen=True)
class Image:
    """Code and constants, and where in them each function begins."""

    code: bytes
    entries: dict[str, int]


def flatten(object_code: bytes, names: list[str]) -> Image | None:
    """The image of an object file whose functions `names` are wanted, or None where it takes a real linker."""
    if not object_code.startswith(_ELF_64_LITTLE_ENDIAN):
        return None
    _, _, machine, _, _, _, table, _, _, _, _, entry_size, count, names_index = _HEADER.unpack_from(object_code)
    if machine != _X86_64:
        return None
    sections = [_SECTION.unpack_from(object_code, table + entry_size * index) for index in range(count)]

    def content(index: int) -> bytes:
        _, _, _, _, offset, size, *_ = sections[index]
        return object_code[offset : offset + size]

    def text_at(index: int, offset: int) -> str:
        table = content(index)
        return table[offset : table.index(b"\0", offset)].decode()

    code, begins = bytearray(), {}
    for index, (name, kind, flags, _, _, size, _, _, alignment, _) in enumerate(sections):
        if not flags & _ALLOCATED or not size or text_at(names_index, name) == _UNWINDING:
            continue
        if kind != _PROGBITS or flags & _WRITABLE:
            return None
        code += bytes(-len(code) % max(alignment, 1))
        begins[index] = len(code)
        code += content(index)
    symbols, entries = [], {}
    for kind, link, size, offset in ((s[1], s[6], s[5], s[4]) for s in sections):
        if kind != _SYMTAB:
            continue
        for place in range(offset, offset + size, _SYMBOL.size):
            name, _, _, section, value, _ = _SYMBOL.unpack_from(object_code, place)
            address = begins[section] + value if section in begins else None
            symbols.append(address)
            if address is not None and name:
                entries[text_at(link, name)] = address
    for _, kind, _, _, offset, size, _, target, _, _ in sections:
        if kind != _RELA or target not in begins:
            continue
        for place in range(offset, offset + size, _RELOCATION.size):
            where, info, addend = _RELOCATION.unpack_from(object_code, place)
            address = symbols[info >> 32]
            if info & 0xFFFFFFFF not in _BY_DISTANCE or address is None:
                return None
            here = begins[target] + where
            code[here : here + 4] = struct.pack("<i", address + addend - here)
    if any(name not in entries for name in names):
        return None
    return Image(bytes(code), {name: entries[name] for name in names})


def map_image(image: Image) -> dict[str, int] | None:
    """The addresses of an image's functions in memory of its own, never writable and executable at once.

    The memory stays for the life of the process. None where the system gives no executable memory.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    block = mmap.mmap(-1, len(image.code), flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    block.write(image.code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(address, len(image.code), mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        return None
    _mapped.append(block)
    return {name: address + offset for name, offset in image.entries.items()}


_mapped: list[mmap.mmap] = []
