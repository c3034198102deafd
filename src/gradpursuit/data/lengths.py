"""A lower bound on the tokens of a text, so that a text of megabytes is not tokenized only to be dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Steps before the model that pass every character on; normalizers are run, not looked at.
_KEEP = ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "Split", "Punctuation")


class Bound:
    """How few tokens a text can have: its characters, each in one token, by those of the longest token.

    It holds for byte-pair encoding in which no character is lost and none is joined to others as unknown; of any other
    tokenizer nothing is known, and the bound is 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer
        parts = json.loads(backend.to_str())
        self._normalizer, self._lost = backend.normalizer, _lost(parts)
        self._longest = max(map(len, tokenizer.get_vocab()), default=0)
        # An added token may swallow the white space beside it.
        self._white = not any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"])

    def of(self, text: str) -> int:
        """Tokens that `text` has at least."""
        if self._lost is None:
            return 0
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        count = len(text) if self._white else sum(map(len, text.split()))
        count -= sum(map(text.count, self._lost))
        return max(0, -(-count // self._longest))


def _lost(parts: Mapping[str, Any]) -> list[str] | None:
    """The characters that may become no token of their own; None: they are not known."""
    model, steps = parts["model"], list(_steps(parts["pre_tokenizer"]))
    if model["type"] != "BPE" or any(step["type"] not in _KEEP or step.get("behavior") == "Removed" for step in steps):
        return None
    vocabulary = model["vocab"]
    if any(step["type"] == "ByteLevel" for step in steps):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        # A byte that the vocabulary lacks is left out. Every character that is not ASCII has a byte from 0x80 to 0xBF.
        lacking = [byte for byte, letter in bytes_to_unicode().items() if letter not in vocabulary]
        return None if any(0x80 <= byte <= 0xBF for byte in lacking) else [chr(byte) for byte in lacking if byte < 128]
    every = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) if model.get("byte_fallback") else False
    return [] if every or (model.get("unk_token") and not model.get("fuse_unk")) else None


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    else:
        yield step
