"""A configuration before it is one: nested mappings, read from YAML and overridden by flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gradpursuit.errors import ConfigError


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, not YAML, or holds something else.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'data:', found {type(tree).__name__}")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after looking for repeated keys."""
        names = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (name, line) in enumerate(names):
            if name in [earlier for earlier, _ in names[:index]]:
                raise ConfigError(f"line {line}: the key '{name}' is given twice")
        return super().construct_mapping(node, deep)


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
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"flag '--{key}': '{section}' is a value, not a section")
    try:
        tree[name] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        tree[name] = text
