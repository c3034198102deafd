"""Reading examples: identity, JSON Lines, and a message with file and line for everything that is no example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.config import SourceSection
from gradpursuit.data import Example
from gradpursuit.data import read_examples as read_inputs
from gradpursuit.data.readers import content_hash
from gradpursuit.errors import DataError
from gradpursuit.sources import expand


def read_examples(paths: list[str]) -> list[Example]:
    return list(read_inputs(expand([SourceSection(path=path) for path in paths])))


def write(tmp_path: Path, *rows: Any, name: str = "a.jsonl") -> str:
    path = tmp_path / name
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


def pair(prompt: str = "q", completion: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def chat(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def refused(path: str) -> str:
    with pytest.raises(DataError) as caught:
        read_examples([path])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_schemas_are_one_conversation(tmp_path: Path) -> None:
    lists = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    examples = read_examples([write(tmp_path, pair(), lists, chat(("user", "q"), ("assistant", "a")))])
    assert [e.conversation.messages for e in examples] == [
        ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    ] * 3
    assert len({content_hash(e.conversation) for e in examples}) == 1
    assert [(e.source[-7:], e.line) for e in examples] == [("a.jsonl", n) for n in (1, 2, 3)]


def test_every_original_column_is_kept(tmp_path: Path) -> None:
    row = pair("q", "ä👋", id="x", score=1.5, big=2**70, tags=["a", {"b": None}], meta={"z": 1, "a": True})
    example = read_examples([write(tmp_path, row)])[0]
    assert example.columns == row
    assert list(example.columns) == list(row)


def test_ids(tmp_path: Path) -> None:
    rows = [pair(id="x"), pair(id=7), pair(), pair(" q ", "a"), pair("other"), pair(id=None), pair(id="")]
    ids = [e.id for e in read_examples([write(tmp_path, *rows)])]
    hashed = ids[2]
    assert ids[:2] == ["x", "7"]
    assert len(hashed) == 16
    assert ids[3] == f"{hashed}-2"
    assert ids[4] not in (hashed, f"{hashed}-2")
    assert ids[5:] == [f"{hashed}-3", f"{hashed}-4"]


def test_ids_do_not_depend_on_place_or_columns(tmp_path: Path) -> None:
    one = read_examples([write(tmp_path, pair("a"), pair("b"), name="1.jsonl")])
    two = read_examples([write(tmp_path, pair("b", extra=1), pair("a"), name="2.jsonl")])
    assert {e.id for e in one} == {e.id for e in two}
    assert one[0].id == two[1].id


def test_content_hash_folds_white_space_alone(tmp_path: Path) -> None:
    def digest(prompt: str, completion: str = "a") -> str:
        return content_hash(read_examples([write(tmp_path, pair(prompt, completion))])[0].conversation)

    assert digest("a b") == digest(" a \n\t b ")
    assert digest("a b") != digest("ab")
    assert digest("a b") != digest("A b")
    assert digest("x", "y") != digest("xy", "")
    system = content_hash(read_examples([write(tmp_path, chat(("system", "x"), ("assistant", "y")))])[0].conversation)
    assert system != digest("x", "y")


def test_several_files_in_order(tmp_path: Path) -> None:
    paths = [write(tmp_path, pair("b"), name="b.jsonl"), write(tmp_path, pair("a"), pair("b"), name="a.jsonl")]
    examples = read_examples(paths)
    assert [e.conversation.messages[0]["content"] for e in examples] == ["b", "a", "b"]
    assert examples[2].id == f"{examples[0].id}-2"
    assert [e.source for e in examples] == [paths[0], paths[1], paths[1]]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "q", "completion": "a"}\n',
        b'\xef\xbb\xbf\n{"prompt": "q", "completion": "a"}\n',
        b'\n\n  \r\n{"prompt": "q", "completion": "a"}\n\n',
        b'{"prompt": "q", "completion": "a"}\r\n',
        b'{"prompt": "q", "completion": "a"}',
        b'  {"prompt":"q","completion":"a"}  \n',
    ],
    ids=["BOM", "BOM on an empty line", "blank lines", "CRLF", "no last newline", "spaces"],
)
def test_forms_of_lines(tmp_path: Path, content: bytes) -> None:
    (example,) = read_examples([write(tmp_path, content)])
    assert isinstance(example, Example)
    assert example.conversation.messages[0]["content"] == "q"


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, pair(), b"\n\n", b"{broken\n")
    assert f"{path}:4: not valid JSON" in refused(path)
    path = write(tmp_path, pair(), b'{"prompt": "q"\r\n')
    assert f"{path}:2: not valid JSON: Expecting ',' delimiter at column 15" in refused(path)


def test_line_separators_inside_text(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\rd"
    path = write(tmp_path, json.dumps(pair(text), ensure_ascii=False).encode() + b"\n", pair("z"))
    assert [e.conversation.messages[0]["content"] for e in read_examples([path])] == [text, "z"]


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "none.jsonl: cannot be read: No such file or directory" in refused(str(tmp_path / "none.jsonl"))
    message = refused(str(tmp_path))
    assert "a folder, but not one that datasets.save_to_disk wrote; name the files in it, as in" in message


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    assert "holds no examples; expected rows with 'messages', 'prompt' and 'completion'" in refused(
        write(tmp_path, content)
    )


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"prompt": "q"', "not valid JSON: "),
        (b"prompt,completion", "not valid JSON: Expecting value at column 1; expected one JSON object a line"),
        (b'[{"prompt": "q", "completion": "a"}]', "expected a JSON object, found list"),
        (b'"text"', "expected a JSON object, found str"),
        (b"5", "expected a JSON object, found int"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"prompt": "caf\xe9", "completion": "a"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"body": "x", "label": 1}', "columns found: 'body', 'label'; expected 'messages', 'prompt' and 'c"),
        (b'{"body": "x"}', "name the columns in data.columns, as in {prompt: question, completion: answer}"),
        (b'{"text": 5}', "'text' is int; expected text"),
        (b"{}", "columns found: none; expected"),
        (b'{"prompt": "q"}', "columns found: 'prompt'; expected"),
        (b'{"prompt": "q", "completion": 5}', "'prompt' is str and 'completion' is int; expected two strings or"),
        (b'{"prompt": "q", "completion": null}', "columns found: 'prompt', 'completion' (null); expected"),
        (b'{"prompt": [], "completion": []}', "'prompt': expected a list of"),
        (b'{"messages": "hi"}', "'messages': expected a list of"),
        (b'{"messages": []}', "'messages': expected a list of"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "'messages'[0]: expected 'role' and a text 'content'",
        ),
        (b'{"messages": ["hi"]}', "'messages'[0]: expected 'role' and a text 'content', found 'hi'"),
        (b'{"messages": [{"role": "user"}]}', "'messages'[0]: expected 'role' and a text 'content'"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "'messages'[0]: expected 'role' and"),
        (b'{"messages": [{"content": "x"}]}', "'messages'[0]: role None is not one of system, developer, user, assist"),
        (b'{"messages": [{"role": "human", "content": "x"}]}', "role 'human' is not one of"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "is not one of"),
        (b'{"prompt": "q", "completion": "a", "id": 1.5}', "'id' is 1.5; expected text or a whole number"),
        (b'{"prompt": "q", "completion": "a", "id": true}', "'id' is True; expected"),
        (b'{"prompt": "q", "completion": "a", "id": ["x"]}', "'id' is ['x']; expected"),
        (b'{"prompt": "q", "completion": "a", "n": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"prompt": "q \\ud83d", "completion": "a"}', "half a character (\\ud83d alone)"),
        (b'{"prompt": "q", "completion": "a", "note": {"x": ["\\udc00"]}}', "half a character (\\udc00 alone)"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: bytes, part: str) -> None:
    path = write(tmp_path, pair(), line + b"\n")
    message = refused(path)
    assert f"{path}:2: " in message
    assert part in message
    assert len(message) < 600


def test_whole_escaped_pairs_are_fine(tmp_path: Path) -> None:
    (example,) = read_examples([write(tmp_path, b'{"prompt": "\\ud83d\\ude00", "completion": "\\u00e9"}\n')])
    assert [m["content"] for m in example.conversation.messages] == ["😀", "é"]


def test_duplicate_ids_name_both_places(tmp_path: Path) -> None:
    path = write(tmp_path, pair("a", id=5), pair("b"), pair("c", id="5"))
    assert f"{path}:3: id '5' is already used at {path}:1; ids must be unique" in refused(path)
    other = write(tmp_path, pair("d", id="5"), name="b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl:1: id '5' is already used at .*c\.jsonl:1"):
        read_examples([write(tmp_path, pair(id=5), name="c.jsonl"), other])
