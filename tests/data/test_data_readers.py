"""Reading examples: identity, JSON Lines, and a message with file and line for everything that is no example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.config import SourceSection
from gradpursuit.data import Example, Unreadable
from gradpursuit.data import read_examples as read_inputs
from gradpursuit.data.readers import content_hash
from gradpursuit.errors import DataError
from gradpursuit.sources import expand


def read_examples(paths: list[str]) -> list[Example]:
    return [
        row for row in read_inputs(expand([SourceSection(path=path) for path in paths])) if isinstance(row, Example)
    ]


def write(tmp_path: Path, *rows: Any, name: str = "a.jsonl") -> str:
    path = tmp_path / name
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


def pair(prompt: str = "q", completion: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def chat(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def unreadable(path: str, line: int) -> str:
    """What is wrong with one line of a file whose other lines are examples."""
    (found,) = [row for row in read_inputs(expand([SourceSection(path=path)])) if isinstance(row, Unreadable)]
    assert (found.file, found.line, found.source) == (path, line, path)
    assert "\n" not in found.detail
    assert len(found.detail) < 600
    assert 0 < len(found.reason) <= 160
    return found.detail


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
    assert "not valid JSON" in unreadable(path, 4)
    path = write(tmp_path, pair(), b'{"prompt": "q"\r\n')
    assert "not valid JSON: Expecting ',' delimiter at column 15" in unreadable(path, 2)


def test_line_separators_inside_text(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\rd"
    path = write(tmp_path, json.dumps(pair(text), ensure_ascii=False).encode() + b"\n", pair("z"))
    assert [e.conversation.messages[0]["content"] for e in read_examples([path])] == [text, "z"]


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "none.jsonl: cannot be read: No such file or directory" in refused(str(tmp_path / "none.jsonl"))
    assert refused(str(tmp_path)).endswith(
        "not one that datasets.save_to_disk wrote; name a file of .jsonl, .ndjson, "
        ".json, .csv, .tsv, .parquet, .pq, .arrow, .feather: the folder holds none"
    )
    write(tmp_path, b"")
    assert f"wrote; name the files in it, as in {tmp_path}/*.jsonl" in refused(str(tmp_path))


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
        (b'{"prompt": "q", "completion": 5}', "'prompt' is str and 'completion' is int; expected strings or lists"),
        (b'{"prompt": "q", "completion": null}', "'completion' is null, so the row lacks a part"),
        (b'{"instruction": "q", "input": "", "output": null}', "'output' is null, so the row lacks a part"),
        (b'{"prompt": [], "completion": []}', "'prompt': expected a list of"),
        (b'{"messages": "hi"}', "'messages': expected a list of"),
        (b'{"messages": []}', "'messages': expected a list of"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "'messages'[0]: part 1 of the content is of type 'image_url', or not whole; only text",
        ),
        (b'{"messages": ["hi"]}', "'messages'[0]: expected 'role' and a text 'content', found 'hi'"),
        (b'{"messages": [{"role": "user"}]}', "'messages'[0]: expected 'role' and a text 'content'"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "part 1 of the content is of type 'text'"),
        (b'{"messages": [{"content": "x"}]}', "'messages'[0]: role None is not one of system, developer, user, assist"),
        (b'{"messages": [{"role": "alien", "content": "x"}]}', "role 'alien' is not one of"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "is not one of"),
        (b'{"prompt": "q", "completion": "a", "id": 1.5}', "'id' is 1.5; expected text or a whole number"),
        (b'{"prompt": "q", "completion": "a", "id": true}', "'id' is True; expected"),
        (b'{"prompt": "q", "completion": "a", "id": ["x"]}', "'id' is ['x']; expected"),
        (b'{"prompt": "q", "completion": "a", "n": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b"[" * 200_000, "nested more than 100 deep"),
        (b'{"prompt": "q", "completion": "a", "n": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 deep"),
        (b'{"messages": "' + b"[" * 200_000 + b'"}', "nested more than 100 deep"),
        (b'{"prompt": "q", "completion": "a", "tools": "' + b"[" * 200_000 + b'"}', "nested more than 100 deep"),
        (b'{"prompt": "q", "completion": "a", "prompt": "r"}', "the key 'prompt' is there twice"),
        (b'{"messages": [{"role": "user", "role": "tool", "content": "x"}]}', "the key 'role' is there twice"),
        (b'{"prompt": "q", "completion": "a", "a\\u0000b": 1}', "column 'a\\x00b': a name with the character NUL"),
        (b'{"conversations": []}', "'conversations': expected a list"),
        (b'{"conversations": [{"from": "gpt", "value": null}]}', "'conversations'[0]: expected 'from' and a text"),
        (b'{"prompt": "q \\ud83d", "completion": "a"}', "half a character (\\ud83d alone)"),
        (b'{"prompt": "q", "completion": "a", "note": {"x": ["\\udc00"]}}', "half a character (\\udc00 alone)"),
    ],
)  # fmt: skip
def test_bad_lines_are_unreadable(tmp_path: Path, line: bytes, part: str) -> None:
    path = write(tmp_path, pair(), line + b"\n", pair("z"))
    assert part in unreadable(path, 2)
    alone = write(tmp_path, line + b"\n", name="alone.jsonl")
    if not line.startswith(b"\xff\xfe"):  # then the whole file is taken for UTF-16
        assert part in refused(alone)


def test_a_mistake_of_the_whole_file_stops_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"body": str(i)} for i in range(40)])
    message = refused(path)
    assert message.startswith(f"{path}:1: columns found: 'body'; expected")
    assert message.endswith("(all 40 rows cannot be read)")
    path = write(tmp_path, b"{\n", *[{"body": str(i)} for i in range(1200)], pair())
    assert refused(path).startswith(f"{path}:2: columns found: 'body'; expected")
    assert refused(path).endswith("(the first 1,000 rows cannot be read)")
    path = write(tmp_path, *[{"body": str(i)} for i in range(999)], pair())
    assert len(read_examples([path])) == 1


def test_unreadable_rows_keep_their_order_and_ids(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "x", "text": 5}, b"{\n", pair("a"), {"id": 7, "text": None}, pair("b"))
    found = list(read_inputs(expand([SourceSection(path=path)])))
    assert [row.line for row in found] == [1, 2, 3, 4, 5]
    assert [row.id for row in found if isinstance(row, Unreadable)] == ["x", f"{path}:2", "7"]
    assert [row.reason for row in found if isinstance(row, Unreadable)][:2] == [
        "'text' is int",
        "not valid JSON: Expecting property name enclosed in double quotes",
    ]


def test_not_a_number_becomes_null(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, b'{"prompt": "q", "completion": "a", "x": NaN, "y": [1e999, {"z": -Infinity}]}\n', pair("b"))
    first, second = read_examples([path])
    assert first.columns == {"prompt": "q", "completion": "a", "x": None, "y": [None, {"z": None}]}
    assert json.loads(first.original, parse_constant=pytest.fail) == first.columns
    assert caplog.text.count("holds NaN or infinity") == 1
    assert second.columns == pair("b")


def test_whole_escaped_pairs_are_fine(tmp_path: Path) -> None:
    (example,) = read_examples([write(tmp_path, b'{"prompt": "\\ud83d\\ude00", "completion": "\\u00e9"}\n')])
    assert [m["content"] for m in example.conversation.messages] == ["😀", "é"]


def test_the_same_id_twice_in_a_source_names_both_places(tmp_path: Path) -> None:
    path = write(tmp_path, pair("a", id=5), pair("b"), pair("c", id="5"))
    assert f"{path}:3: id '5' is already used at {path}:1; ids must be unique in a source" in refused(path)
    write(tmp_path, pair("d", id="5"), name="b.jsonl")
    write(tmp_path, pair(id=5), name="c.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl:1: id '5' is already used at .*b\.jsonl:1"):
        list(read_inputs(expand([SourceSection(path=str(tmp_path / "[bc].jsonl"), name="mine")])))


def test_sources_may_number_their_own_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    paths = [write(tmp_path, *[pair(f"{name}{i}", id=i) for i in range(3)], name=f"{name}.jsonl") for name in "ab"]
    paths.append(write(tmp_path, pair("x", id="b.jsonl/0"), pair("y", id=0), pair("z", id=9), name="c.jsonl"))
    ids = [example.id for example in read_examples(paths)]
    assert ids == [*"012", "b.jsonl/0", "b.jsonl/1", "b.jsonl/2", "c.jsonl/b.jsonl/0", "c.jsonl/0", "9"]
    assert "note: 3 ids of b.jsonl are also those of an earlier source; they are b.jsonl/ID" in caplog.text
    named = [SourceSection(path=path, name=name) for path, name in zip(paths, ("one", "two"), strict=False)]
    assert [row.id for row in read_inputs(expand(named))] == [*"012", "two/0", "two/1", "two/2"]
