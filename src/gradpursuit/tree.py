"""A configuration before it is one: nested mappings, read from YAML and overridden by flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gradpursuit.errors import ConfigError

_MOST_BYTES = 4 * 2**20
_MOST_VALUES = 100_000
_DEEPEST = 50
_MOST_DIGITS = 400


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, not YAML, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: not a file; give the configuration, a YAML file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path}: more than {_MOST_BYTES:,} bytes, which no configuration is")
        tree = read_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; a configuration is text in UTF-8") from None
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'data:', found {type(tree).__name__}")
    return tree


def read_yaml(text: str) -> Any:
    """What a YAML text means; plain values, lists and mappings alone.

    Raises:
        ConfigError: a key is given twice, or it holds what no setting can be: a date, bytes, a set, NUL, an alias of
            what it lies in.
        ValueError: it is not YAML.
    """
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("nested too deep") from None
    except Exception as error:  # tags with values that do not fit them (!!bool x) fail in many ways
        raise ValueError(
            str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        ) from None
    _require_plain(value)
    return value


def line_of(path: Path, keys: Sequence[int | str]) -> int | None:
    """The line, from 1, at which a YAML file gives the value at `keys`, or what is around it; None: nowhere."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_StrictLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    line = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = next(((name, value) for name, value in node.value if name.value == key), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            found = (node.value[key], node.value[key])
        else:
            found = None
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _require_plain(value: Any) -> None:
    """Refuse what no setting can be. Aliases count as often as they are used, so that a short text stays small."""
    rest: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(_MOST_VALUES):
        if not rest:
            return
        key, found, depth = rest.pop()
        where = f"'{key}': " if key else ""
        if depth > _DEEPEST:
            raise ConfigError(f"{where}nested too deep")
        if isinstance(found, dict):
            if odd := [name for name in found if not isinstance(name, str)]:
                raise ConfigError(f"{where}the key {odd[0]!r} is no text for YAML; write it in quotes")
            inside = [(f"{key}.{name}".lstrip("."), item) for name, item in found.items()]
            for name in found:
                _require_text(name, where)
        elif isinstance(found, list):
            inside = [(f"{key}.{number}".lstrip("."), item) for number, item in enumerate(found)]
        elif found is None or isinstance(found, bool | int | float):
            inside = []
        elif isinstance(found, str):
            _require_text(found, where)
            inside = []
        else:
            kind = type(found).__name__
            raise ConfigError(f"{where}YAML takes this value for a {kind}; write it in quotes if it is a text")
        rest += [(name, item, depth + 1) for name, item in inside]
    raise ConfigError(f"more than {_MOST_VALUES:,} values, which no configuration has")


def _require_text(text: str, where: str) -> None:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError(f"{where}{text!r} holds a NUL or bytes that are not UTF-8")
    if re.search(r":/+[^\s/?#]*:[^\s/?#]*@", text):
        raise ConfigError(
            f"{where}a URL must not hold a user, password, key or signature: settings are written into files and logs; "
            "put credentials into the environment instead"
        )


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory, and a number is what it looks like."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number; `010`, which YAML reads as 8, and `1:30`, which it reads as 90, are refused."""
        text = str(node.value)
        if len(text) > _MOST_DIGITS:
            raise ConfigError(f"line {node.start_mark.line + 1}: a number of {len(text):,} digits, which no setting is")
        value = int(super().construct_yaml_int(node))
        if ":" in text or (len(digits := text.lstrip("+-")) > 1 and digits[0] == "0" and digits[1].isdigit()):
            line = node.start_mark.line + 1
            raise ConfigError(f"line {line}: YAML reads {text} as {value}: write {value}, or '{text}' for a text")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after looking for repeated keys."""
        given: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in given:
                    raise ConfigError(f"line {key.start_mark.line + 1}: the key '{key.value}' is given twice")
                given.add(key.value)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.key=value` in a configuration tree; values are read as YAML.

    Raises:
        ConfigError: an override has no value, or names a value as if it were a section.
    """
    for override in overrides:
        _apply_override(tree, override)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in `tree`; the value is read as YAML, so 5, true and [a, b] mean what they say."""
    key, equals, text = override.partition("=")
    if not equals or not text.strip():
        raise ConfigError(f"flag '--{key}' has no value: write --{key} VALUE, or null for none")
    *sections, name = key.split(".")
    _require_text(override, f"flag '--{key}': ")
    if not all([*sections, name]):
        raise ConfigError(f"flag '--{key}': expected section.key, as in --selection.k 50")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"flag '--{key}': '{section}' is a value, not a section")
    try:
        tree[name] = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"flag '--{key}': {error}") from None
    except ValueError:
        tree[name] = text
