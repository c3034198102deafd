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
        self._normalizer = backend.normalizer
        self._longest = max(map(len, tokenizer.get_vocab()), default=0) if _is_known(parts) else 0
        # An added token may swallow the white space beside it.
        self._white = not any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"])

    def of(self, text: str) -> int:
        """Tokens that `text` has at least."""
        if not self._longest:
            return 0
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        count = len(text) if self._white else sum(map(len, text.split()))
        return -(-count // self._longest)


def _is_known(parts: Mapping[str, Any]) -> bool:
    model, steps = parts["model"], list(_steps(parts["pre_tokenizer"]))
    if model["type"] != "BPE" or any(step["type"] not in _KEEP or step.get("behavior") == "Removed" for step in steps):
        return False
    vocabulary = model["vocab"]
    if any(step["type"] == "ByteLevel" for step in steps):
        from tokenizers.pre_tokenizers import ByteLevel

        return all(letter in vocabulary for letter in ByteLevel.alphabet())
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return bool(model.get("unk_token")) and not model.get("fuse_unk")


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    else:
        yield step
