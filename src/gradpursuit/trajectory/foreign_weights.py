"""The weights of checkpoints that others wrote: of `peft`, of `transformers`, or sharded by FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gradpursuit.errors import TrajectoryError
from gradpursuit.trajectory.checkpoint import put_weights
from gradpursuit.trajectory.followed import embedding_weights
from gradpursuit.trajectory.model import plain_name, trainable
from gradpursuit.trajectory.optimizer_files import load_torch, read_distributed

_SHARDS = "pytorch_model_fsdp_0"


def put_foreign_weights(folder: Path, model: nn.Module) -> None:
    """Put the weights in a checkpoint folder into the trainable parameters of `model`.

    Of a folder with a whole model, what is not trained must be as in `model`: it is not followed. The same holds for
    the embeddings and the output layer that `peft` saves beside an adapter when the vocabulary was resized.

    Raises:
        TrajectoryError: there are none, the file is broken, or the weights are not those of the model.
    """
    ours = {plain_name(name): name for name in trainable(model)}
    everything = {  # tied weights by each of their names
        plain_name(name).replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    fixed = {name: parameter for name, parameter in everything.items() if not parameter.requires_grad}
    embedded = embedding_weights(model)
    found: dict[str, Tensor] = {}
    path, whole = _file(folder)
    for name, value in _tensors(path):
        plain = plain_name(name).replace(".base_layer.", ".")
        if plain in ours or (plain not in fixed and not whole):
            found[ours.get(plain, name)] = value
        elif plain in fixed and not _same(fixed[plain], value):
            if (
                id(fixed[plain]) in embedded
                and value.shape[1:] == fixed[plain].shape[1:]
                and len(value) != len(fixed[plain])
            ):
                raise TrajectoryError(
                    f"{path}: the adapter was trained on a vocabulary of {len(value):,}, model.path has "
                    f"{len(fixed[plain]):,} ('{name}'): give the resized model as model.path (save it with "
                    "save_pretrained after resize_token_embeddings, before training)"
                )
            raise TrajectoryError(
                f"{path}: '{name}' is not as in model.path, and "
                + ("model.layers does not name it; " if whole else "it is not part of the adapter; ")
                + "either another model was trained or more of it: exactly what was trained can be followed"
            )
    put_weights(path, found, model)


def _file(folder: Path) -> tuple[Path, bool]:
    """Where the weights lie, and whether those of the whole model lie there."""
    for name in ("adapter_model.safetensors", "weights.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name, False
    for name in ("model.safetensors", "model.safetensors.index.json", f"{_SHARDS}/.metadata"):
        if (folder / name).is_file():
            return (folder / name).parent if name.startswith(_SHARDS) else folder / name, True
    raise TrajectoryError(
        f"{folder}: no weights there (adapter_model.safetensors, adapter_model.bin, model.safetensors, {_SHARDS} or "
        "weights.safetensors)"
    )


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values, one after the other."""
    if path.is_dir():
        for key, value in read_distributed(path).items():
            if isinstance(value, Tensor):
                yield key.removeprefix("model."), value
    elif path.suffix == ".bin":
        found = load_torch(path)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise TrajectoryError(f"{path}: no weights by name, but a {type(found).__name__}")
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise TrajectoryError(f"{path}: '{name}' is no tensor, but a {type(value).__name__}")
            yield name, value
    else:
        files = sorted(path.parent.glob("model-*.safetensors")) if path.suffix == ".json" else [path]
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # it is no dictionary
                        yield name, opened.get_tensor(name)
            except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
                raise TrajectoryError(f"{file}: cannot be read: {error}") from None


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the values are the same, as far as the file's type can tell."""
    return ours.shape == theirs.shape and torch.equal(ours.detach().to("cpu", theirs.dtype), theirs)
