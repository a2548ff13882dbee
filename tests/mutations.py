"""Broken files made from good ones: what accidents and malice do to JSON, to bytes, to safetensors and GGUF files.

Every mutation is drawn from a `random.Random`, so that a number gives the same broken file again.
"""

import copy
import json
import math
import random
from typing import Any

NESTED: Any = []
for _ in range(90):
    NESTED = [NESTED]
NESTED_OBJECTS: Any = {"type": "identity", "size": 1}
for _ in range(90):
    NESTED_OBJECTS = {"type": "kronecker", "left": NESTED_OBJECTS, "right": {"type": "identity", "size": 1}}

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 20012, 2**20, 2**31, 10**9, -(10**9), 2**62, 2**63, 2**64, 10**400),
    *(0.5, -1.5, 1e308, math.inf, -math.inf, math.nan, "", "0", "1e999", "llama", "x" * 5000),
    *("../../x", "..", ".", "/etc/passwd", "~root/x", "a\0b", "\ud800", "\u202e", "{}", "__class__"),
    *([], {}, [[]], [1, [2]], {"a": {"b": 1}}, NESTED, NESTED_OBJECTS),
)
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000  # deeper than any parser's stack


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed: another value or type, missing, doubled, under another name."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _mutate_once(root, rng)
    return root[0]


def _mutate_once(root: list[Any], rng: random.Random) -> None:
    holder, key = rng.choice(_places(root))
    old = holder[key]
    match rng.randrange(8):
        case 0 if holder is not root:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice([str(odd) for odd in ODD if isinstance(odd, str)])] = holder.pop(key)
        case 1 | 2 if isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1) if holder is not root else 1, copy.deepcopy(old))
        case 3 if isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 2**63:
            holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old)))
        case 4 if isinstance(old, str):
            holder[key] = rng.choice((old + "x", old[:-1], old.upper(), "../" + old, [old], {old: old}))
        case 5:  # a value from elsewhere in the same file
            other, name = rng.choice(_places(root))
            holder[key] = copy.deepcopy(other[name])
        case _:
            holder[key] = copy.deepcopy(rng.choice(ODD))


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Holder and key of every value; branches are as likely as leaves."""
    found: list[tuple[Any, Any]] = []
    left: list[Any] = [root]
    while left and len(found) < 5000:
        holder = left.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                left.append(holder[key])
    return found


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()  # NaN and infinities as Python writes and reads them


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, inserted, repeated or overwritten with what lengths are made of."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = min(rng.choice((rng.randrange(len(changed) + 1), rng.randrange(64))), len(changed))
        match rng.randrange(6):
            case 0:
                del changed[where:]
            case 1:
                del changed[where : where + rng.choice((1, 4, 100))]
            case 2:
                changed[where:where] = rng.randbytes(rng.choice((1, 4, 8, 100)))
            case 3:
                changed[where : where + 8] = rng.choice(
                    (b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\xff\xff\0\0")
                )
            case 4:
                changed[where:where] = changed[where : where + rng.choice((8, 100))]
            case _ if where < len(changed):
                changed[where] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutated_json_file(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with mutated values, mostly; sometimes with mutated bytes, nested without end, or of another kind."""
    kind = rng.randrange(20)
    if kind == 0:
        return mutated_bytes(data, rng)
    if kind == 1:
        return rng.choice(
            (b"", b"{", b"null", b"3", b"[]", b'"a"', b"{}", b"\xff\xfe", b"9" * 5000, DEEP, b"[" * 10**5)
        )
    return json_bytes(mutated_json(json.loads(data), rng))


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A header that lies about dtypes, shapes, offsets, names or its own length; or other bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return mutated_bytes(data, rng)
    if kind == 1:
        lie = rng.choice((0, 1, length - 1, length + 1, len(data), 10**8, 2**32, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + data[8:]
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    text = None
    if kind == 2:  # the same number of bytes under another dtype and shape
        entry["dtype"], entry["shape"] = rng.choice(
            [
                (dtype, [entry["data_offsets"][1] - entry["data_offsets"][0]])
                for dtype in ("U8", "I8", "BOOL", "F8_E4M3")
            ]
            + [(dtype, entry["shape"]) for dtype in ("F32", "F16", "I32", "I64", "U64", "F64", "C64", "F4", "E8M0")]
            + [("F32", [0, 2**62]), ("F32", [0, 2**64 - 1]), ("F32", [2**32, 2**32]), ("F32", [])]
        )
    elif kind == 3:
        entry["data_offsets"] = [rng.choice((0, 4, len(body), 2**63, *entry["data_offsets"])) for _ in range(2)]
    elif kind == 4:  # one name twice
        text = json.dumps(header)
        text = text.replace(json.dumps(rng.choice(names)), json.dumps(rng.choice(names)))
    elif kind == 5:  # numbers that are none
        where = 4 * rng.randrange(max(1, len(body) // 4))
        odd = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff"))
        body = body[:where] + odd + body[where + 4 :]
    else:
        header = mutated_json(header, rng)
    written = (json.dumps(header) if text is None else text).encode()
    return len(written).to_bytes(8, "little") + written + body
