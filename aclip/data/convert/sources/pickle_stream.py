"""A pickled list item by item: nothing in the file is run, and memory does not grow with it."""

import pickletools
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from aclip.errors import ConfigError

STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"}
PUTS = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
GETS = {"GET", "BINGET", "LONG_BINGET"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
VALUES_KEPT = 65536
PUTS_A_CHECKPOINT = 256


def iterate_pickled_list(path: Path) -> Iterator[Any]:
    """Yields the items of a pickled list of integers, strings, None, and tuples of them.

    Only opcodes that build such values are known here; those that import or call are refused, so
    that no pickle can run code. Items are dropped once they are yielded: unpickling the 15 million
    captioned images of YFCC at once takes 6 GB.

    Raises:
        ConfigError: the file is damaged or holds anything else.
    """
    memo = _Memo(path)
    values = _Values(memo)
    previous = 0
    try:
        with open(path, "rb") as file:
            for opcode, argument, position in pickletools.genops(file):
                name = opcode.name
                if name == "FRAME":  # may stand between a long string and its memo entry
                    continue
                if name in PUTS:
                    memo.put(argument, previous)
                elif name in ("APPEND", "APPENDS"):
                    yield from values.take_items(has_mark=name == "APPENDS")
                elif name not in ("PROTO", "STOP"):
                    values.push(name, argument)
                previous = position
        if values.stack != [[]]:
            raise ValueError("it is no list")
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is not a pickled list of plain values ({error}); check the file, or make the "
            "list anew with launch/convert.py yfcc-list"
        ) from None


class _Values:
    """The stack of values that a pickle builds; the list itself lies at its bottom, empty."""

    def __init__(self, memo: "_Memo"):
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo = memo

    def push(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in STRINGS or name in INTEGERS:
            stack.append(argument)
        elif name in GETS:
            stack.append(self._memo.get(argument))
        elif name in TUPLES:
            self._join_from(len(stack) - TUPLES[name])
        elif name == "TUPLE":
            self._join_from(self._marks.pop())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "NONE":
            stack.append(None)
        elif name == "EMPTY_LIST" and not stack:
            stack.append([])
        elif name == "LIST" and self._marks == [0] and not stack:  # an empty one, protocol 0
            self._marks.pop()
            stack.append([])
        else:
            raise ValueError(f"it holds {name} where a plain value should be")

    def take_items(self, has_mark: bool) -> list[Any]:
        """What is appended to the list."""
        start = self._marks.pop() if has_mark else 1
        if start != 1 or len(self.stack) < 2:
            raise ValueError("it appends to what is no list")
        items = self.stack[1:]
        del self.stack[1:]
        return items

    def _join_from(self, start: int) -> None:
        if start < 0:
            raise ValueError("its stack is empty")
        self.stack[start:] = [tuple(self.stack[start:])]


class _Memo:
    """The values that a pickle refers back to, found again in the file instead of kept."""

    def __init__(self, path: Path):
        self._path = path
        self._count = 0
        self._checkpoints = array("q")
        self.get = lru_cache(VALUES_KEPT)(self._find)

    def put(self, index: int | None, position: int) -> None:
        """Notes a memo entry, whose value's opcode stands at `position`; MEMOIZE has no index."""
        if index is not None and index != self._count:
            raise ValueError("its memo is not in order")
        if self._count % PUTS_A_CHECKPOINT == 0:
            self._checkpoints.append(position)
        self._count += 1

    def _find(self, index: int) -> Any:
        if not 0 <= index < self._count:
            raise ValueError("it refers to a value that is not there")
        # One checkpoint early, since a tuple begins before its own memo entry.
        checkpoint = max(0, index // PUTS_A_CHECKPOINT - 1)
        count = checkpoint * PUTS_A_CHECKPOINT
        values = _Values(self)
        with open(self._path, "rb") as file:
            file.seek(self._checkpoints[checkpoint])
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in PUTS:
                    if count == index:
                        break
                    count += 1
                elif opcode.name in ("APPEND", "APPENDS"):
                    values = _Values(self)
                elif opcode.name not in ("PROTO", "FRAME"):
                    try:
                        values.push(opcode.name, argument)
                    except (ValueError, IndexError):  # the end of what began before the checkpoint
                        values = _Values(self)
        value = values.stack[-1]
        if not isinstance(value, str | tuple):
            raise ValueError("it repeats an object that is neither text nor a tuple")
        return value
