from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gradpursuit.config import EvaluationSection, LoraSection, ModelSection
from gradpursuit.data import Renderer, Row, Table
from gradpursuit.errors import RunError
from gradpursuit.evaluation.compare import BASE, Cell, Comparison, heldout_loss, read_cells
from gradpursuit.evaluation.table import tabulate, write_csv
from gradpursuit.selection import Selection
from gradpursuit.trajectory.model import Compute, attach_lora, load_model, load_tokenizer
from gradpursuit.trajectory.tuning import tuned

FLOAT32 = Compute(torch.device("cpu"), None)
LORA = LoraSection()


def rows(renderer: Renderer, word: str, count: int) -> Table:
    made = []
    for i in range(count):
        messages = [
            {"role": "user", "content": f"Say {word} {i}" + " please" * (i % 4)},
            {"role": "assistant", "content": f"{word} " * (1 + i % 3)},
        ]
        rendered = renderer(messages)
        made.append(Row(f"{word}-{i}", f"{word}-{i}", "f", i, "{}", rendered.input_ids, rendered.labels))
    return Table(made)


@pytest.fixture
def base(tiny_path: Path) -> PreTrainedModel:
    return load_model(ModelSection(path=str(tiny_path), device="cpu"))


@pytest.fixture
def tables(tiny_path: Path) -> tuple[Table, Table]:
    renderer = Renderer(load_tokenizer(ModelSection(path=str(tiny_path))))
    useful, other = list(rows(renderer, "apple", 8)), list(rows(renderer, "zebra", 8))
    return Table(useful + other), rows(renderer, "apple", 12).take(range(8, 12))


def test_heldout_loss_is_the_mean_of_the_models_own_losses(base: PreTrainedModel, tables: tuple[Table, Table]) -> None:
    model = attach_lora(base, LORA, seed=0)
    pool, _ = tables
    own = [
        model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item() for row in pool
    ]
    assert heldout_loss(model, pool, FLOAT32) == pytest.approx(np.mean(own), rel=1e-5)


def comparison(base: PreTrainedModel, tables: tuple[Table, Table], **settings: object) -> Comparison:
    config = EvaluationSection(**{"seeds": 2, "epochs": 6, "batch_size": 4, "learning_rate": 2e-2, **settings})
    return Comparison(partial(tuned, base, ModelSection(path="unused")), FLOAT32, *tables, config, seed=0)


def test_useful_rows_help_and_every_run_starts_from_the_same_base(
    base: PreTrainedModel, tables: tuple[Table, Table], tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    selections = {"useful": [Selection.ranked(range(8))], "other": [Selection.ranked(range(8, 16))]}
    cells = comparison(base, tables).run(selections, 8, tmp_path / "results.jsonl")
    loss = {(cell.strategy, cell.seed): cell.loss for cell in cells}
    assert set(loss) == {(BASE, 0), ("useful", 0), ("useful", 1), ("other", 0), ("other", 1)}
    for seed in (0, 1):
        assert loss["useful", seed] < loss["other", seed] - 0.1
        assert loss["useful", seed] < loss[BASE, 0] - 0.1
    assert loss["useful", 0] != loss["useful", 1]
    assert {cell.steps for cell in cells if cell.strategy != BASE} == {12}
    after = base.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = comparison(base, tables).run(dict(reversed(selections.items())), 8, tmp_path / "again.jsonl")
    for cell in again:
        assert cell.loss == pytest.approx(loss[cell.strategy, cell.seed], rel=1e-5)


def test_fewer_rows_than_k_train_for_the_same_steps(
    base: PreTrainedModel, tables: tuple[Table, Table], tmp_path: Path
) -> None:
    selections = {"few": [Selection.ranked([0, 1, 2])]}
    cells = comparison(base, tables, seeds=1, epochs=1).run(selections, 8, tmp_path / "r.jsonl")
    assert [(cell.examples, cell.steps) for cell in cells if cell.strategy == "few"] == [(3, 2)]


def test_finished_cells_are_kept_and_weights_are_used_when_asked_for(
    base: PreTrainedModel, tables: tuple[Table, Table], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    weighted = Selection(np.arange(8), np.array([7.3] + [0.1] * 7), np.ones(8, dtype=np.int64))
    first = comparison(base, tables, seeds=1, epochs=1).run({"a": [weighted]}, 8, path)
    written = path.read_bytes()
    second = comparison(base, tables, seeds=1, epochs=1).run({"a": [weighted]}, 8, path)
    assert first == second
    assert path.read_bytes() == written
    third = comparison(base, tables, seeds=1, epochs=1, use_weights=True).run({"a": [weighted]}, 8, tmp_path / "w")
    assert third[1].loss != pytest.approx(first[1].loss, abs=1e-5)
    assert third[0].loss == pytest.approx(first[0].loss, abs=1e-6)


def test_stochastic_strategies_train_on_their_own_draw(
    base: PreTrainedModel, tables: tuple[Table, Table], tmp_path: Path
) -> None:
    draws = [Selection.ranked(range(8)), Selection.ranked(range(8, 16))]
    cells = comparison(base, tables).run({"random": draws}, 8, tmp_path / "r.jsonl")
    loss = {cell.seed: cell.loss for cell in cells if cell.strategy == "random"}
    assert loss[0] < loss[1] - 0.1


def test_broken_results_are_refused(tmp_path: Path) -> None:
    assert read_cells(tmp_path / "none.jsonl") == []
    (tmp_path / "bad.jsonl").write_text('{"strategy": "gtp"}\n')
    with pytest.raises(RunError, match="not a results file"):
        read_cells(tmp_path / "bad.jsonl")


def test_table_means_and_csv(tmp_path: Path) -> None:
    pool = Table([Row(str(i), "same" if i < 2 else str(i), "f", i, "{}", [1], [1]) for i in range(4)])
    cells = [Cell(BASE, 0, 0, 0, 9.0, 1.0), Cell("a", 1, 2, 3, 2.0, 1.0), Cell("a", 0, 2, 3, 1.0, 1.0)]
    lines = tabulate(cells, {"a": [Selection.ranked([0, 1])]}, pool)
    assert [(line.before, line.losses, line.after, line.copies) for line in lines] == [(9.0, [1.0, 2.0], 1.5, 1.0)]
    write_csv(tmp_path / "table.csv", lines)
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "strategy,seed,examples,copies,layers,loss_before,loss_after",
        "a,0,2,1.0,0,9.0,1.0",
        "a,1,2,1.0,0,9.0,2.0",
    ]
