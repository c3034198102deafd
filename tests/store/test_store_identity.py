"""A store knows how it was made, part by part, and says which part is another one."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpursuit.errors import StoreError
from gradpursuit.store import GradientStore, Shard, StoreSpec
from gradpursuit.store.spec import differences
from stores import SPEC, filled

ORIGIN = {
    "model": {"name": "tiny", "sha256": "a" * 64},
    "adapter": {"r": 8, "targets": ["q_proj", "v_proj"]},
    "trajectory": ["c1" * 32, "c2" * 32],
    "data": "d" * 64,
    "masks": "f" * 64,
    "projection": {"name": "sparse-jl", "seed": 5, "dim": 6},
    "preconditioner": {"name": "adam", "bias_correction": True},
    "precision": "float32",
}
MADE = replace(SPEC, origin=ORIGIN)


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("model", {"name": "tiny", "sha256": "b" * 64}, r"settings: model\.sha256 differs;"),
        ("adapter", {"r": 16, "targets": ["q_proj", "v_proj"]}, r"adapter\.r is 8, expected 16"),
        ("adapter", {"r": 8, "targets": ["q_proj", "o_proj"]}, r"targets\[1\] is \"v_proj\", expected \"o_proj\""),
        ("trajectory", ["c1" * 32], "trajectory has 2 entries, expected 1"),
        ("data", "e" * 64, "settings: data differs;"),
        ("masks", "e" * 64, "settings: masks differs;"),
        ("projection", {"name": "sparse-jl", "seed": 6, "dim": 6}, r"projection\.seed is 5, expected 6"),
        ("projection", {"name": "sparse-jl", "dim": 6}, r"projection\.seed is 5, expected to be absent"),
        ("preconditioner", {"name": "adam", "bias_correction": 1}, r"bias_correction is true, expected 1"),
        ("precision", "bfloat16", 'precision is "float32", expected "bfloat16"'),
        ("dropout", 0.1, "dropout is absent, expected 0.1"),
        ("checkpoints", 3, "checkpoints is 2, expected 3"),
        ("dim", 8192, "dim is 6, expected 8192"),
        ("dtype", "int8", 'dtype is "float32", expected "int8"'),
        ("shard_rows", 4, "shard_rows is 3, expected 4"),
        ("version", 3, "version is 2, expected 3"),
        ("ids", [*SPEC.ids[:-1], "other"], r"ids\[6\] is \"id-6\", expected \"other\""),
    ],
)
def test_open_names_the_part_that_differs(tmp_path: Path, part: str, other: Any, message: str) -> None:
    filled(tmp_path / "s", MADE)
    expected = {**MADE.parts(), part: other}
    with pytest.raises(StoreError, match=message) as caught:
        GradientStore.open(tmp_path / "s", expected)
    assert "; collect the gradients again" in str(caught.value)
    assert len(re.findall("expected|differs", str(caught.value))) == 1  # that part and no other
    with pytest.raises(StoreError, match=message):
        GradientStore.open(tmp_path / "s", {part: other})


def test_open_accepts_what_was_made_so(tmp_path: Path) -> None:
    filled(tmp_path / "s", MADE)
    assert GradientStore.open(tmp_path / "s", MADE.parts()).spec == MADE
    assert GradientStore.open(tmp_path / "s", {"adapter": {"r": 8, "targets": ("q_proj", "v_proj")}}).spec == MADE
    assert GradientStore.open(tmp_path / "s", {}).spec == MADE


def test_every_part_that_differs_is_told() -> None:
    other = {**MADE.parts(), "dim": 7, "precision": "bfloat16"}
    assert list(differences(MADE.parts(), other)) == [
        "dim is 6, expected 7",
        'precision is "float32", expected "bfloat16"',
    ]


def test_create_says_what_differs_before_it_replaces_a_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path / "s", MADE)
    changed = {**ORIGIN, "projection": {"name": "sparse-jl", "seed": 6, "dim": 6}}
    with caplog.at_level(logging.WARNING, "gradpursuit"):
        GradientStore.create(tmp_path / "s", replace(MADE, origin=changed))
    record, kept = caplog.records
    assert kept.getMessage() == f"{tmp_path / '.s.gradpursuit-before'}: kept there until you delete it"
    assert record.name == "gradpursuit"
    assert "made with other settings: projection.seed is 5, expected 6; they are replaced" in record.getMessage()
    assert not list((tmp_path / "s").rglob("*.safetensors"))


def test_create_with_an_equal_spec_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path / "s", MADE)
    tuples = {**ORIGIN, "trajectory": tuple(ORIGIN["trajectory"])}
    store = GradientStore.create(tmp_path / "s", replace(MADE, origin=tuples))
    assert all(store.has(t, s) for t in range(2) for s in range(3))
    assert not caplog.records


def test_unknown_type_and_parts_with_taken_names_are_refused() -> None:
    with pytest.raises(StoreError, match="'float8' is unknown; use one of float32, float16, bfloat16, int8"):
        replace(SPEC, dtype="float8")
    with pytest.raises(StoreError, match=r"names \['dim'\]"):
        StoreSpec(("a",), 1, 4, "float32", 1, {"dim": 4})


def test_a_whole_store_with_other_settings_stays_beside_until_another_is_whole(tmp_path: Path) -> None:
    from gradpursuit.aside import before, replacing, unfinished

    folder, small = tmp_path / "s", {"checkpoints": 1, "dim": 2, "dtype": "float32", "shard_rows": 4, "origin": {}}
    old, new = StoreSpec(("a",), **small), StoreSpec(("a", "b"), **small)  # type: ignore[arg-type]
    ones = np.ones(1, np.float32)
    shard = Shard(np.ones((1, 2), np.float32), ones, ones, ones.astype(np.int32), np.arange(1))
    GradientStore.create(folder, old).write(0, 0, shard)
    for _ in range(2):
        GradientStore.create(folder, new)
        assert GradientStore.open(before(folder)).verify() == []
        GradientStore.create(folder, StoreSpec(("c",), **small))  # type: ignore[arg-type]  # two that are not whole
    GradientStore.create(folder, old).write(0, 0, shard)
    (tmp_path / "run.json").write_text("")

    def fail() -> None:
        with replacing(tmp_path, "gradients", [], keep_unfinished=True):
            made = GradientStore.create(folder, new)
            assert not made.has_all_files()
            (folder / "begun").write_text("")
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert GradientStore.open(folder).spec == old
        assert GradientStore.open(folder).verify() == []
        assert (unfinished(folder) / "begun").is_file()
