"""Exact per-example gradients of LoRA matrices in one batched backward pass.

For y = W x with input x [B, L, in] and output gradient δ [B, L, out], the gradient of example i is
Σ_l δ_il ⊗ x_il. Hooks on the adapter's own linear layers see both, so nothing is computed twice and no parameter
gradient is ever formed. The losses of a batch are summed, so each example's δ is that of its own loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradpursuit.errors import ModelError
from gradpursuit.trajectory.model import trainable

if TYPE_CHECKING:
    from peft import PeftModel

Consumer = Callable[[str, Tensor], None]


class PerExampleGradients:
    """Hooks on the LoRA layers of a model.

    `with engine.capture(consumer): loss(batch).sum().backward()` calls `consumer(parameter, gradient [B, out, in])`,
    float32, once for each LoRA matrix that the loss depends on, as soon as its gradient is whole; a module that the
    forward pass uses several times counts all its uses.

    Raises:
        ModelError: some trainable parameter is not the weight of a plain linear LoRA layer, or such a layer is part
            of the output layer, or (in the forward pass) sees tokens without the example they belong to.
    """

    def __init__(self, model: PeftModel) -> None:
        parameters = trainable(model)
        self.sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self._modules: dict[nn.Module, str] = {}
        owners = {id(parameter): name for name, parameter in parameters.items()}
        output = model.get_output_embeddings()  # it sees labelled positions only, of all rows at once
        head = set(output.modules()) if output is not None else set()
        for module in model.modules():
            if isinstance(module, nn.Linear) and module not in head and module.bias is None:
                name = owners.get(id(module.weight), "")
                if ".lora_A." in name or ".lora_B." in name:
                    self._modules[module] = owners.pop(id(module.weight))
        if owners:
            names = sorted(owners.values())
            raise ModelError(
                f"{len(names)} trainable parameters are not matrices of linear LoRA layers (first: '{names[0]}'); "
                "DoRA, modules_to_save, biases, adapted embeddings and output layers are not supported: use plain LoRA"
            )

    @contextmanager
    def capture(self, consumer: Consumer) -> Iterator[None]:
        """Hand each LoRA matrix's per-example gradient to `consumer` during the backward pass inside the block."""
        pending: Counter[str] = Counter()
        sums: dict[str, Tensor] = {}

        def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            name = self._modules[module]
            pending[name] += 1
            inputs = args[0].detach()
            if inputs.dim() < 3:
                raise ModelError(
                    f"'{name}' gets its tokens without a batch dimension, so examples cannot be told apart (as in the "
                    "experts of a mixture); leave that layer out of model.lora.target_modules"
                )

            def output_hook(delta: Tensor) -> None:
                gradient = _outer_sums(delta, inputs)
                sums[name] = sums[name] + gradient if name in sums else gradient
                pending[name] -= 1
                if pending[name] == 0:
                    consumer(name, sums.pop(name))

            output.register_hook(output_hook)

        handles = [module.register_forward_hook(forward_hook) for module in self._modules]
        try:
            yield
            for name, gradient in sums.items():  # some use of the module has no part in the loss
                consumer(name, gradient)
        finally:
            for handle in handles:
                handle.remove()


def _outer_sums(delta: Tensor, inputs: Tensor) -> Tensor:
    """Σ_l δ_l ⊗ x_l for each example, [B, out, in], multiplied and accumulated in float32."""
    batch = len(delta)
    left = delta.float().reshape(batch, -1, delta.shape[-1])
    right = inputs.float().reshape(batch, -1, inputs.shape[-1])
    return torch.bmm(left.transpose(1, 2), right)
