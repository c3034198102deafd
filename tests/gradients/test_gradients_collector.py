"""Features from rows to store: the same whatever the batch, the order, the company and the interruptions."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gradpursuit.config import WarmupSection
from gradpursuit.data import Row, Table
from gradpursuit.errors import GradientError, ModelError, RunError, StoreError
from gradpursuit.gradients.collector import Collector
from gradpursuit.gradients.engine import FeatureEngine
from gradpursuit.gradients.filling import CollectSpec
from gradpursuit.gradients.layout import coordinates
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.store import GradientStore
from gradpursuit.trajectory.checkpoint import read_trajectory
from gradpursuit.trajectory.model import Compute, trainable
from gradpursuit.trajectory.warmup import warm_up

FLOAT32 = Compute(torch.device("cpu"), None)
SPEC = CollectSpec(64, 2, 5, 40, "float32", 4, 0.3, {"trajectory": "t"})
ADAM, SYMMETRIC, IDENTITY = Preconditioner("adam"), Preconditioner("adam-symmetric"), Preconditioner("identity")


@pytest.fixture(scope="module")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama with a real warm-up trajectory of two checkpoints, and ten rows of mixed lengths."""
    table = Table(tiny.rows([9, 21, 5, 14, 9, 30, 6, 18, 11, 7], seed=4))
    model = tiny.lora("llama")
    folder = tmp_path_factory.mktemp("trajectory")
    warmup = WarmupSection(fraction=0.8, epochs=1, checkpoints=2, batch_size=2, learning_rate=1e-2)
    checkpoints = warm_up(model, table, warmup, FLOAT32, folder, seed=0)
    return SimpleNamespace(model=model, table=table, folder=folder, checkpoints=checkpoints)


def collect(
    world: Any, folder: Path, *wanted: Preconditioner, spec: CollectSpec = SPEC, table: Table | None = None
) -> dict[str, GradientStore]:
    collector = Collector(world.model, FLOAT32, world.checkpoints, spec)
    return collector.collect("pool", table or world.table, wanted, folder)


def matrix(store: GradientStore) -> np.ndarray:
    """All features [T, N, d], float64."""
    return np.stack([np.concatenate(shards) for shards in store.features()]).astype(np.float64)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def reference(tiny: Any, world: Any, t: int, row: Row, kind: Preconditioner) -> tuple[np.ndarray, float]:
    """Feature and norm of one row, put together from the oracle, Γ and the explicit sketch."""
    checkpoint = world.checkpoints[t]
    checkpoint.load_adapter(world.model)
    state = checkpoint.adam(world.model)
    _, gradients = tiny.oracle(world.model, row)
    sketch = SparseSketch(PerExampleGradients(world.model).sizes, SPEC.dim, SPEC.nonzeros, SPEC.sketch_seed)
    out, square, at = torch.zeros(1, SPEC.dim), 0.0, kind.at(state)
    for name, gradient in gradients.items():
        value = at(name, coordinates(gradient[None]))
        square += float(value.square().sum())
        sketch.add(name, value, out)
    return out[0].double().numpy(), square**0.5


@pytest.mark.parametrize("kind", [IDENTITY, SYMMETRIC, ADAM, Preconditioner("adam-centered")], ids=lambda k: k.label)
def test_features_norms_losses_and_tokens_are_those_of_the_oracle(
    tiny: Any, world: Any, tmp_path: Path, kind: Preconditioner
) -> None:
    store = collect(world, tmp_path, kind)[kind.label]
    features = matrix(store)
    for t in (0, 1):
        for i in (0, 5, 9):
            row = world.table[i]
            expected, norm = reference(tiny, world, t, row, kind)
            assert cosines(features[t, i], expected) > 1 - 1e-6
            assert np.linalg.norm(features[t, i]) == pytest.approx(np.linalg.norm(expected), rel=1e-4)
            assert store.column("norm")[t, i] == pytest.approx(norm, rel=1e-4)
            loss, _ = tiny.oracle(world.model, row)
            assert store.column("loss")[t, i] == pytest.approx(loss, rel=1e-5)
            assert store.column("tokens")[t, i] == sum(label != -100 for label in row.labels[1:])


