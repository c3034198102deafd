"""What tests break things with: odd values in trees, odd bytes in files, and a call that must end in one message."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradpursuit.errors import GradPursuitError

SECONDS = 20  # a case takes milliseconds; a machine that is busy must not fail the test
ODD: list[Any] = [
    *(None, True, 0, -1, 10**30, 10**400, 1e300, float("nan"), float("inf"), -0.0, 5e-324),
    *("", " ", "\0", "\x1b[2J", "\u202e", "\ud800", "a" * 20_000, "{", "[]", "null", "NaN", "user", "assistant"),
    *([], {}, [[]], [None], [{}], {"": None}, {"role": "user"}, {"content": [{"type": "image"}]}, [[["a"]]]),
    *({"a" * 300: 1}, {"\0": 1}, {"a\nb": {"c": [1, 2, {"d": None}]}}, ["x", "x"], [0.5], {"type": "function"}),
]


@contextmanager
def in_time() -> Iterator[None]:
    """Fail if the block hangs."""

    def late(_number: int, _frame: object) -> None:
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(call: Callable[[], object], what: str) -> str | None:
    """The message with which `call` refuses; None: it does not. Any other error fails the test, with `what`."""
    try:
        with in_time():
            call()
    except GradPursuitError as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error
    return None


def broken_tree(tree: Any, made: random.Random) -> Any:
    """A copy of a tree of mappings and lists with one or two of its values odd, gone, renamed or one level deeper."""
    tree = copy.deepcopy(tree)
    for _ in range(made.randint(1, 2)):
        places = list(_places(tree))
        if not places:
            return tree
        around, key = made.choice(places)
        kind = made.randrange(6)
        if kind < 3:
            around[key] = copy.deepcopy(made.choice(ODD))
        elif kind == 3:
            del around[key]
        elif kind == 4:
            around[key] = made.choice([[around[key]], {"x": around[key]}, str(around[key])])
        elif isinstance(around, dict):
            around[f"{key}_" if made.random() < 0.5 else key.upper()] = around.pop(key)
        else:
            around.insert(0, copy.deepcopy(made.choice(ODD)))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inside):
        yield tree, key
        yield from _places(value)


def broken_bytes(whole: bytes, made: random.Random) -> bytes:
    """Some bytes with a few of them changed, left out, repeated or put in, or the end cut off."""
    content = bytearray(whole)
    for _ in range(made.randint(1, 4)):
        start = made.randrange(len(content) + 1)
        kind, length = made.randrange(4), made.choice([1, 1, 2, 8, 200])
        if kind == 0:
            content[start : start + length] = made.randbytes(length)
        elif kind == 1:
            del content[start : start + length]
        elif kind == 2:
            content[start:start] = content[start : start + length] * made.randint(1, 3)
        else:
            content[start:start] = made.choice(
                [b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b'"', b"{", b"[" * 50, b"\r", b","]
            )
    return bytes(content[: made.randrange(len(content) + 1)] if made.random() < 0.15 else content)
