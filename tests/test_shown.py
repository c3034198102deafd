"""What is shown: no control characters, no secrets."""

from __future__ import annotations

import json

import pytest

from gradpursuit.shown import escaped, json_text, shown, without_secrets


def test_control_characters_are_written_out() -> None:
    assert escaped("a\x1b[2Jb\x9bc\u202ed\udcffe\r") == "a\\x1b[2Jb\\x9bc\\u202ed\\udcffe\\r"
    assert escaped("नमस्ते 👩\u200d🔬\n\té") == "नमस्ते 👩\u200d🔬\n\té"
    assert shown("id\nwarning: forged\t1") == "id\\nwarning: forged\\t1"


def test_json_stays_what_it_was() -> None:
    value = {"a\x9b": ["\u202e", "\udc80", "é", "\x1b"]}
    assert json.loads(json_text(value)) == value
    assert "é" in json_text(value)
    assert not set(json_text(value)) & set("\x9b\u202e\udc80\x1b")


@pytest.mark.parametrize(
    "text",
    [
        "https://me:SECRETVALUE@host/x",
        "cannot read /work/https:/me:SECRETVALUE@host/x.jsonl",
        "postgres://me:SECRET/VALUE@host/x".replace("SECRET/VALUE", "SEC/SECRETVALUE"),
        "https://host/x?token=SECRETVALUE&b=1",
        "GET /x?X-Amz-Signature=SECRETVALUE&X-Amz-Date=1",
        "headers: {'Authorization': 'Bearer SECRETVALUE'}",
        "Authorization: Basic SECRETVALUE==",
        "password=SECRETVALUE",
        '{"api_key": "SECRETVALUE"}',
        "hf_SECRETVALUESECRETVALUE",
        "AWS_SECRET_ACCESS_KEY=SECRETVALUE",
    ],
)
def test_secrets_are_taken_out(text: str) -> None:
    assert "SECRETVALUE" not in without_secrets(text)


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://me:p%40ssw0rd@index.example/simple https://host/")
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")
    assert without_secrets("with p@ssw0rd, p%40ssw0rd and abcdefgh1234") == "with ***, *** and ***"


@pytest.mark.parametrize(
    "text", ["git@host: 3 tokens", "token '<|tool|>' (49152) is past", "pad_token = None", "column 'api_key' is text"]
)
def test_other_words_stay(text: str) -> None:
    assert without_secrets(text) == text
