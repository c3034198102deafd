"""The weights of a selection in training: used as they are meant, and never lost unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from gradpursuit import WeightedTrainer
from gradpursuit.data import Renderer
from gradpursuit.errors import ConfigError, DataError, GradPursuitError

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "weight": 1.5, "id": "a"},
    {"input_ids": [9, 8, 7], "labels": [-100, 8, 7], "weight": 0.5, "id": "b"},
    {"input_ids": [4, 4, 5, 6], "labels": [-100, 4, 5, 6], "weight": 1.0, "id": "c"},
    {"input_ids": [3, 1, 4, 1, 5, 9], "labels": [-100, -100, -100, -100, 5, 9], "weight": 1.0, "id": "d"},
]


@pytest.fixture
def model(tiny_path: Path) -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    return made


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(**{**settings, **changes})


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of the weighted mean of the rows' own mean losses, row by row."""
    model.zero_grad()
    for row in ROWS:
        found = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        (row["weight"] * found.loss / len(ROWS)).backward()
    made = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    return made


@pytest.mark.parametrize("batch", [4, 2])
def test_a_step_follows_the_weighted_gradient(model: PreTrainedModel, tmp_path: Path, batch: int) -> None:
    expected = gradients(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
    WeightedTrainer(model, arguments(tmp_path, **options), train_dataset=Dataset.from_list(ROWS)).train()
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter.detach()) / 0.1
        torch.testing.assert_close(moved, expected[name], rtol=1e-3, atol=1e-5)


def test_rows_for_evaluation_need_no_weight(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name in ("input_ids", "labels")} for row in ROWS]
    trainer = WeightedTrainer(
        model,
        arguments(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(rows),
    )
    with torch.no_grad():
        model.eval()
        losses = [
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
            for row in rows
        ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)


def test_trl_makes_the_tokens_of_a_run_of_turns(tiny_path: Path, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}
    config = arguments(tmp_path, SFTConfig, max_length=64)
    rows = Dataset.from_list([{"prompt": [asked], "completion": [said]}])
    (made,) = SFTTrainer(str(tiny_path), config, train_dataset=rows).train_dataset  # type: ignore[misc]
    rendered = Renderer(AutoTokenizer.from_pretrained(tiny_path))([asked, said])
    assert made["input_ids"] == list(rendered.input_ids)
    pairs = zip(made["labels"], rendered.labels, strict=True)
    assert {ours for theirs, ours in pairs if theirs != ours} <= {-100}, "TRL also trains the line break after the end"


def test_rows_prepared_by_trl_can_be_trained_on(model: PreTrainedModel, tiny_path: Path, tmp_path: Path) -> None:
    texts = [{"prompt": f"{n} plus {n}?", "completion": f" {2 * n}", "weight": w} for n, w in ((1, 1.5), (2, 0.5))]
    config = arguments(tmp_path, SFTConfig, max_length=64)
    prepared = SFTTrainer(str(tiny_path), config, train_dataset=Dataset.from_list(texts)).train_dataset
    assert isinstance(prepared, Dataset)
    assert WeightedTrainer(model, arguments(tmp_path), train_dataset=prepared).train().training_loss > 0
    packed = {"packing": True, "packing_strategy": "bfd", "max_length": 64}
    config = arguments(tmp_path, SFTConfig, **packed)
    with pytest.raises(ConfigError, match="packing = True: several rows then share one sequence"):
        WeightedTrainer(model, config, train_dataset=prepared)
    prepared = SFTTrainer(str(tiny_path), config, train_dataset=Dataset.from_list(texts)).train_dataset
    with pytest.raises(DataError, match="'seq_lengths', as packed rows have"):
        WeightedTrainer(model, arguments(tmp_path), train_dataset=prepared)


def without(*names: str) -> Dataset:
    return Dataset.from_list(ROWS).remove_columns(list(names))


def drop_weights(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([rows[0][name]]) for name in ("input_ids", "labels")}


def flattened(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    joined = {name: torch.tensor([[token for row in rows for token in row[name]]]) for name in ("input_ids", "labels")}
    return {**joined, "weight": torch.tensor([row["weight"] for row in rows])}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"train_dataset": without("weight")},
            "no column 'weight' .* only input_ids, labels, id; a step before has drop",
        ),
        ({"train_dataset": without("labels")}, "no column 'labels'"),
        (
            {"train_dataset": Dataset.from_list([{**ROWS[0], "weight": -1.0}])},
            "row 0 has weight -1.0; expected a number",
        ),
        ({"train_dataset": Dataset.from_list([{**ROWS[0], "weight": [1.0, 2.0]}])}, "packed rows"),
        ({"train_dataset": Dataset.from_list([{**ROWS[0], "labels": [-100] * 5}])}, "no label after its first token"),
        ({"data_collator": drop_weights}, "no 'weight', only input_ids: the data collator has dropped it"),
        ({"data_collator": flattened}, "4 weights for 1 sequences, as packed rows have"),
        ({"compute_loss_func": print}, "compute_loss_func is given"),
    ],
)
def test_what_would_lose_the_weights_is_refused(
    model: PreTrainedModel, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(GradPursuitError, match=words):
        WeightedTrainer(model, arguments(tmp_path), **{"train_dataset": Dataset.from_list(ROWS), **options}).train()


def test_settings_and_streams(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing_factor = 0\.1"):
        WeightedTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=Dataset.from_list(ROWS))

    def rows() -> Iterator[dict[str, Any]]:
        yield from ROWS

    stream = IterableDataset.from_generator(rows)
    assert WeightedTrainer(model, arguments(tmp_path), train_dataset=stream).train().training_loss > 0
