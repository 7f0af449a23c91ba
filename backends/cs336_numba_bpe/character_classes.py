"""The class of every Unicode character, as the `regex` package sees it: letter, number, white space or other."""

from __future__ import annotations

from pathlib import Path

OTHER, LETTER, NUMBER, WHITE_SPACE = 0, 1, 2, 3
_PATTERNS = {LETTER: r"\p{L}+", NUMBER: r"\p{N}+", WHITE_SPACE: r"\s+"}
CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)


def build_character_classes() -> bytes:
    """One byte for each of the 1,114,112 code points, asked from `regex` itself, so that both always agree."""
    import regex

    classes = bytearray(CODE_POINTS)
    for first, last in ((0, SURROGATES.start), (SURROGATES.stop, CODE_POINTS)):
        text = "".join(map(chr, range(first, last)))
        for kind, pattern in _PATTERNS.items():
            for match in regex.finditer(pattern, text):
                classes[first + match.start() : first + match.end()] = bytes([kind]) * (match.end() - match.start())
    return bytes(classes)


def load_character_classes(folder: Path) -> memoryview:
    """The table, kept in `folder` under a name that holds regex's version (which decides the version of Unicode)."""
    from importlib.metadata import version

    from cs336_registry.text.files import write_bytes

    path = folder / f"character_classes_{version('regex')}.bin"
    if not path.is_file() or path.stat().st_size != CODE_POINTS:
        write_bytes(path, build_character_classes())
    return memoryview(bytearray(path.read_bytes()))
