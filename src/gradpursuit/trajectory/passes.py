"""Forward and backward passes on the CPU as training makes them, in fewer steps than the model's own code takes.

Frozen weights are cast to the products' type once and not at every step; a LoRA layer is one step of autograd; norms,
gates, rotary positions and attention are compiled loops (:mod:`gradpursuit.trajectory.fused`). What is computed stays
what the model computes, but for the order of sums and for the places where bfloat16 rounds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.trajectory.followed import Lora, is_linear, lora_of
from gradpursuit.trajectory.loss import Predictions, SupervisedLoss, collate, token_batches
from gradpursuit.trajectory.model import Compute, pad_id
from gradpursuit.trajectory.packed import can_pack, divide, has_dropout, own_tokens, pack
from gradpursuit.trajectory.pieces import Pieces, forward_replaced
from gradpursuit.trajectory.threads import side_by_side

TOKENS_PER_BATCH = 4096  # padded, of a batch that is scored
_PACKED, _PART = 512, 128  # tokens of rows in one sequence: of a batch that is scored, and of a thread in training
_MOST_GRADIENTS = 1 << 26  # numbers that the gradients of all parts of a batch may take
_LONGEST = 2048  # tokens of rows that share a sequence: its mask has the square of that


class Passes:
    """A model's passes over rows with `input_ids` and `labels`.

    On a CPU, rows share a sequence where the model allows it, and inside :meth:`quick` its layers are replaced by
    quicker ones. On other devices rows are padded, and nothing is replaced.

    Args:
        model: with trainable LoRA adapters or trainable layers; only layers with an adapter are replaced.
        compute: device and precision.

    Attributes:
        loss: of batches that are collated already.
    """

    def __init__(self, model: nn.Module, compute: Compute) -> None:
        self._model, self._dtype = model, compute.autocast
        self.loss = SupervisedLoss(model, compute)
        self._pad = pad_id(model)
        self._pieces = Pieces(model) if compute.device.type == "cpu" else None
        self._packs = self._pieces is not None and self._pieces.attends and can_pack(model)
        self._drops = has_dropout(model)
        self._trained = max(1, sum(p.numel() for p in model.parameters() if p.requires_grad))
        self._casts = threading.local()  # threads may be at batches of their own
        self._frozen: dict[nn.Linear, _FrozenLinear] = {}

    def predict(self, rows: Sequence[Any]) -> Predictions:
        """What the model says of rows, in one pass."""
        together = self._packs and len(rows) > 1 and not (self._drops and self._model.training)
        if not together or len(rows[0].input_ids) + sum(own_tokens(rows)) > _LONGEST:
            return self.loss.predict(collate(rows, self._pad))
        batch, layout = pack(rows, self._pad)
        with layout.in_use():
            return self.loss.predict(batch)

    def parts(self, rows: Sequence[Any]) -> list[list[int]]:
        """Indices of the rows of a training batch in parts to be computed side by side: one for each thread that has
        enough to do, each with about as many tokens. Where the model drops at random there is one part, so that the
        same seed always drops the same."""
        sizes = own_tokens(rows)
        most = 1 if self._drops or self._pieces is None else max(1, _MOST_GRADIENTS // self._trained)
        return divide(sizes, min(len(rows), torch.get_num_threads(), most, max(1, sum(sizes) // _PART)))

    def scored(
        self, rows: Sequence[Any], groups: Sequence[Sequence[int]] = ()
    ) -> Iterator[tuple[Sequence[int], Predictions]]:
        """What the model says of rows in batches, with the indices of each, without gradients.

        Args:
            rows: any number.
            groups: indices of rows that begin alike, and are to share a batch where that saves something; none: rows
                of similar length do.
        """
        batches = self._batches(rows, groups)

        def work(part: int) -> Predictions:
            with torch.inference_mode():
                return self.predict([rows[i] for i in batches[part]])

        with self.quick():
            if self._pieces is None:
                yield from ((batch, work(part)) for part, batch in enumerate(batches))
            else:
                yield from zip(batches, side_by_side(work, len(batches)), strict=True)

    def _batches(self, rows: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[list[int]]:
        if not self._packs:
            workers = 1 if self._pieces is None else torch.get_num_threads()
            return token_batches([len(row.input_ids) for row in rows], TOKENS_PER_BATCH // workers)
        found = []
        for group in groups or [range(len(rows))]:
            sizes = own_tokens([rows[i] for i in group])
            found += [[group[i] for i in batch] for batch in token_batches(sizes, _PACKED)]
        return found

    @contextmanager
    def quick(self) -> Iterator[None]:
        """Replace the forward methods of layers and pieces inside the block."""
        if self._pieces is None:
            yield
            return
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        try:
            with ExitStack() as stack:
                for module in self._model.modules():
                    base, lora = getattr(module, "base_layer", None), lora_of(module)
                    if lora is not None and isinstance(base, nn.Linear) and _is_frozen(base):
                        forward = self._with_adapter(self._constant(base), lora)
                        stack.enter_context(forward_replaced(module, forward))
                if is_linear(head) and isinstance(head, nn.Linear) and _is_frozen(head):
                    stack.enter_context(forward_replaced(head, self._constant(head)))
                stack.enter_context(self._pieces.fused(self._remember))
                yield
        finally:
            self._casts = threading.local()

    def _constant(self, layer: nn.Linear) -> _FrozenLinear:
        """The layer, cast anew if its weight is another one by now."""
        found = self._frozen.get(layer)
        if found is None or not found.is_of(layer):
            found = self._frozen[layer] = _FrozenLinear(layer, self._dtype)
        return found

    def _with_adapter(self, layer: _FrozenLinear, lora: Lora) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            output: Tensor = LoraProduct.apply(x, lora.a, lora.b, self._as(x, layer.weight.dtype), layer, lora.scaling)
            return output

        return forward

    def _remember(self, x: Tensor, cast: Tensor) -> None:
        self._casts.last = (x, cast)

    def _as(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in another dtype; layers that read the same input one after the other share the copy."""
        if x.dtype == dtype:
            return x.detach()
        last: tuple[Tensor, Tensor] | None = getattr(self._casts, "last", None)
        if last is None or last[0] is not x or last[1].dtype != dtype:
            last = self._casts.last = (x, x.detach().to(dtype))
        return last[1]


