"""Which rows hold the text of rows that they are to be scored or guided by.

A row leaks if its rendered text is that of a protected row up to white space and case; if it holds, word by word, a
whole user turn of one, or, where that is short, the turn and its answer; or if it holds a large enough share of that
passage in runs of eight words, of which a formula is one. Fewer than eight words say too little. A turn, or a run of
words, that several protected rows share is an instruction, not a secret: neither counts. Nor does a run that more than
twenty of the rows that are looked at hold. That is known after the last of them: until then, a part is a suspicion
(:meth:`Leaks.still`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gradpursuit.data.duplicates import said
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.words import grams, weight, with_whole_formulas

_ENOUGH = 8  # words that are not the same by chance
_COMMON = 20  # rows that hold a run of words which is no instruction


@dataclass(frozen=True)
class Protected:
    """A row whose text must not be in others: its id, the hash of its rendered text, and what it says."""

    id: str
    hash: str
    conversation: Conversation


@dataclass(frozen=True)
class Leak:
    """What a row leaks.

    Attributes:
        id: of the protected row.
        reason: in words that end before the name of its split.
        coverage: share of the passage that the row holds, in (0, 1].
        runs: of words, that the row holds a part of a passage by; empty: it holds the whole.
    """

    id: str
    reason: str
    coverage: float = 1.0
    runs: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


@dataclass(frozen=True)
class _Passage:
    """What of a protected row must not be in others: its words between spaces, and how many (a formula is one)."""

    row: str
    text: str
    words: int


class Leaks:
    """Finds the protected row that another one leaks.

    Args:
        rows: that are protected.
        siblings: other rows of the same task, which are to be looked at: a turn that occurs in several of all of them
            is an instruction, and so is a run of words that occurs in a third.
        coverage: share of the words of a passage from which a part of it is a leak; None: whole passages alone.
    """

    def __init__(
        self, rows: Sequence[Protected], siblings: Sequence[Protected] = (), coverage: float | None = None
    ) -> None:
        self._hashes = {row.hash: row.id for row in rows}
        self._coverage = coverage
        self._sharing = 2 if siblings else 1  # a sibling that holds a run of words is itself one of those that share it
        distinct = {row.hash: row for row in [*rows, *siblings]}.values()
        turns, shared = Counter[str](), Counter[str]()
        for row in distinct:
            turns.update({" ".join(asked) for asked, _ in _parts(row.conversation)})
            found = (asked + answer for asked, answer in _parts(row.conversation))
            shared.update(set().union(*map(_runs, found)))
        self._whole: dict[str, list[_Passage]] = defaultdict(list)  # under one of its runs of words, the rarest
        self._parts: dict[str, list[tuple[_Passage, int, int]]] = defaultdict(list)  # under every run of its own
        self._holders = Counter[str]()  # rows that were looked at, by the runs that they hold
        for row in rows:
            for passage in _passages(row.conversation, turns):
                self._add(row, passage, shared)

    def _add(self, row: Protected, words: list[str], shared: Counter[str]) -> None:
        coarse = with_whole_formulas(words)
        passage = _Passage(row.id, f" {' '.join(words)} ", len(coarse))
        rarest = min((run for run, _, _ in grams(words, _ENOUGH)), key=lambda run: shared[run])
        self._whole[rarest].append(passage)
        for gram, start, stop in grams(coarse, _ENOUGH) if self._coverage is not None else ():
            if shared[gram] <= self._sharing:
                self._parts[gram].append((passage, start, stop))

    def find(self, digest: str, conversation: Conversation) -> Leak | None:
        """What a row leaks whose text hash is `digest`; of several parts, the largest.

        A part (one with `runs`) is to be looked at again by :meth:`still` when all rows have been looked at.
        """
        if digest in self._hashes:
            return Leak(self._hashes[digest], "same content as a row of")
        if not self._whole:
            return None
        words = said(conversation)
        runs = _runs(words)
        text = ""
        for gram in sorted(self._whole.keys() & runs):
            text = text or f" {' '.join(words)} "
            for passage in self._whole[gram]:
                if passage.text in text:
                    return Leak(passage.row, "holds the text of a row of")
        held = frozenset(self._parts.keys() & runs)
        self._holders.update(held)
        return self._part(held)

    def still(self, leak: Leak) -> Leak | None:
        """What of an earlier leak is one, after all that has been looked at: None, if it holds but instructions."""
        return self._part(leak.runs) if leak.runs else leak

    def _part(self, runs: frozenset[str]) -> Leak | None:
        held: dict[_Passage, set[int]] = defaultdict(set)
        for run in runs:
            if self._holders[run] > _COMMON:
                continue
            for passage, start, stop in self._parts[run]:
                held[passage].update(range(start, stop))
        shares = [(len(places) / passage.words, passage.row) for passage, places in held.items()]
        share, row = max(shares, default=(0.0, ""))
        if not shares or self._coverage is None or share < self._coverage:
            return None
        return Leak(row, "holds a part of a row of", share, runs)


def _runs(words: Sequence[str]) -> set[str]:
    """All runs of eight words, with formulas in their symbols and with whole ones."""
    coarse = with_whole_formulas(words)
    return {run for way in ([words] if coarse is words else [words, coarse]) for run, _, _ in grams(way, _ENOUGH)}


def _passages(conversation: Conversation, turns: Counter[str]) -> Iterator[list[str]]:
    """What of a row must not be in others, word by word."""
    for asked, answer in _parts(conversation):
        if weight(asked) >= _ENOUGH and turns[" ".join(asked)] <= 1:
            yield asked
        elif answer and weight(asked) + weight(answer) >= _ENOUGH:
            yield asked + answer


def _parts(conversation: Conversation) -> Iterator[tuple[list[str], list[str]]]:
    """The words of every user turn, or of the plain text, and of the assistant's turn right after it (none: empty)."""
    if conversation.text is not None:
        yield said(conversation), []
        return
    messages = conversation.messages
    for index, message in enumerate(messages):
        if message["role"] == "user":
            after = messages[index + 1 : index + 2]
            answered = bool(after) and after[0]["role"] == "assistant"
            yield said(Conversation((message,))), said(Conversation(tuple(after))) if answered else []