@pytest.mark.parametrize("budget", [1, 17, 64, 100_000])
def test_batch_budget_does_not_matter(world: Any, tmp_path: Path, budget: int) -> None:
    usual = collect(world, tmp_path / "a", ADAM, IDENTITY)
    other = collect(world, tmp_path / "b", ADAM, IDENTITY, spec=replace(SPEC, tokens_per_batch=budget))
    for label, store in usual.items():
        assert cosines(matrix(store), matrix(other[label])).min() > 1 - 1e-5
        np.testing.assert_allclose(store.column("norm"), other[label].column("norm"), rtol=1e-4)


def test_row_order_does_not_matter(world: Any, tmp_path: Path) -> None:
    order = [3, 9, 0, 5, 1, 8, 2, 7, 6, 4]
    usual = collect(world, tmp_path / "a", SYMMETRIC)[SYMMETRIC.label]
    other = collect(world, tmp_path / "b", SYMMETRIC, table=world.table.take(order))[SYMMETRIC.label]
    assert list(other.spec.ids) == [world.table[i].id for i in order]
    assert cosines(matrix(usual)[:, order], matrix(other)).min() > 1 - 1e-5


def test_one_pass_for_several_preconditioners_equals_each_alone(world: Any, tmp_path: Path) -> None:
    both = collect(world, tmp_path / "both", ADAM, IDENTITY)
    assert list(both) == ["adam", "identity"]
    for kind in (ADAM, IDENTITY):
        alone = collect(world, tmp_path / "alone", kind)[kind.label]
        for t in (0, 1):
            for s in range(3):
                assert alone.path(t, s).read_bytes() == both[kind.label].path(t, s).read_bytes()
    assert np.abs(matrix(both["adam"]) - matrix(both["identity"])).max() > 0.1


def test_checkpoints_differ(world: Any, tmp_path: Path) -> None:
    features = matrix(collect(world, tmp_path, IDENTITY)["identity"])
    assert cosines(features[0], features[1]).max() < 0.999


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of writing and content of every shard."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*.safetensors"))
    }


