"""Which rows repeat others: exactly, once white space and case are folded, or nearly, by MinHash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradpursuit.data.schemas import Conversation

if TYPE_CHECKING:
    from datasketch import MinHash

_WORD = re.compile(r"\w+")
_IDLE_SPACE = re.compile(r"(?<!\w) | (?!\w)")
_SHINGLE = 3  # words
_PERMUTATIONS = 128


def text_hash(text: str) -> str:
    """sha256 (hex) of a text with its case folded, and its white space: one space between words, none elsewhere.

    White space beside punctuation is folded away, because in rendered text a turn's own edges lie beside marks.
    """
    return hashlib.sha256(_IDLE_SPACE.sub("", " ".join(text.casefold().split())).encode()).hexdigest()


def words(conversation: Conversation) -> list[str]:
    """Everything that is said, in order, case folded: words alone, without punctuation."""
    if conversation.text is not None:
        return _WORD.findall(conversation.text.casefold())
    return [word for message in conversation.messages for word in _WORD.findall(message["content"].casefold())]


class ExactCopies:
    """The first row of every text, by :func:`text_hash`; about 250 bytes of memory for each."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._first)

    def first(self, digest: str, name: str) -> str | None:
        """The id of an earlier row with the same text; without one, None, and the row `name` is remembered."""
        key = bytes.fromhex(digest[:32])
        found = self._first.get(key)
        if found is None:
            self._first[key] = name
        return found


class NearCopies:
    """Rows whose sets of three-word shingles have a Jaccard similarity, estimated by MinHash, of at least `threshold`.

    `datasketch` finds the candidates by locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of
    Massive Datasets, chapter 3); each is then compared. About 5 kB of memory for each row that is remembered.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._signatures: dict[str, MinHash] = {}

    def first(self, said: Sequence[str], key: str) -> str | None:
        """The key of the most similar earlier text; without one, None, and this text is remembered as `key`."""
        made = _signature(said)
        found = [(made.jaccard(self._signatures[other]), other) for other in sorted(self._index.query(made))]
        similarity, nearest = max(found, key=lambda pair: pair[0], default=(0.0, ""))
        if similarity >= self._threshold:
            return nearest
        self._signatures[key] = made
        self._index.insert(key, made, check_duplication=False)
        return None


def _signature(said: Sequence[str]) -> MinHash:
    from datasketch import MinHash

    shingles = {" ".join(said[i : i + _SHINGLE]) for i in range(max(1, len(said) - _SHINGLE + 1))}
    made = MinHash(num_perm=_PERMUTATIONS, seed=1)
    made.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return made
