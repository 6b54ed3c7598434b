"""Ways to break a file: as bytes, or as JSON whose values are changed and which still is JSON."""

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

INTERESTING_NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
PATHS_OUTSIDE = ("../../outside", "/etc/hostname")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "../../outside",
    "/etc/hostname", "a\0b", "\ud800", "\u202e", "🙂" * 50, "9" * 400, "http://example.com/a", [], {}, [[]], [None], {"": None}, "a" * 70_000,
)  # fmt: skip
TOKENS = (
    b"../",
    b"/",
    b"\0",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[" * 2000,
    b"null",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"%s%n",
    b"NaN",
    b"-",
    b"1e999",
)
MOST_CHANGES = 6
MOST_NESTING = 100_000


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A broken version of a file's content; sometimes it is still a good one."""
    if draw.random() < 0.6:
        changed = mutate_json(content, draw)
        if changed is not None:
            return changed
    for _ in range(draw.choice((1, 1, 2, MOST_CHANGES))):
        content = draw.choice(BYTE_CHANGES)(content, draw)
    return content


def mutate_json(content: bytes, draw: random.Random) -> bytes | None:
    """The same with some values changed, if it is JSON or lines of JSON; None if not."""
    try:
        lines = content.decode().splitlines() or [""]
        whole = len(lines) < 2 or not all(line.startswith("{") for line in lines)
        values = [json.loads(content)] if whole else [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    for _ in range(draw.choice((1, 1, 2, MOST_CHANGES))):
        place = draw.randrange(len(values))
        values[place] = changed_value(values[place], draw)
    texts = [json.dumps(value) for value in values]
    if draw.random() < 0.02:
        texts[0] = '{"a":' * draw.choice((50, MOST_NESTING)) + texts[0]
    return "\n".join(texts).encode() + (b"" if whole else b"\n")


def changed_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one thing changed, somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        changed = dict(value)
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[draw.choice((*value, "unknown", "", "../x"))] = changed.pop(key)
        else:
            changed[key] = changed_value(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.85:
        items = list(value)
        place = draw.randrange(len(items))
        kind = draw.random()
        if kind < 0.1:
            del items[place]
        elif kind < 0.2:
            items.insert(place, draw.choice(items))
        elif kind < 0.25:
            items *= draw.choice((0, 2, 50))
        else:
            items[place] = changed_value(items[place], draw)
        return items
    if isinstance(value, str) and value and draw.random() < 0.4:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(("", "../", "\0", "/", "9", "é", value)) + value[at + draw.randrange(2) :]
    if type(value) is int and draw.random() < 0.4:
        return value + draw.choice((-1, 1, 2**32, -value, -2 * value))
    return draw.choice(ODD_VALUES)


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return content
    at = draw.randrange(len(content) if draw.random() < 0.5 else min(64, len(content)))  # headers are worth more
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _remove(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + content[start + draw.randint(1, 32) :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    part = content[start : start + draw.randint(1, 64)]
    return content[:start] + part * draw.choice((2, 3, 100)) + content[start:]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice((*TOKENS, draw.randbytes(8))) + content[at:]


def _number(content: bytes, draw: random.Random) -> bytes:
    """A binary number, or one written out, becomes a number at some limit."""
    number = draw.choice(INTERESTING_NUMBERS)
    digits = list(re.finditer(rb"\d+", content))
    if digits and draw.random() < 0.5:
        found = draw.choice(digits)
        return content[: found.start()] + str(number).encode() + content[found.end() :]
    kind = draw.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    packed = struct.pack(kind, number % 256 ** struct.calcsize(kind))
    at = draw.randrange(max(1, len(content) - len(packed)))
    return content[:at] + packed + content[at + len(packed) :]


BYTE_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _flip, _cut, _remove, _repeat, _insert, _number, _number,
)  # fmt: skip
