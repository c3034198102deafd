"""From YAML and flags to a configuration; what is wrong is told with the key, the value, the cause and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from gradpursuit.config.sections import RunConfig
from gradpursuit.config.values import SECRET
from gradpursuit.errors import ConfigError, nearest
from gradpursuit.shown import without_secrets
from gradpursuit.tree import apply_overrides, line_of, read_tree


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` (YAML), apply `section.key=value` overrides, and validate.

    Relative paths in the file are taken relative to the working directory, as on the command line.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is not usable.
    """
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    return build_config(tree, str(path), overrides, path)


def build_config(
    tree: Mapping[str, Any], where: str, overrides: Sequence[str] = (), file: Path | None = None
) -> RunConfig:
    """Validate a nested mapping.

    Args:
        tree: the settings.
        where: names their origin in messages.
        overrides: what came from flags instead.
        file: the YAML file that they were read from, whose lines are named.

    Raises:
        ConfigError: with one line per wrong key or value.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        flags = [override.partition("=")[0] for override in overrides]
        lines = []
        for item in _values(error):
            line = line_of(file, item["loc"]) if file else None
            place = _origin(item["loc"], flags, f"{where}:{line}" if line else where)
            lines.append(f"{place}: {without_secrets(_explain(item, RunConfig))}")
        raise ConfigError.of_lines(lines) from None


# What pydantic adds to the place of a value for the member of a union that it was tried as.
_MEMBER = re.compile(r"(constrained|function)-.*|(literal|list|dict)\[.*\]|int|float|str|bool")
SectionT = TypeVar("SectionT", bound=BaseModel)


def build_section(kind: type[SectionT], values: Mapping[str, Any], within: str) -> SectionT:
    """Validate values as a section of their own, which lies at the key `within` of the configuration.

    Raises:
        ConfigError: with one line per wrong key or value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError.of_lines(_explain(item, kind, within) for item in _values(error)) from None


def _values(error: ValidationError) -> list[dict[str, Any]]:
    """The errors, one for each value: one that fits no member of a union has one error for each of them."""
    found: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for item in error.errors():
        loc = item["loc"]
        while len(loc) > 1 and _MEMBER.fullmatch(str(loc[-1])):
            loc = loc[:-1]
        if loc in found:
            more = item["msg"].removeprefix("Input should be ")
            found[loc] |= {"type": "union", "msg": f"{found[loc]['msg']}, or {more}"}
        else:
            found[loc] = {**item, "loc": loc}
    return list(found.values())


def _origin(loc: tuple[int | str, ...], flags: Sequence[str], where: str) -> str:
    """Where a wrong value was given: the flag that set it (or set what is around it or in it), else `where`."""
    keys = [str(part) for part in loc]
    around = {".".join(keys[:length]) for length in range(1, len(keys) + 1)}
    inside = ".".join(keys) + "."
    named = [f"--{flag}" for flag in dict.fromkeys(flags) if flag in around or flag.startswith(inside)]
    return ", ".join(named) or where


def _explain(item: dict[str, Any], root: type[BaseModel], within: str = "") -> str:
    """One line for one pydantic error of a `root` at the key `within`: key, value, cause and fix."""
    keys = [str(part) for part in item["loc"]]
    above = [within] if within else []
    key = ".".join([*above, *keys])
    if item["type"] == SECRET:
        return f"'{key}': {item['msg']}"
    if item["type"] == "extra_forbidden":
        section = _section_at(root, keys[:-1])
        parent = ".".join([*above, *keys[:-1]])
        place = f" in section '{parent}'" if parent else ""
        return f"unknown key '{keys[-1]}'{place}; {nearest(keys[-1], section.model_fields)}"
    if item["type"] == "missing":
        return f"'{key}' is missing and has no default"
    if not keys:
        return (f"{within}: " if within else "") + str(item["msg"].removeprefix("Value error, "))
    message = {
        "model_type": "expected a section with keys of its own",
        "list_type": "expected a list, such as [a, b]",
        "too_short": "expected at least one entry",
    }.get(item["type"], item["msg"].removeprefix("Value error, "))
    if not key:
        return str(message)
    if isinstance(item["input"], Mapping):  # a section: the message says which of its keys are in the way
        return f"'{key}': {message}"
    return f"'{key}' = {item['input']!r}: {message}"


def _section_at(section: type[BaseModel], keys: Sequence[str]) -> type[BaseModel]:
    for key in filter(str.isidentifier, keys):  # a place in a list is none
        section = next(_sections_in(section.model_fields[key].annotation))
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """A section itself, that of `Section | None`, or that of `list[Section]`."""
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
