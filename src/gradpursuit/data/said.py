"""What cleaned rows say: their own words, without the chat template that they were rendered with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradpursuit.config import ColumnName, SourceSection
from gradpursuit.data.schemas import Conversation, recognise
from gradpursuit.data.table import Row, Table
from gradpursuit.sources import paths

_NOT_SAID = {"role", "id", "type", "tool_call_id"}  # keys of a message whose values name things


class Said:
    """The conversations of rows that were cleaned before; their files need not exist any more.

    Args:
        sources: that the rows came from.
        columns: `data.columns`, for sources without column names of their own.
        tables: the cleaned rows.
    """

    def __init__(
        self, sources: Sequence[SourceSection], columns: Mapping[ColumnName, str | None], *tables: Table
    ) -> None:
        self._default = columns
        files = {path for table in tables for path in table.column("file")}
        mapped = [source for source in sources if source.columns is not None]
        self._own = {path: source.columns or {} for source in mapped for path in paths([source], files)}

    def __call__(self, row: Row) -> Conversation:
        """The conversation of a row."""
        mapping = self._own.get(row.file, self._default)
        return recognise(row.columns, mapping, f"{row.file}:{row.line}")[1]

    def text(self, row: Row) -> str:
        """Everything that a row says, one message or part of one per line: contents, reasoning, tool calls."""
        conversation = self(row)
        parts = _strings(conversation.messages) if conversation.text is None else [conversation.text]
        return "\n".join(parts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NOT_SAID:
                yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)
