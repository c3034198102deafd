"""Exact per-example gradients of linear layers in one batched backward pass.

For y = W x with input x [B, L, in] and output gradient δ [B, L, out], the gradient of example i is
Σ_l δ_il ⊗ x_il. The losses of a batch are summed, so each example's δ is that of its own loss, and no gradient that
is summed over the batch is ever formed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradpursuit.errors import ModelError
from gradpursuit.gradients.linear import FollowedLinear, Linear, followed_linears
from gradpursuit.trajectory.followed import followed_layers, listed_names, setting_without
from gradpursuit.trajectory.model import trainable
from gradpursuit.trajectory.pieces import Pieces, forward_replaced

Consumer = Callable[[str, Tensor], None]


class PerExampleGradients:
    """Per-example gradients of every trainable parameter of a model.

    `with engine.capture(consumer): loss(batch).sum().backward()` calls `consumer(parameter, gradient [B, *shape])`,
    float32, once for each parameter that the loss depends on, as soon as its gradient is whole; a module that the
    forward pass uses several times counts all its uses. Parameters' own `grad` stays as it was before: whatever arrives
    there came by a way that is not followed, and is an error.

    Args:
        model: with LoRA adapters on linear layers, or with linear layers whose weights are trainable.
        autocast: the lower precision of the products (products are accumulated in float32, and rounded to it once);
            None: the weights' own.

    Raises:
        ModelError: some trainable parameter cannot be followed, or (in the forward pass) a layer sees tokens without
            the example they belong to.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        self._model, self._layers = model, followed_linears(model, autocast)
        self._pieces = Pieces(model)
        self._passes, self._lock, self._inside, self._restore = threading.local(), threading.Lock(), 0, ExitStack()
        self._trained = trainable(model)
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self.sizes = {name: parameter.numel() for name, parameter in self._trained.items()}

    @contextmanager
    def capture(self, consumer: Consumer, rows: int | None = None) -> Iterator[None]:
        """Hand each parameter's per-example gradient to `consumer` during the backward pass inside the block.

        Threads may do so side by side: each sees the gradients of its own losses.

        Args:
            consumer: takes names and gradients.
            rows: B, where it is known: a layer whose input has another number of rows is refused.

        Raises:
            ModelError: a layer sees tokens without the example they belong to, or a trainable parameter has got a
                gradient that did not come through its layer, so that it was not followed.
        """
        pass_ = self._passes.current = _Pass(consumer, rows)
        try:
            with self._replaced():
                yield
                self._refuse_unseen()
            pass_.finish()
        finally:
            pass_.release()
            del self._passes.current

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """The model's layers do what is wanted here; the first thread to come replaces them, the last restores them."""
        with self._lock:
            if not self._inside:
                self._aside = [(p, p.grad) for p in self._trained.values() if p.grad is not None]
                for parameter, _ in self._aside:
                    parameter.grad = None  # so that what arrives during the passes is seen
                with ExitStack() as stack:
                    for module, layer in self._layers.items():
                        layer.refresh()
                        stack.enter_context(forward_replaced(module, self._forward_of(layer)))
                    stack.enter_context(self._pieces.fused(lambda *pair: self._passes.current.remember(*pair)))
                    self._restore = stack.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore.close()
                    for value in self._trained.values():
                        value.grad = None
                    for parameter, gradient in self._aside:
                        parameter.grad = gradient
                    self._aside = []

    def _refuse_unseen(self) -> None:
        """Autograd leaves a gradient in a parameter itself only if the parameter is used outside of its layer."""
        unseen = [name for name, parameter in self._trained.items() if parameter.grad is not None]
        if unseen:
            raise ModelError(
                f"{len(unseen)} trainable parameters have a gradient that does not come from calling their layer "
                f"({listed_names(unseen)}): the model uses them in another way, so that no gradient of one example "
                f"can be followed; leave {'them' if len(unseen) > 1 else 'it'} out of training "
                f"({setting_without(followed_layers(self._model).values(), unseen)})"
            )

    def _forward_of(self, layer: FollowedLinear) -> Callable[..., Tensor]:
        """What takes the place of the layer's forward method: the calling thread's pass does it."""
        return lambda x, *_args, **_kwargs: self._passes.current.forward(layer, x)


class _Pass:
    """One forward and backward pass: what is still to come, and sums over the uses of a module."""

    def __init__(self, consumer: Consumer, rows: int | None) -> None:
        self._consumer, self._rows = consumer, rows
        self._pending: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._cast: tuple[Tensor, Tensor] | None = None

    def forward(self, layer: FollowedLinear, x: Tensor) -> Tensor:
        """The layer's output; its gradients go to the consumer when the backward pass comes by."""
        if x.dim() < 3 or (self._rows is not None and len(x) != self._rows):
            raise ModelError(
                f"'{layer.names[0]}' gets its tokens without a batch dimension, so examples cannot be told apart "
                "(as in the experts of a mixture); leave that layer out of model.lora.target_modules"
            )
        self._pending.update(layer.names)
        output: Tensor = Linear.apply(x, self._anchor, self._as(x, layer.dtype), layer, self._sink(layer))
        return output

    def finish(self) -> None:
        """Hand over what waited for a use of its module that has no part in the loss."""
        for name, gradient in self._sums.items():
            self._consumer(name, gradient)

    def release(self) -> None:
        """Let go of tensors: the graph that they belong to refers back to this object."""
        self._cast = None
        self._sums.clear()

    def remember(self, x: Tensor, cast: Tensor) -> None:
        """`cast` is `x` in the products' dtype: the layers that read it next need no copy of their own."""
        self._cast = (x, cast)

    def _as(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in another dtype; layers that read the same input one after the other share the copy."""
        if x.dtype == dtype:
            return x.detach()
        if self._cast is None or self._cast[0] is not x or self._cast[1].dtype != dtype:
            self._cast = (x, x.detach().to(dtype))
        return self._cast[1]

    def _sink(self, layer: FollowedLinear) -> Callable[[Tensor, Tensor], None]:
        def sink(delta: Tensor, inputs: Tensor) -> None:
            self._pending.subtract(layer.names)
            left, right = delta.flatten(1, -2), inputs.flatten(1, -2)
            for name, gradient in layer.gradients(left, right):
                gradient = gradient.float()
                if name in self._sums:
                    gradient = self._sums.pop(name) + gradient
                if self._pending[name]:
                    self._sums[name] = gradient
                else:
                    self._consumer(name, gradient)

        return sink
