"""The gradient store: what is written comes back, and nothing broken, foreign or incomplete is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpursuit.errors import GradPursuitError, RunError, StoreError
from gradpursuit.store import GradientStore, Shard, StoreSpec

SPEC = StoreSpec(tuple(f"id-{i}" for i in range(7)), 2, 6, "float32", 3, {"model": {"a": 1}, "eps": 1e-08})


def shard(spec: StoreSpec, checkpoint: int, number: int) -> Shard:
    rows = spec.shards()[number]
    rng = np.random.default_rng([checkpoint, number])
    return Shard(
        rng.standard_normal((len(rows), spec.dim)).astype(spec.dtype),
        rng.random(len(rows), dtype=np.float32) + 1,
        rng.random(len(rows), dtype=np.float32),
        rng.integers(1, 90, len(rows)).astype(np.int32),
        np.arange(rows.start, rows.stop, dtype=np.int64),
    )


def filled(folder: Path, spec: StoreSpec = SPEC) -> GradientStore:
    store = GradientStore.create(folder, spec)
    for t in range(spec.checkpoints):
        for s in range(len(spec.shards())):
            store.write(t, s, shard(spec, t, s))
    return store


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    filled(tmp_path / "s", spec)
    store = GradientStore.open(tmp_path / "s")
    assert store.spec == spec
    for t in range(2):
        for s in range(3):
            read, written = store.read(t, s, verify=True), shard(spec, t, s)
            assert read.features.dtype == np.dtype(dtype)
            for name in ("features", "norm", "loss", "tokens", "row"):
                np.testing.assert_array_equal(getattr(read, name), getattr(written, name))


def test_features_are_memory_mapped_blocks_in_row_order(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    blocks = store.features()
    assert [[block.shape for block in shards] for shards in blocks] == [[(3, 6), (3, 6), (1, 6)]] * 2
    assert all(isinstance(block, np.memmap) and block.mode == "r" for shards in blocks for block in shards)
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


def test_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    foreign = filled(tmp_path / "o", replace(SPEC, origin={"model": {"a": 2}}))
    shutil.copy(foreign.path(0, 1), store.path(0, 1))
    with pytest.raises(StoreError, match="made with other settings"):
        store.read(0, 1)
    assert not store.has(0, 1)


def test_shard_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    shutil.copy(store.path(0, 0), store.path(0, 1))
    with pytest.raises(StoreError, match="other rows than 3-5"):
        store.read(0, 1)


def test_no_single_wrong_byte_is_read_as_a_shard(tmp_path: Path) -> None:
    """Every byte of a shard in turn, in several ways: refused with a StoreError, or the content is unharmed."""
    store = filled(tmp_path / "s")
    path = store.path(0, 2)
    whole, expected = path.read_bytes(), shard(SPEC, 0, 2)
    unnoticed = []
    for place in range(len(whole)):
        for mask in (0x01, 0x0F, 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            try:
                read = store.read(0, 2, verify=True)
            except StoreError:
                continue
            np.testing.assert_array_equal(read.features, expected.features)
            np.testing.assert_array_equal(read.norm, expected.norm)
            unnoticed.append(place)
    assert len(unnoticed) < 20  # padding of the header at most


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1])
def test_truncated_shard_is_refused_even_unverified(tmp_path: Path, length: int) -> None:
    store = filled(tmp_path / "s")
    path = store.path(0, 0)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StoreError, match="not a whole shard"):
        store.read(0, 0)


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b'{"__metadata__": []}', b'{"__metadata__": {"sha256": "x"}}', b"\xff"]
)
def test_foreign_header_is_refused(tmp_path: Path, header: bytes) -> None:
    store = filled(tmp_path / "s")
    store.path(0, 0).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StoreError, match="not a whole shard"):
        store.read(0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    store = GradientStore.create(tmp_path / "s", SPEC)
    content = shard(SPEC, 0, 1)
    content.features[1, 4] = value
    with pytest.raises(StoreError, match=r"1 rows are not finite in float32 \(first: \[4\]\)"):
        store.write(0, 1, content)
    assert not list((tmp_path / "s").rglob("*safetensors*"))


def test_float16_overflow_is_refused_with_the_way_out(tmp_path: Path) -> None:
    spec = replace(SPEC, dtype="float16")
    store = GradientStore.create(tmp_path / "s", spec)
    content = shard(SPEC, 0, 0)
    content.features[2, 0] = 70_000.0
    with np.errstate(over="ignore"), pytest.raises(StoreError, match="store_dtype: float32"):
        store.write(0, 0, replace(content, features=content.features.astype(np.float16)))


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
        (replace(good, row=good.row[::-1].copy()), "other rows than 3-5"),
        (replace(good, norm=good.norm[:2]), "other rows than 3-5"),
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
        ("dim", 7, "changed by hand"),
        ("shard_rows", 2, "changed by hand"),
        ("dtype", "float16", "changed by hand"),
        ("rows", 8, "changed by hand"),
        ("ids", ["a"], "changed by hand"),
        ("ids", 5, "changed by hand"),
        ("origin", {"model": {"a": 3}}, "changed by hand"),
        ("fingerprint", "0" * 64, "changed by hand"),
        ("version", 2, "version 2, this program reads 1"),
    ],
)
def test_manifest_edited_by_hand(tmp_path: Path, key: str, value: Any, message: str) -> None:
    filled(tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), key: value}))
    with pytest.raises(StoreError, match=message):
        GradientStore.open(tmp_path / "s")


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


def test_edited_manifest_is_not_gone_on_with(tmp_path: Path) -> None:
    """A resumed collection must not trust a manifest whose ids were changed below an old fingerprint."""
    filled(tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    manifest.write_text(manifest.read_text().replace("id-3", "id-x"))
    GradientStore.create(tmp_path / "s", SPEC)
    assert GradientStore.open(tmp_path / "s").spec == SPEC
