"""Which rows repeat others: exactly, up to white space and case, or nearly, by MinHash."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradpursuit.data.schemas import Conversation
from gradpursuit.data.words import words

if TYPE_CHECKING:
    from datasketch import MinHash

_IDLE_SPACE = re.compile(r"(?<!\w) | (?!\w)")
_SHINGLE = 3  # words
_PERMUTATIONS = 128


def text_hash(text: str) -> str:
    """sha256 (hex) of a text with its case folded, and its white space: one space between words, none elsewhere.

    White space beside punctuation is folded away, because in rendered text a turn's own edges lie beside marks.
    Characters with marks are composed first, so that both ways to write one are the same.
    """
    folded = unicodedata.normalize("NFC", text.casefold())
    return hashlib.sha256(_IDLE_SPACE.sub("", " ".join(folded.split())).encode("utf-8", "surrogatepass")).hexdigest()


def exact_hash(input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """sha256 (hex) of tokens and labels [L]: equal for rows that train a model in the same way."""
    return hashlib.sha256(np.array([input_ids, labels], dtype="<i8").tobytes()).hexdigest()


def said(conversation: Conversation) -> list[str]:
    """The words of everything that is said, in order, as :func:`~gradpursuit.data.words.words` finds them."""
    if conversation.text is not None:
        return words(conversation.text)
    return [word for message in conversation.messages for word in words(message["content"])]


class Copies:
    """The first row of every hash; about 250 bytes of memory for each."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._first)

    def first(self, digest: str, name: str) -> str | None:
        """The id of an earlier row with the same hash; without one, None, and the row `name` is remembered."""
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

    def first(self, text: Sequence[str], key: str) -> str | None:
        """The key of the most similar earlier text; without one, None, and this text is remembered as `key`."""
        made = _signature(text)
        found = [(made.jaccard(self._signatures[other]), other) for other in sorted(self._index.query(made))]
        similarity, nearest = max(found, key=lambda pair: pair[0], default=(0.0, ""))
        if similarity >= self._threshold:
            return nearest
        self._signatures[key] = made
        self._index.insert(key, made, check_duplication=False)
        return None


def _signature(text: Sequence[str]) -> MinHash:
    from datasketch import MinHash

    shingles = {" ".join(text[i : i + _SHINGLE]) for i in range(max(1, len(text) - _SHINGLE + 1))}
    made = MinHash(num_perm=_PERMUTATIONS, seed=1)
    made.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in sorted(shingles)])
    return made