def _is_frozen(layer: nn.Linear) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


class _FrozenLinear:
    """A linear layer's weight and bias, in the products' type."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype | None) -> None:
        self.weight: Tensor = layer.weight.detach().to(dtype or layer.weight.dtype)
        self.bias: Tensor | None = None if layer.bias is None else layer.bias.detach().to(self.weight.dtype)

        self._made_of = _version(layer)

    def is_of(self, layer: nn.Linear) -> bool:
        """Whether nothing has changed since."""
        return self._made_of == _version(layer)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def _version(layer: nn.Linear) -> list[tuple[int, int]]:
    return [(parameter.data_ptr(), parameter._version) for parameter in layer.parameters(recurse=False)]


class LoraProduct(torch.autograd.Function):
    """W x + b + s B A x with W and b frozen: gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, cast: Tensor, layer: _FrozenLinear, scaling: float
    ) -> Tensor:
        """Of x [..., in], which `cast` is in the products' type, A [r, in] and B [out, r]."""
        rows, dtype = cast.reshape(-1, cast.shape[-1]), cast.dtype
        ctx.dtypes = a.dtype, b.dtype
        a, b = (scaling * a.detach()).to(dtype), b.detach().to(dtype)
        inner = rows @ a.t()
        y = F.linear(rows, layer.weight, layer.bias).addmm_(inner, b.t())
        ctx.save_for_backward(rows, inner, a, b)
        ctx.layer, ctx.scaling = layer, scaling
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of A and B are summed over all tokens, in float32 within a product."""
        rows, inner, a, b = ctx.saved_tensors
        layer, delta = ctx.layer, deltas[0]
        dy = delta.reshape(-1, delta.shape[-1]).to(rows.dtype)
        di = dy @ b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ layer.weight).addmm_(di, a).view(*delta.shape[:-1], a.shape[1])
        da = (di.t() @ rows).to(ctx.dtypes[0]) * ctx.scaling
        db = (inner.t() @ dy).to(ctx.dtypes[1]).t().contiguous()  # quicker than the product that is r wide
        return dx, da, db, None, None, None
