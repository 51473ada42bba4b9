"""Read a pickle that may hold plain data and nothing else.

The flight recorder writes pickles, and a dump comes from a node: the standard unpickler would run whatever
the file asks for. This one knows only the opcodes that make dicts, lists, tuples, strings, bytes, numbers,
booleans and None. There is no opcode here that looks up a name, calls, builds or instantiates, so there is
nothing to call; every other opcode refuses the file. Opcodes are those of ``pickletools`` (protocols 0 to 5).
"""

import struct
from typing import Any

MAX_BYTES = 64 << 20
MAX_OBJECTS = 4_000_000
"""Containers and numbers that one file may make. A ring of 20,000 entries needs about a million."""
MAX_MARKS = 32
"""Containers open at once. A dump nests five deep."""
_MAX_INTEGER_BYTES = 16

_INT4 = struct.Struct("<i")
_UINT2 = struct.Struct("<H")
_UINT4 = struct.Struct("<I")
_UINT8 = struct.Struct("<Q")
_DOUBLE = struct.Struct(">d")


class NotPlainError(ValueError):
    """The pickle is broken, too large, or asks for something that is not plain data."""


def loads(data: bytes) -> Any:
    """The value in ``data``.

    Raises NotPlainError when it is truncated, too large or has any opcode beyond plain data. Dict keys must
    be strings or integers: hashing a deeply nested tuple would overflow the C stack.
    """
    if len(data) > MAX_BYTES:
        raise NotPlainError(f"{len(data)} bytes, more than the {MAX_BYTES} that a dump may have")
    try:
        return _run(data)
    except (IndexError, KeyError, struct.error):
        raise NotPlainError("truncated or broken") from None
    except UnicodeDecodeError:
        raise NotPlainError("a string that is not UTF-8") from None


def _run(data: bytes) -> Any:  # noqa: PLR0915 - one dispatch over a closed set of opcodes reads best in one place
    # One loop with integer comparisons, most frequent opcode first: a dump has 100 opcodes an entry.
    at, made, end = 0, 0, len(data)
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    push = stack.append
    while at < end:
        op = data[at]
        at += 1
        if op == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif op == 0x6A:  # LONG_BINGET
            push(memo[_UINT4.unpack_from(data, at)[0]])
            at += 4
        elif op == 0x28:  # MARK
            if len(below) == MAX_MARKS:
                raise NotPlainError("nested too deep")
            below.append(stack)
            stack = []
            push = stack.append
        elif op in (0x5D, 0x7D, 0x29):  # EMPTY_LIST, EMPTY_DICT, EMPTY_TUPLE
            made += 1
            push([] if op == 0x5D else {} if op == 0x7D else ())
        elif op == 0x65:  # APPENDS
            items, stack = stack, below.pop()
            push = stack.append
            _list(stack).extend(items)
        elif op == 0x4B:  # BININT1
            push(data[at])
            at += 1
        elif op == 0x4D:  # BININT2
            push(_UINT2.unpack_from(data, at)[0])
            at += 2
        elif op == 0x4A:  # BININT
            push(_INT4.unpack_from(data, at)[0])
            at += 4
        elif op == 0x72:  # LONG_BINPUT
            memo[_UINT4.unpack_from(data, at)[0]] = stack[-1]
            at += 4
        elif op == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif op in _SIZED:  # strings and bytes, by the width of their length
            width, text = _SIZED[op]
            size = int.from_bytes(data[at : at + width], "little")
            at += width
            if size > end - at:
                raise NotPlainError("truncated or broken")
            piece = data[at : at + size]
            at += size
            push(piece.decode("utf-8", "surrogatepass") if text else piece)
        elif op == 0x75:  # SETITEMS
            items, stack = stack, below.pop()
            push = stack.append
            _put(stack, items)
        elif op == 0x4E:  # NONE
            push(None)
        elif op == 0x89:  # NEWFALSE
            push(False)
        elif op == 0x88:  # NEWTRUE
            push(True)
        elif op in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
            made += 1
            count = op - 0x84
            if len(stack) < count:
                raise NotPlainError("truncated or broken")
            items = stack[-count:]
            del stack[-count:]
            push(tuple(items))
        elif op == 0x8A:  # LONG1
            made += 1
            size = data[at]
            if size > _MAX_INTEGER_BYTES:
                raise NotPlainError(f"an integer of {size} bytes")
            push(int.from_bytes(data[at + 1 : at + 1 + size], "little", signed=True))
            at += 1 + size
        elif op == 0x47:  # BINFLOAT
            made += 1
            push(_DOUBLE.unpack_from(data, at)[0])
            at += 8
        elif op == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif op == 0x61:  # APPEND
            item = stack.pop()
            _list(stack).append(item)
        elif op == 0x73:  # SETITEM
            item = stack.pop()
            _put(stack, [stack.pop(), item])
        elif op == 0x74:  # TUPLE
            made += 1
            items, stack = stack, below.pop()
            push = stack.append
            push(tuple(items))
        elif op == 0x95:  # FRAME: only says how much to read at once
            at += 8
        elif op == 0x80:  # PROTO
            if data[at] > 5:
                raise NotPlainError(f"pickle protocol {data[at]}")
            at += 1
        elif op == 0x2E:  # STOP
            if len(stack) != 1 or below:
                raise NotPlainError("truncated or broken")
            return stack[0]
        else:
            raise NotPlainError(f"opcode 0x{op:02x} at byte {at - 1} is not plain data")
        if made > MAX_OBJECTS or len(memo) > MAX_OBJECTS:
            raise NotPlainError(f"more than {MAX_OBJECTS} objects")
    raise NotPlainError("truncated or broken")


_SIZED = {
    0x58: (4, True),  # BINUNICODE
    0x8C: (1, True),  # SHORT_BINUNICODE
    0x8D: (8, True),  # BINUNICODE8
    0x42: (4, False),  # BINBYTES
    0x43: (1, False),  # SHORT_BINBYTES
    0x8E: (8, False),  # BINBYTES8
}


def _list(stack: list[Any]) -> list[Any]:
    top = stack[-1]
    if type(top) is not list:
        raise NotPlainError("truncated or broken")
    return top


def _put(stack: list[Any], items: list[Any]) -> None:
    top = stack[-1]
    if type(top) is not dict or len(items) % 2:
        raise NotPlainError("truncated or broken")
    for key in items[::2]:
        if type(key) is not str and type(key) is not int:
            raise NotPlainError(f"a dict key of type {type(key).__name__}")
    top.update(zip(items[::2], items[1::2], strict=True))