def delete(path: Path) -> None:
    path.unlink()


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [delete, corrupt, truncate, empty])
def test_only_the_damaged_shard_is_computed_again(
    world: Any, tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = collect(world, tmp_path, ADAM, IDENTITY)["adam"]
    for path in tmp_path.rglob("*.safetensors"):
        os.utime(path, ns=(10**18, 10**18))
    before = snapshot(tmp_path)
    damage(store.path(1, 1))
    computed: list[list[str]] = []
    compute, prepare = FeatureEngine.compute, FeatureEngine.prepare

    def counted(self: FeatureEngine, rows: list[Row], on_rows: Any) -> Any:
        computed.append([row.id for row in rows])
        return compute(self, rows, on_rows)

    def prepared(self: FeatureEngine, wanted: Any, state: Any) -> None:
        assert list(wanted) == [ADAM]
        prepare(self, wanted, state)

    monkeypatch.setattr(FeatureEngine, "compute", counted)
    monkeypatch.setattr(FeatureEngine, "prepare", prepared)
    collect(world, tmp_path, ADAM, IDENTITY)
    after = snapshot(tmp_path)
    assert computed == [["row-4", "row-5", "row-6", "row-7"]]
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    changed = [name for name in after if after[name][0] != before[name][0]]
    assert changed == ["adam/checkpoint-2/shard-00001.safetensors"]


def test_a_finished_store_needs_no_model(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(world, tmp_path, IDENTITY)
    monkeypatch.setattr(FeatureEngine, "compute", lambda *_: pytest.fail("nothing was missing"))
    before = snapshot(tmp_path)
    collect(world, tmp_path, IDENTITY)
    assert snapshot(tmp_path) == before


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(world, tmp_path / "whole", IDENTITY)
    write = GradientStore.write
    left = [4]

    def stop_after_four(self: GradientStore, *args: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, *args)

    monkeypatch.setattr(GradientStore, "write", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        collect(world, tmp_path / "killed", IDENTITY)
    monkeypatch.undo()
    assert len(snapshot(tmp_path / "killed")) == 4
    collect(world, tmp_path / "killed", IDENTITY)
    whole, killed = snapshot(tmp_path / "whole"), snapshot(tmp_path / "killed")
    assert {name: content for name, (_, content) in whole.items()} == {n: c for n, (_, c) in killed.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 32},
        {"nonzeros": 3},
        {"sketch_seed": 6},
        {"tokens_per_batch": 41},
        {"dtype": "float16"},
        {"shard_rows": 5},
        {"origin": {"trajectory": "u"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_starts_a_new_store(world: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    old = collect(world, tmp_path, IDENTITY)["identity"]
    new = collect(world, tmp_path, IDENTITY, spec=replace(SPEC, **change))["identity"]
    assert new.spec.fingerprint != old.spec.fingerprint
    assert GradientStore.open(tmp_path / "identity").spec == new.spec
    new.features()
    with pytest.raises(StoreError):
        old.features()


def test_changed_rows_or_preconditioner_start_a_new_store(world: Any, tmp_path: Path) -> None:
    old = collect(world, tmp_path, IDENTITY)["identity"]
    rows = list(world.table)
    edited = Table([replace(rows[0], hash="f" * 64), *rows[1:]])
    assert collect(world, tmp_path, IDENTITY, table=edited)["identity"].spec.fingerprint != old.spec.fingerprint
    uncorrected = Preconditioner("adam", bias_correction=False)
    stores = collect(world, tmp_path, ADAM, uncorrected)
    assert stores["adam"].spec.fingerprint != stores["adam-uncorrected"].spec.fingerprint


def test_float16_store_keeps_the_directions(world: Any, tmp_path: Path) -> None:
    full = collect(world, tmp_path / "a", SYMMETRIC)[SYMMETRIC.label]
    half = collect(world, tmp_path / "b", SYMMETRIC, spec=replace(SPEC, dtype="float16"))[SYMMETRIC.label]
    assert cosines(matrix(full), matrix(half)).min() > 1 - 1e-5


def test_zero_gradients_are_dropped_with_the_reason(tiny: Any, world: Any) -> None:
    """With A and B both zero, neither has a gradient."""
    model = tiny.lora("llama")
    engine = FeatureEngine(model, FLOAT32, SparseSketch(PerExampleGradients(model).sizes, 64, 2, 5), 64)
    engine.prepare([IDENTITY], world.checkpoints[0].adam(model))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.zero_()
    found = engine.compute(list(world.table)[:2], lambda _: None)
    assert found.kept == []
    assert found.dropped == {0: "the gradient's norm is 0", 1: "the gradient's norm is 0"}
    assert [tuple(kind.features.shape) for kind in found.kinds] == [(0, 64)]


def without_supervision(world: Any, *indices: int) -> Table:
    """The table, with rows whose loss is the mean of nothing."""
    rows = list(world.table)
    for i in indices:
        rows[i] = replace(rows[i], labels=[-100] * len(rows[i].input_ids))
    return Table(rows)


def test_rows_without_a_finite_loss_are_dropped_and_the_others_are_what_they_were(world: Any, tmp_path: Path) -> None:
    usual = collect(world, tmp_path / "usual", ADAM, IDENTITY)
    stores = collect(world, tmp_path / "fewer", ADAM, IDENTITY, table=without_supervision(world, 3, 7))
    for label, store in stores.items():
        assert store.dropped() == {3: "the loss is nan", 7: "the loss is nan"}
        assert store.kept().tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
        np.testing.assert_allclose(matrix(store), matrix(usual[label])[:, store.kept()], rtol=1e-4, atol=1e-5)
        assert store.column("loss").shape == (2, 8)


def test_too_many_of_them_are_an_error_that_names_them(world: Any, tmp_path: Path) -> None:
    table = without_supervision(world, 1, 2, 3, 7)
    reason = r"of 10 rows have no gradient, more than gradients.max_dropped = 0.3.*'row-1' \(the loss is nan\)"
    with pytest.raises(GradientError, match=f"4 {reason}"):
        collect(world, tmp_path / "a", IDENTITY, table=table)
    with pytest.raises(GradientError, match=r"3 of 10 rows.*gradients.max_dropped = 0 .*rows.jsonl:2"):
        collect(world, tmp_path / "b", IDENTITY, table=table, spec=replace(SPEC, max_dropped=0.0))


def test_a_row_that_fails_at_one_checkpoint_is_absent_from_all(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from the stores of all preconditioners, however the run was interrupted in between."""
    settle = Collector._settle
    monkeypatch.setattr(Collector, "_settle", lambda *_: None)  # killed just before the end
    stores = collect(world, tmp_path, ADAM, IDENTITY)
    identity = stores["identity"]
    whole = identity.read(1, 0)
    identity.write(1, 0, replace(whole, features=np.array(whole.features)).without({2: "the loss is inf"}))
    monkeypatch.setattr(Collector, "_settle", settle)
    stores = collect(world, tmp_path, ADAM, IDENTITY)
    for store in stores.values():
        assert store.kept().tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
        assert [len(block) for block in store.features()[0]] == [3, 4, 2]
        assert store.verify() == []
    before = snapshot(tmp_path)
    collect(world, tmp_path, ADAM, IDENTITY)
    assert snapshot(tmp_path) == before


def test_broken_weights_are_refused(tiny: Any, world: Any, tmp_path: Path) -> None:
    model = tiny.lora("llama")
    with torch.no_grad():
        model.base_model.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(GradientError, match=r"4 of 10 rows.*the loss is nan.*every row so far is affected"):
        Collector(model, FLOAT32, world.checkpoints, SPEC).collect("pool", world.table, [IDENTITY], tmp_path)


def test_dropout_of_the_model_is_off(tiny: Any, world: Any, tmp_path: Path) -> None:
    """A model left in training mode must not give other features."""
    model = tiny.lora("gpt2")
    table = Table(tiny.rows([9, 12]))
    folder = tmp_path / "trajectory"
    warmup = WarmupSection(fraction=1, epochs=1, checkpoints=1, batch_size=2)
    checkpoints = warm_up(model, table, warmup, FLOAT32, folder, seed=0)
    stores = []
    for name in ("a", "b"):
        model.train()
        collector = Collector(model, FLOAT32, checkpoints, SPEC)
        stores.append(collector.collect("pool", table, [IDENTITY], tmp_path / name)["identity"])
    np.testing.assert_array_equal(matrix(stores[0]), matrix(stores[1]))


def test_a_layer_that_some_rows_do_not_use_has_a_zero_gradient(tiny: Any, world: Any) -> None:
    """Its momentum moves it under `adam` all the same, whatever else is in the batch."""
    world.checkpoints[1].load_adapter(world.model)
    state = world.checkpoints[1].adam(world.model)
    sizes = PerExampleGradients(world.model).sizes
    sketch = SparseSketch(sizes, 64, 2, 5)
    engine = FeatureEngine(world.model, FLOAT32, sketch, 64)
    engine.prepare([ADAM, IDENTITY], state)
    layer = world.model.base_model.model.model.layers[1]
    forward = layer.mlp.forward
    layer.mlp.forward = torch.zeros_like
    try:
        found, plain = engine.batch([world.table[0]]).kinds
        gradients = _gradients_that_exist(world.model, world.table[0])
    finally:
        layer.mlp.forward = forward
    unused = [name for name in sizes if ".layers.1.mlp." in name]
    assert len(unused) == 6
    expected, adam = torch.zeros(1, 64), ADAM.at(state)
    for name in unused:
        sketch.add(name, adam(name, torch.zeros(1, sizes[name])), expected)
    assert float(expected.norm()) > 0
    for name, gradient in gradients.items():
        sketch.add(name, adam(name, coordinates(gradient[None])), expected)
    assert set(gradients) == set(sizes) - set(unused)
    assert torch.allclose(found.features[0], expected[0], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(plain.features).all()


def _gradients_that_exist(model: Any, row: Row) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
    gradients = {name: p.grad.detach().clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def test_the_disk_is_asked_first(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="the gradient store needs"):
        collect(world, tmp_path, IDENTITY)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_adapter_than_the_trajectory_has(tiny: Any, world: Any, tmp_path: Path) -> None:
    model = tiny.lora("llama", target_modules=["q_proj"])
    collector = Collector(model, FLOAT32, read_trajectory(world.folder), SPEC)
    with pytest.raises(Exception, match="does not fit the model's adapter"):
        collector.collect("pool", world.table, [IDENTITY], tmp_path)


def test_mixture_of_experts_without_its_experts(tiny: Any, world: Any, tmp_path: Path) -> None:
    table = Table(tiny.rows([9, 12]))
    warmup = WarmupSection(fraction=1, epochs=1, checkpoints=1, batch_size=2)
    for modules, fits in (("all-linear", False), (["q_proj", "v_proj"], True)):
        model = tiny.lora("qwen2_moe", target_modules=modules)
        checkpoints = warm_up(model, table, warmup, FLOAT32, tmp_path / f"trajectory-{fits}", seed=0)
        collector = Collector(model, FLOAT32, checkpoints, SPEC)
        if fits:
            collector.collect("pool", table, [IDENTITY], tmp_path / "store")["identity"].features()
        else:
            with pytest.raises(ModelError, match=r"leave that layer out of model\.lora\.target_modules"):
                collector.collect("pool", table, [IDENTITY], tmp_path / "store")
