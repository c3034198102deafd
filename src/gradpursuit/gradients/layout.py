"""The order in which the elements of a parameter are numbered, for sketch and preconditioners alike."""

from __future__ import annotations

from torch import Tensor


def coordinates(values: Tensor) -> Tensor:
    """`values [B, *shape]` of one parameter as `[B, n]`: a matrix with more rows than columns column by column.

    That is the order in which :class:`PerExampleGradients` makes them (the long side lies contiguous in memory), so
    that nothing is copied.
    """
    if values.dim() == 3 and values.shape[1] > values.shape[2]:
        values = values.transpose(1, 2)
    return values.flatten(1)
