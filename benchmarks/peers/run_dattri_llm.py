"""Time dattri-llm's LESS features: per-example LoRA gradients through Adam, projected densely, written to disk.

dattri-llm projects layer by layer, so 8,192 dimensions in all are 20 for each of the 420 adapter matrices. What is
timed is its own collection into its store, without imports, loading the model and making the projection matrices
(`setup_seconds`, once a run). Every batch, whatever its size, costs it a search through all modules of the model for
each adapter matrix, so that large batches pay: 32 rows instead of its default of 8.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import common

DIM = 8192


def main() -> None:
    parser = common.arguments("dattri-llm")
    parser.add_argument("--batch", type=int, default=32, help="rows per batch")
    args = common.parse(parser)
    rows = sorted(common.read_rows(args.rows, args.limit), key=lambda row: len(row["input_ids"]))
    model = common.adapted(args.model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, dim = warm_adam(parameters), math.ceil(DIM / len(parameters))
    passes = [capture(model, optimizer, rows, args.batch, dim) for _ in range(args.repeats)]
    common.write_result(
        args,
        "dattri-llm",
        len(rows),
        [seconds for _, seconds in passes],
        what="dattri-llm GradientStreamer with precondition=True (as its LESS): LoRA r=8 on all linear layers, "
        "float32, gradient of the mean loss, Adam preconditioning, dense Rademacher projection of each adapter "
        f"matrix to {dim}, batches of {args.batch} rows of similar length, written to disk",
        features_per_row=dim * len(parameters),
        setup_seconds=passes[0][0],
    )


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch, padded to the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {"input_ids": ("input_ids", 0), "labels": ("labels", -100)}
    batch = {
        name: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=fill)
        for name, (key, fill) in columns.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["labels"].shape[1]) < lengths[:, None]).long()
    return batch


def mean_losses(model: Any, batch: dict[str, Any]) -> Any:
    """The sum over the batch of every row's mean loss, so that each row's gradient is that of its own mean."""
    import torch.nn.functional as F

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return (losses.sum(1) / (targets != -100).sum(1)).sum()


def warm_adam(parameters: list[Any]) -> Any:
    """AdamW after three steps on random gradients: a state, whose values do not change the time."""
    import torch

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def capture(model: Any, optimizer: Any, rows: list[dict[str, Any]], batch: int, dim: int) -> tuple[float, float]:
    """Collect the features of `rows` into a store; seconds of the set-up and of the collection."""
    from dattri_llm import AttributionArguments, GradientStorageManager, GradientStreamer
    from dattri_llm.attribution.utils import collect_gradients
    from dattri_llm.gradient.hooks import REGISTER_ALL, HookManagerConfig

    projection = {"style": "dense", "proj_dim": dim, "proj_max_batch_size": 8, "proj_type": "rademacher"}
    times = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        streamer = GradientStreamer(
            model,
            [*rows[-batch:], *rows],  # the projection is made with the first batch, which is not timed
            AttributionArguments(output_dir=folder),
            batch_size=batch,
            loss_fn=mean_losses,
            optimizer=optimizer,
            config=HookManagerConfig(linear_io=REGISTER_ALL, projection_kwargs={"__default__": projection}),
            collate_fn=padded,
            precondition=True,
        )
        store = GradientStorageManager(str(Path(folder) / "store"))
        collect_gradients(streamer, store, on_block=lambda *_: times.append(time.perf_counter()))
        return times[1] - times[0], time.perf_counter() - times[1]


if __name__ == "__main__":
    main()
