"""From the user's files to tokens and labels: readers, chat rendering, cleaning, the table on disk."""

from gradpursuit.data.dropped import drop_record
from gradpursuit.data.prepare import left_out, prepare, prepare_target
from gradpursuit.data.readers import Example, Unreadable, read_examples
from gradpursuit.data.render import IGNORE, Rendered, Renderer
from gradpursuit.data.sampling import draw
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.table import Row, Table, TableWriter

__all__ = [
    "IGNORE",
    "Conversation",
    "Example",
    "Rendered",
    "Renderer",
    "Row",
    "Table",
    "TableWriter",
    "Unreadable",
    "draw",
    "drop_record",
    "left_out",
    "prepare",
    "prepare_target",
    "read_examples",
]
