"""The setting `data.chat_template`: a file, or the template itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gradpursuit.errors import ConfigError

_LARGEST = 1 << 20  # bytes; the longest that models ship has about 30,000
_TAG = re.compile(r"\{[{%#]")


def is_template_text(value: str) -> bool:
    """Whether the setting is a template, not the path of one."""
    return bool(_TAG.search(value)) or "\n" in value


def template_source(value: str) -> str:
    """The template that the setting means: itself, or what the file holds.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, or no template.
    """
    if is_template_text(value):
        return value
    path = Path(value)
    where = f"data.chat_template '{value}'"
    try:
        path = path.expanduser()
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise ConfigError(f"{where}: larger than {_LARGEST:,} bytes; expected a Jinja template")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8 text; expected a Jinja template") from None
    except (OSError, ValueError, RuntimeError) as error:  # no such user, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{where}: cannot be read: {reason}; give the path of a file, or the template itself"
        ) from None
    if not _TAG.search(text):
        raise ConfigError(f"{where}: holds no Jinja template: there is no {{{{ ... }}}} or {{% ... %}} in it")
    if _is_object(text):
        raise ConfigError(f"{where}: a JSON file; put the template alone, the value of 'chat_template', into a file")
    return text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
