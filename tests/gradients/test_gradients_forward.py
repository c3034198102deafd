"""Embeddings and prediction errors: against plain forward passes, whatever the batch, the order and interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gradpursuit.config import WarmupSection
from gradpursuit.data import Table
from gradpursuit.gradients.collector import SignalCollector
from gradpursuit.gradients.filling import CollectSpec
from gradpursuit.gradients.forward import EL2N, EMBEDDING, ForwardEngine, Signal
from gradpursuit.store import GradientStore
from gradpursuit.trajectory.model import Compute, trainable
from gradpursuit.trajectory.warmup import warm_up

FLOAT32 = Compute(torch.device("cpu"), None)
SPEC = CollectSpec(64, 2, 5, 40, "int8", 4, 0.3, {"model": "m", "trajectory": "t"})


@pytest.fixture(scope="module")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama, a trajectory of two checkpoints, ten rows of mixed lengths, and the weights it began with."""
    table = Table(tiny.rows([9, 21, 5, 14, 9, 30, 6, 18, 11, 7], seed=4))
    model = tiny.lora("llama")
    start = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    warmup = WarmupSection(fraction=0.8, epochs=1, checkpoints=2, batch_size=2, learning_rate=1e-2)
    checkpoints = warm_up(model, table, warmup, FLOAT32, tmp_path_factory.mktemp("trajectory"), seed=0)
    return SimpleNamespace(model=model, table=table, checkpoints=checkpoints, start=start)


def begin(world: Any) -> Any:
    """The model as it was before training."""
    with torch.no_grad():
        for name, parameter in trainable(world.model).items():
            parameter.copy_(world.start[name])
    return world.model


def collect(world: Any, folder: Path, signal: Signal, spec: CollectSpec = SPEC) -> GradientStore:
    made = SignalCollector(begin(world), FLOAT32, world.checkpoints, spec)
    return made.collect("pool", world.table, [signal], folder)[signal.label]


def reference(model: Any, row: Any) -> tuple[np.ndarray, float, float]:
    """Embedding, EL2N and loss of one row, from all its hidden states and logits."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
    hidden, logits = out.hidden_states[-1][0].double(), out.logits[0].double()
    i = torch.arange(1, len(hidden) + 1, dtype=torch.double)
    p = logits.softmax(dim=1)
    errors, losses = [], []
    for place, label in enumerate(row.labels[1:]):
        if label >= 0:
            y = torch.nn.functional.one_hot(torch.tensor(label), p.shape[1])
            errors.append(float((p[place] - y).norm()))
            losses.append(-float(p[place, label].log()))
    return (i @ hidden / i.sum()).numpy(), float(np.mean(errors)), float(np.mean(losses))


def test_they_are_those_of_a_plain_forward_pass(world: Any, tmp_path: Path) -> None:
    errors, embeddings = collect(world, tmp_path, EL2N), collect(world, tmp_path, EMBEDDING)
    assert (errors.spec.checkpoints, errors.spec.dim, errors.spec.dtype) == (3, 1, "float32")
    assert (embeddings.spec.checkpoints, embeddings.spec.dim, embeddings.spec.dtype) == (1, 32, "float32")
    stored = [np.concatenate(shards) for shards in errors.features()]
    (vectors,) = (np.concatenate(shards) for shards in embeddings.features())
    for t in range(3):
        begin(world) if t == 0 else world.checkpoints[t - 1].load_adapter(world.model)
        for i in range(len(world.table)):
            embedding, error, loss = reference(world.model, world.table[i])
            assert stored[t][i, 0] == pytest.approx(error, rel=1e-4)
            assert errors.column("loss")[t, i] == pytest.approx(loss, rel=1e-4)
            if t == 0:
                np.testing.assert_allclose(vectors[i], embedding, rtol=1e-3, atol=1e-5)
                assert embeddings.column("loss")[0, i] == pytest.approx(loss, rel=1e-4)
    assert np.abs(stored[0] - stored[2]).max() > 0.005


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "qwen2_moe"])
def test_other_architectures(tiny: Any, kind: str) -> None:
    model, rows = tiny.lora(kind), tiny.rows([12, 5, 9])
    for signal, place in ((EMBEDDING, 0), (EL2N, 1)):
        found = ForwardEngine(model, FLOAT32, signal, 64).compute(rows, lambda _: None)
        for i, row in enumerate(rows):
            expected = reference(model, row)[place]
            np.testing.assert_allclose(found.kinds[0].features[i].numpy(), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("signal", [EMBEDDING, EL2N], ids=lambda s: s.label)
def test_batches_do_not_matter(world: Any, tmp_path: Path, signal: Signal) -> None:
    usual = collect(world, tmp_path / "a", signal)
    other = collect(world, tmp_path / "b", signal, replace(SPEC, tokens_per_batch=1))
    for a, b in zip(usual.features(), other.features(), strict=True):
        np.testing.assert_allclose(np.concatenate(a), np.concatenate(b), rtol=1e-3, atol=1e-5)


def test_an_interrupted_collection_goes_on_and_ends_with_the_same_bytes(world: Any, tmp_path: Path) -> None:
    whole, store = collect(world, tmp_path / "whole", EL2N), collect(world, tmp_path / "again", EL2N)
    kept = store.path(1, 0).stat().st_mtime_ns
    for t, s in ((0, 2), (1, 1), (2, 0)):
        store.path(t, s).unlink()
    again = collect(world, tmp_path / "again", EL2N)
    for t in range(3):
        for s in range(3):
            assert again.path(t, s).read_bytes() == whole.path(t, s).read_bytes()
    assert again.path(1, 0).stat().st_mtime_ns == kept


def test_logits_are_computed_only_where_there_is_a_label(world: Any) -> None:
    seen: list[int] = []
    head = begin(world).get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
    try:
        ForwardEngine(world.model, FLOAT32, EMBEDDING, 10_000).compute(list(world.table), lambda _: None)
    finally:
        handle.remove()
    assert seen == [sum(label >= 0 for row in world.table for label in row.labels[1:])]


def test_a_row_that_is_predicted_perfectly_has_the_least_error(world: Any, tiny: Any) -> None:
    model = tiny.lora("llama")
    rows = tiny.rows([6])
    with torch.no_grad():  # a head that gives one token an overwhelming logit wherever the state is positive
        model.get_output_embeddings().weight.mul_(1e4)
    best = [int(token) for token in model(input_ids=torch.tensor([rows[0].input_ids])).logits[0].argmax(dim=1)]
    row = replace(rows[0], labels=[-100, *best[:-1]])
    found = ForwardEngine(model, FLOAT32, EL2N, 64).compute([row], lambda _: None)
    assert found.kept == [0]
    assert 0 < float(found.kinds[0].features[0, 0]) <= 1e-6
