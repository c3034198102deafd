"""The bound on the tokens of a text is never above what the text has, and a text of megabytes is not tokenized."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gradpursuit.data import Renderer
from gradpursuit.data.lengths import Bound
from gradpursuit.data.schemas import Conversation
from gradpursuit.errors import DataError

USER = {"role": "user", "content": "q"}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


def texts(tokenizer: Any) -> list[str]:
    drawn = random.Random(0)
    longest = sorted(tokenizer.get_vocab(), key=len)[-40:]
    made = [tokenizer.decode(tokenizer.convert_tokens_to_ids([drawn.choice(longest)] * 8)) for _ in range(50)]
    ranges = ((1, 32), (32, 127), (0xA0, 0x2FFF), (0x1F300, 0x1F6FF), (0xF0000, 0xF00FF))
    made += ["".join(chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(150)) for _ in range(150)]
    return [*made, *(mark * 3000 for mark in " \n\t-=aé\u0301\x04\x1d")]


def test_it_is_below_what_a_text_has(tokenizer: Any) -> None:
    bound = Bound(tokenizer)
    assert bound.of("a" * 81_000) == 1000, "the longest token has 81 characters"
    for text in texts(tokenizer):
        assert bound.of(text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_white_space_beside_an_added_token_does_not_count(tokenizer: Any) -> None:
    from tokenizers import AddedToken

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = " " * 10_000 + "<mask>" + "\n" * 10_000
    assert len(made(text)["input_ids"]) == 1 == Bound(made).of(text)


def test_nothing_is_known_of_other_tokenizers() -> None:
    from tokenizers import models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fused = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    lost = Tokenizer(models.BPE({"a": 0}, []))
    for backend in (words, fused, lost):
        made = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert len(made("z" * 1000)["input_ids"]) <= 1
        assert Bound(made).of("z" * 1000) == 0


def test_a_long_row_is_not_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(tokenizer)
    long = Conversation((USER, {"role": "assistant", "content": "word " * 300_000}))
    short = Conversation((USER, {"role": "assistant", "content": "a"}))
    seen: list[str] = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, found, **more: seen.extend(found) or call(self, found, **more)
    )
    refused, made = renderer.many([long, short], 1024)
    assert isinstance(refused, DataError)
    assert str(refused) == "longer than max_tokens"
    assert not isinstance(made, DataError)
    assert max(map(len, seen)) < 1000


def test_reasoning_that_a_template_cuts_does_not_count(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    cut = Conversation((USER, {"role": "assistant", "content": f"<think>{'x' * 100_000}</think>a"}, USER))
    plain = Conversation((USER, {"role": "assistant", "content": "x" * 100_000}, USER))
    assert not renderer._is_longer(cut, 1024)
    assert renderer._is_longer(plain, 1024)
    assert not renderer._is_longer(plain, 1300)
    assert renderer._is_longer(Conversation(text="x" * 100_000), 1024)
