"""Which rows hold the text of rows that they are to be scored or guided by.

A row leaks if its rendered text is that of a protected row, white space and case folded, or if it holds, word by word,
a whole user turn of one, or, where that is short, the turn and its answer. Fewer than eight words say too little, and a
turn that several protected rows share is an instruction, not a secret: neither counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gradpursuit.data.duplicates import words
from gradpursuit.data.schemas import Conversation

_ENOUGH = 8  # words that are not the same by chance


@dataclass(frozen=True)
class Protected:
    """A row whose text must not be in others: its id, the hash of its rendered text, and what it says."""

    id: str
    hash: str
    conversation: Conversation


class Leaks:
    """Finds the protected row that another one leaks.

    Args:
        rows: that are protected.
        siblings: other rows of the same task: a turn that occurs in several of all of them is an instruction.
    """

    def __init__(self, rows: Sequence[Protected], siblings: Sequence[Protected] = ()) -> None:
        self._hashes = {row.hash: row.id for row in rows}
        distinct = {row.hash: row for row in [*rows, *siblings]}.values()
        shared = Counter(turn for row in distinct for turn in set(_user_turns(row.conversation)))
        self._passages: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for row in rows:
            for passage in _passages(row.conversation, shared):
                rarest = max(passage.split(), key=len)  # long words are rare: few rows have to be looked at closely
                self._passages[rarest].append((f" {passage} ", row.id))

    def find(self, digest: str, conversation: Conversation) -> tuple[str, str] | None:
        """The id of the protected row whose text is in this one, and the reason in words."""
        if digest in self._hashes:
            return self._hashes[digest], "same content as a row of"
        if not self._passages:
            return None
        said = words(conversation)
        text = ""
        for word in self._passages.keys() & set(said):
            text = text or f" {' '.join(said)} "
            for passage, name in self._passages[word]:
                if passage in text:
                    return name, "holds the text of a row of"
        return None


def _user_turns(conversation: Conversation) -> Iterator[str]:
    """The words of every user turn, or of the plain text."""
    for part in _parts(conversation):
        yield " ".join(part[0])


def _passages(conversation: Conversation, shared: Counter[str]) -> Iterable[str]:
    """What of a row must not be in others, word by word."""
    for asked, answer in _parts(conversation):
        turn = " ".join(asked)
        if len(asked) >= _ENOUGH and shared[turn] <= 1:
            yield turn
        elif answer and len(asked) + len(answer) >= _ENOUGH:
            yield f"{turn} {' '.join(answer)}".strip()


def _parts(conversation: Conversation) -> Iterator[tuple[list[str], list[str]]]:
    """The words of every user turn, and of the assistant's turn right after it (none: empty)."""
    if conversation.text is not None:
        yield words(conversation), []
        return
    messages = conversation.messages
    for index, message in enumerate(messages):
        if message["role"] == "user":
            after = messages[index + 1 : index + 2]
            answered = bool(after) and after[0]["role"] == "assistant"
            yield words(Conversation((message,))), words(Conversation(tuple(after))) if answered else []
