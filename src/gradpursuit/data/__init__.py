"""From the user's files to tokens and labels: readers, chat rendering, cleaning, the table on disk."""

from gradpursuit.data.prepare import drop_record, leaks, prepare, prepare_target
from gradpursuit.data.readers import Example, read_examples
from gradpursuit.data.render import IGNORE, Rendered, Renderer
from gradpursuit.data.table import Row, Table

__all__ = [
    "IGNORE",
    "Example",
    "Rendered",
    "Renderer",
    "Row",
    "Table",
    "drop_record",
    "leaks",
    "prepare",
    "prepare_target",
    "read_examples",
]
