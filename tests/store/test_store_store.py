"""The gradient store: what is written comes back, and nothing broken, foreign or incomplete is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradpursuit.errors import GradPursuitError, RunError, StoreError
from gradpursuit.files import write_json
from gradpursuit.store import DTYPES, GradientStore
from gradpursuit.store.encoding import encode
from stores import SPEC, filled, shard


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    filled(tmp_path / "s", spec)
    store = GradientStore.open(tmp_path / "s")
    assert store.spec == spec
    for t in range(2):
        for s in range(3):
            read, written = store.read(t, s, verify=True), shard(spec, t, s)
            assert read.features.dtype == DTYPES[dtype]
            encoded = encode(written.features, dtype)
            np.testing.assert_array_equal(np.asarray(read.block), np.asarray(encoded))
            np.testing.assert_allclose(np.asarray(read.block), written.features, atol=0.02)
            for name in ("norm", "loss", "tokens", "row"):
                np.testing.assert_array_equal(getattr(read, name), getattr(written, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_tools_read_the_files(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    spec = replace(SPEC, dtype=dtype)
    tensors = load_file(filled(tmp_path / "s", spec).path(1, 1))
    assert tensors["features"].dtype == getattr(torch, dtype)
    decoded = tensors["features"].double()
    if dtype in ("float16", "int8"):
        decoded *= tensors.pop("scale").double()[:, None]
    assert sorted(tensors) == ["features", "loss", "norm", "row", "tokens"]
    np.testing.assert_allclose(decoded.numpy(), shard(spec, 1, 1).features, atol=0.02)


def test_features_are_memory_mapped_blocks_in_row_order(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    blocks = store.features()
    assert [[block.shape for block in shards] for shards in blocks] == [[(3, 6), (3, 6), (1, 6)]] * 2
    values = [block.values for shards in blocks for block in shards]
    assert all(isinstance(array, np.memmap) and array.mode == "r" for array in values)
    for t, shards in enumerate(blocks):
        expected = np.concatenate([shard(SPEC, t, s).features for s in range(3)])
        np.testing.assert_array_equal(np.concatenate(shards), expected)


@pytest.mark.parametrize("name", ["norm", "loss", "tokens"])
def test_columns_are_checkpoints_by_rows(tmp_path: Path, name: str) -> None:
    column = filled(tmp_path / "s").column(name)
    assert column.shape == (2, 7)
    np.testing.assert_array_equal(column[1], np.concatenate([getattr(shard(SPEC, 1, s), name) for s in range(3)]))


def test_shards_cover_all_rows_once() -> None:
    assert [(r.start, r.stop) for r in SPEC.shards()] == [(0, 3), (3, 6), (6, 7)]
    assert SPEC.nbytes == 2 * 7 * 6 * 4
    assert replace(SPEC, dtype="bfloat16").nbytes == 2 * 7 * 6 * 2
    assert replace(SPEC, dtype="int8").nbytes == 2 * 7 * (6 + 4)  # a scale for each row


def test_same_content_same_bytes(tmp_path: Path) -> None:
    one, two = filled(tmp_path / "a"), filled(tmp_path / "b")
    for t in range(2):
        for s in range(3):
            assert one.path(t, s).read_bytes() == two.path(t, s).read_bytes()
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_create_goes_on_with_an_equal_spec(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    store.path(1, 2).unlink()
    again = GradientStore.create(tmp_path / "s", SPEC)
    present = {(t, s): again.has(t, s) for t in range(2) for s in range(3)}
    assert [key for key, there in present.items() if not there] == [(1, 2)]


@pytest.mark.parametrize(
    "change",
    [
        {"ids": (*SPEC.ids[:-1], "other")},
        {"checkpoints": 3},
        {"dim": 5},
        {"dtype": "float16"},
        {"shard_rows": 4},
        {"origin": {"model": {"a": 2}, "eps": 1e-08}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_create_with_another_spec_starts_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    filled(tmp_path / "s")
    spec = replace(SPEC, **change)
    assert spec.fingerprint != SPEC.fingerprint
    store = GradientStore.create(tmp_path / "s", spec)
    assert not any(store.has(t, s) for t in range(spec.checkpoints) for s in range(len(spec.shards())))
    assert not list((tmp_path / "s").rglob("*.safetensors"))
    assert GradientStore.open(tmp_path / "s").spec == spec


def test_create_refuses_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"the gradient store needs .* MiB"):
        GradientStore.create(tmp_path / "s", SPEC)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    store.path(1, 0).unlink()
    assert not store.has(1, 0)
    with pytest.raises(StoreError, match=r"checkpoint-2/shard-00000\.safetensors: not there"):
        GradientStore.open(tmp_path / "s").features()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    store = GradientStore.create(tmp_path / "s", SPEC)
    content = shard(SPEC, 0, 1)
    content.features[1, 4] = value
    with pytest.raises(StoreError, match=r"1 rows are not finite \(first: \[4\]\); drop them"):
        store.write(0, 1, content)
    assert not list((tmp_path / "s").rglob("*safetensors*"))


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 3.4e38), ("bfloat16", 1e-45), ("int8", 1e-37)])
def test_what_a_type_cannot_hold_is_refused_with_the_way_out(tmp_path: Path, dtype: str, value: float) -> None:
    store = GradientStore.create(tmp_path / "s", replace(SPEC, dtype=dtype))
    content = shard(SPEC, 0, 0)
    content.features[2] = value
    message = (
        rf"1 rows are outside the range of {dtype} \(first: \[2\]\); use gradients.store_dtype: float32 or float16"
    )
    with pytest.raises(StoreError, match=message):
        store.write(0, 0, content)
    assert store.state(0, 0) == ("missing", "not there")


def test_zero_row_is_refused(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", SPEC)
    content = shard(SPEC, 0, 1)
    content.features[0] = 0
    with pytest.raises(StoreError, match=r"1 rows are all zeros \(first: \[3\]\)"):
        store.write(0, 1, content)


def test_wrong_rows_shapes_or_types_are_refused(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", SPEC)
    good = shard(SPEC, 0, 1)
    for bad, message in (
        (shard(SPEC, 0, 0), "other rows than 3-5"),
        (shard(SPEC, 0, 2), "other rows than 3-5"),
        (replace(good, row=good.row[::-1].copy()), "ascending order"),
        (replace(good, row=good.row[[0, 0, 1]]), "other rows than 3-5"),
        (replace(good, dropped={4: "it is there"}), "other rows than 3-5"),
        (replace(good, dropped={9: "it is elsewhere"}), "other rows than 3-5"),
        (replace(good, norm=good.norm[:2]), "not n rows"),
        (replace(good, features=good.features[:, :5]), r"\(3, 5\), expected float32 \(3, 6\)"),
        (replace(good, features=good.features[:2]), r"\(2, 6\), expected float32 \(3, 6\)"),
        (replace(good, features=good.features.astype(np.float16)), "float16 .* expected float32"),
    ):
        with pytest.raises(StoreError, match=message):
            store.write(0, 1, bad)
    assert not store.has(0, 1)


def test_open_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no gradient store; collect the gradients first"):
        GradientStore.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", 7, "do not match its fingerprint"),
        ("shard_rows", 2, "do not match its fingerprint"),
        ("dtype", "float16", "do not match its fingerprint"),
        ("dtype", "float7", "do not match its fingerprint"),
        ("rows", 8, "do not match its fingerprint"),
        ("ids", ["a"], "do not match its fingerprint"),
        ("ids", 5, "do not match its fingerprint"),
        ("origin", {"model": {"a": 3}}, "do not match its fingerprint"),
        ("origin", 3, "do not match its fingerprint"),
        ("origin", {"dim": 3}, "do not match its fingerprint"),
        ("fingerprint", "0" * 64, "do not match its fingerprint"),
        ("version", 3, "version 3, this one reads 2"),
    ],
)
def test_manifest_edited_by_hand(tmp_path: Path, key: str, value: Any, message: str) -> None:
    filled(tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    write_json(manifest, {**json.loads(manifest.read_text()), key: value})
    with pytest.raises(StoreError, match=message):
        GradientStore.open(tmp_path / "s")


def test_any_other_text_of_a_manifest_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    text = manifest.read_text()
    for changed in (text.replace("\n", "\n "), text[:-1], text.replace(",", " ,", 1)):
        manifest.write_text(changed)
        with pytest.raises(StoreError, match="do not match its fingerprint"):
            GradientStore.open(tmp_path / "s")


def test_a_shard_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    store.path(0, 0).write_bytes(store.path(1, 0).read_bytes())
    with pytest.raises(StoreError, match="it holds checkpoint 2, not 1"):
        store.read(0, 0)
    assert ["it holds checkpoint 2, not 1" in problem.reason for problem in store.verify()] == [True]


@pytest.mark.parametrize("key", ["ids", "checkpoints", "origin", "fingerprint", "dim"])
def test_manifest_without_a_key(tmp_path: Path, key: str) -> None:
    filled(tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    value = json.loads(manifest.read_text())
    del value[key]
    manifest.write_text(json.dumps(value))
    with pytest.raises(StoreError, match=f"'{key}' is missing"):
        GradientStore.open(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "\x00"])
def test_manifest_that_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    filled(tmp_path / "s")
    (tmp_path / "s/manifest.json").write_text(text)
    with pytest.raises(GradPursuitError, match=r"manifest\.json"):
        GradientStore.open(tmp_path / "s")
