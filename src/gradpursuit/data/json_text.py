"""JSON as this package reads it from rows and writes it again: strict, of bounded depth, nothing lost in silence."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from gradpursuit.errors import DataError

DEPTH = 100  # lists and objects inside one another; Python's own recursion ends at about a thousand


def parse(text: str) -> Any:
    """The value of a JSON text. NaN and infinity, which are not JSON but often written, stay numbers.

    Raises:
        DataError: it is not JSON, or cannot be used; the message names no place.
    """
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
        ) from None
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not usable JSON: {error}") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values.

    Raises:
        DataError: a key is there twice: the parser would keep the last value and drop the others.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r:.80} is there twice in one object; remove one of them")
    return made


def too_deep() -> DataError:
    """The error for a value that is nested too deep."""
    return DataError(f"nested more than {DEPTH} deep; flatten it, or leave the column out")


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects lie more than :data:`DEPTH` inside one another."""
    stack = [(value, 1)]
    while stack:
        inner, depth = stack.pop()
        parts = inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, (list, tuple)) else ()
        if depth > DEPTH and isinstance(inner, (Mapping, list, tuple)):
            return True
        stack.extend((part, depth + 1) for part in parts if isinstance(part, (Mapping, list, tuple)))
    return False


def finite(value: Any) -> Any:
    """The same value with null for NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def as_json(value: Any) -> str:
    """A value as strict JSON text of one line; dates, decimal numbers and UUIDs become text, NaN and infinity null.

    Raises:
        DataError: it holds bytes or another type that JSON has not, or half a character, or is nested too deep.
    """
    return strict(value)[1]


def strict(value: Any) -> tuple[Any, str]:
    """A value and its JSON text, as :func:`as_json`; the value itself, or if it holds NaN or infinity, one without.

    Raises:
        DataError: as :func:`as_json`.
    """
    try:
        try:
            text = _dumped(value)
        except ValueError:
            value = finite(value)
            text = _dumped(value)
        text.encode()
    except UnicodeEncodeError as error:
        raise _half(error) from None
    except TypeError as error:
        raise DataError(str(error)) from None
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not usable as JSON: {error}") from None
    return value, text


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_text)


def _half(error: UnicodeEncodeError) -> DataError:
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # what `surrogateescape` makes of bytes that are not UTF-8
        return DataError(
            f"not UTF-8: byte 0x{code - 0xDC00:02x}, or half a character (\\u{code:04x} alone); save it as UTF-8"
        )
    return DataError(f"holds half a character (\\u{code:04x} alone); remove it")


def _as_text(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (Decimal, datetime.timedelta, uuid.UUID)):
        return str(value)
    raise TypeError(f"holds {type(value).__name__}, which cannot be kept as JSON")
