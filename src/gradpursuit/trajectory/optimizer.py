"""Adam's moments by parameter name, from a live optimizer or from what some trainer saved of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpursuit.errors import TrajectoryError
from gradpursuit.trajectory.model import plain_name, trainable
from gradpursuit.trajectory.optimizer_files import WAY_ON, Key, NoMomentsError, SavedOptimizer


@dataclass(frozen=True)
class AdamState:
    """Moments of one checkpoint: `m` and `v` by parameter name, after `step` optimizer steps."""

    m: dict[str, Tensor]
    v: dict[str, Tensor]
    step: int
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class NoMoments:
    """That a checkpoint after `step` optimizer steps has no moments, and why."""

    reason: str
    step: int


class LackingMoments(dict[str, Tensor]):
    """In place of the moments of a checkpoint that has none: whoever asks for one learns why."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason

    def __missing__(self, name: str) -> Tensor:
        raise NoMomentsError(self._reason)


def live_state(model: nn.Module, optimizer: Any) -> AdamState:
    """Adam's moments of the model's trainable parameters in an optimizer at work; no copies.

    Args:
        model: not wrapped.
        optimizer: of torch, or in the wrapper that accelerate puts around one.

    Raises:
        TrajectoryError: as :func:`adam_state`.
    """
    return adam_state(_saved(model, optimizer), model)


def refuse_foreign_optimizer(model: nn.Module, optimizer: Any) -> None:
    """After a first step: refuse an optimizer without Adam moments; a parameter may still have none.

    Raises:
        NoMomentsError: it keeps something else, or nothing.
    """
    _refuse_foreign_kinds(_saved(model, optimizer))


def adam_state(saved: SavedOptimizer, model: nn.Module) -> AdamState:
    """The moments in `saved`, by the names of :func:`trainable`.

    Names are compared without the prefixes that wrappers add and without the adapter's own name. Numbers are mapped
    through the two parameter groups (with and without weight decay) that `transformers.Trainer` makes of the model.

    Raises:
        NoMomentsError: these are no Adam moments, or they are quantized or factored.
        TrajectoryError: a parameter is missing, unknown or of another shape, the groups are not those of a Trainer,
            or parameters differ in their settings or in their number of steps.
    """
    _refuse_foreign_kinds(saved)
    parameters = trainable(model)
    state = _by_name(saved, model)
    _check_names(saved.origin, set(state), set(parameters))
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            value = state[name].get(key)
            if not isinstance(value, Tensor):
                raise NoMomentsError(f"{saved.origin}: no {key} for '{name}', so it was never moved; {WAY_ON}")
            if value.shape != parameter.shape:
                raise TrajectoryError(
                    f"{saved.origin}: {key} of '{name}' has shape {tuple(value.shape)}, the parameter has "
                    f"{tuple(parameter.shape)}; the state belongs to another model or adapter, or is sharded"
                )
            _refuse_values(saved.origin, key, name, value)
    betas, eps = _common(saved, "betas"), _common(saved, "eps")
    if not isinstance(betas, tuple) or len(betas) != 2 or isinstance(eps, tuple):
        raise TrajectoryError(f"{saved.origin}: betas = {betas!r} and eps = {eps!r} are not two numbers and one")
    check_constants(saved.origin, *betas, eps)
    return AdamState(
        {name: state[name]["exp_avg"] for name in parameters},
        {name: state[name]["exp_avg_sq"] for name in parameters},
        _steps(saved.origin, [state[name].get("step") for name in parameters]),
        *betas,
        eps,
    )


def check_constants(origin: str, beta1: float, beta2: float, eps: float) -> None:
    """Refuse constants that no Adam can have had.

    Raises:
        TrajectoryError: a beta is not in [0, 1), or eps is not above zero and finite.
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise TrajectoryError(f"{origin}: {name} = {beta:g}, but Adam's are at least 0 and below 1; {WAY_ON}")
    if not 0 < eps < 1:
        raise TrajectoryError(
            f"{origin}: eps = {eps:g}, but it must be above 0 and below 1: numbers that were never moved would be "
            f"divided by it; {WAY_ON}"
        )


def _refuse_values(origin: str, key: str, name: str, value: Tensor) -> None:
    """Moments are finite numbers with a fraction, and those of squares are not negative."""
    if not value.dtype.is_floating_point or value.layout != torch.strided or value.is_meta:
        raise NoMomentsError(f"{origin}: {key} of '{name}' is of type {value.dtype}, quantized or not stored; {WAY_ON}")
    if not bool(value.isfinite().all()):
        raise TrajectoryError(f"{origin}: {key} of '{name}' holds numbers that are not finite: training had diverged")
    if key == "exp_avg_sq" and bool((value < 0).any()):
        raise TrajectoryError(f"{origin}: {key} of '{name}' holds negative numbers, which no mean of squares can be")


def learning_rate(saved: SavedOptimizer, key: str = "lr") -> float | None:
    """The learning rate of all parameter groups, or the one a schedule began with (`initial_lr`); None if unknown."""
    if any(key not in group for group in _used(saved)):
        return None
    value = _common(saved, key)
    if isinstance(value, tuple):
        raise TrajectoryError(f"{saved.origin}: {key} = {value!r} is no number")
    return float(value)


def _saved(model: nn.Module, optimizer: Any) -> SavedOptimizer:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    parameters = trainable(model)
    state: dict[Key, dict[str, Any]] = {name: dict(optimizer.state.get(p, {})) for name, p in parameters.items()}
    groups = [{**group, "params": ["all"]} for group in optimizer.param_groups if group["params"]]
    return SavedOptimizer(f"the optimizer ({type(optimizer).__name__})", state, groups)


def _refuse_foreign_kinds(saved: SavedOptimizer) -> None:
    """Everything that is not Adam with plain moments, by the names of what it keeps."""
    kept = {key: value for entry in saved.state.values() for key, value in entry.items()}
    if any(key.startswith(("exp_avg_sq_row", "exp_avg_sq_col")) for key in kept):
        found = "the factored second moments of Adafactor (exp_avg_sq_row, exp_avg_sq_col)"
    elif any(key.startswith(("state1", "qmap", "__bnb")) for key in kept):
        found = f"the state of a bitsandbytes optimizer ({', '.join(sorted(kept)[:4])})"
    elif any(type(value).__module__.startswith("torchao") for value in kept.values()):
        found = "the low-bit state of a torchao optimizer"
    elif not {"exp_avg", "exp_avg_sq"} <= kept.keys():
        holds = ", ".join(sorted(kept)) or "nothing, as SGD does"
        found = f"no Adam moments: the optimizer keeps {holds}"
    else:
        return
    raise NoMomentsError(f"{saved.origin}: {found}; {WAY_ON}")


def _by_name(saved: SavedOptimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The state with our names for its keys."""
    if all(isinstance(key, str) for key in saved.state):
        ours = {plain_name(name): name for name in trainable(model)}
        names: dict[Key, str] = {key: ours.get(plain_name(str(key)), str(key)) for key in saved.state}
    else:
        names = _numbered(saved, model)
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise TrajectoryError(
            f"{saved.origin}: several parameters go by the name '{twice}'; was there a second adapter?"
        )
    return {names[key]: entry for key, entry in saved.state.items() if key in names}


def _numbered(saved: SavedOptimizer, model: nn.Module) -> dict[Key, str]:
    """Names of numbered parameters: those that the groups record, or the Trainer's order."""
    ours = {plain_name(name): name for name in trainable(model)}
    if all("param_names" in group for group in saved.groups):
        pairs = [pair for group in saved.groups for pair in zip(group["params"], group["param_names"], strict=True)]
        return {key: ours.get(plain_name(name), name) for key, name in pairs}
    expected = _trainer_groups(model)
    found = [len(group["params"]) for group in saved.groups]
    wanted = [len(names) for names in expected]
    if [n for n in found if n] != [n for n in wanted if n] or len(found) > 2:
        raise TrajectoryError(
            f"{saved.origin}: the optimizer has groups of {_sizes(found)} parameters; of what is followed here, "
            f"transformers.Trainer makes groups of {_sizes(wanted)}. Either other parameters were trained too (other "
            "layers, norms, biases: that cannot be followed), or the groups are not the Trainer's, and which number is "
            "which parameter is not known; train with the GradientTrajectoryCallback, which knows"
        )
    order = [name for names in expected for name in names]
    numbers = [key for group in saved.groups for key in group["params"]]
    return dict(zip(numbers, order, strict=True))


def _trainer_groups(model: nn.Module) -> list[list[str]]:
    """Names of the trainable parameters that a Trainer decays, and of those it does not, each in its order."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # reads the model alone
    full = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ours = dict(zip(full, trainable(model), strict=True))
    return [[ours[n] for n in full if n in decayed], [ours[n] for n in full if n not in decayed]]


def _check_names(origin: str, found: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        name, what = (missing[0], "has no state") if missing else (extra[0], "is not among what is followed here")
        raise TrajectoryError(
            f"{origin}: does not fit the model: {len(missing)} parameters without a state, {len(extra)} that are not "
            f"followed (first: '{name}' {what}); exactly what was trained can be followed"
        )


def _used(saved: SavedOptimizer) -> list[dict[str, Any]]:
    return [group for group in saved.groups if group["params"]]


def _common(saved: SavedOptimizer, key: str) -> Any:
    """The one value of a setting in all groups."""
    values = [group.get(key) for group in _used(saved)]
    try:
        plain = {tuple(map(float, value)) if isinstance(value, list | tuple) else _number(value) for value in values}
    except (TypeError, ValueError, RuntimeError, OverflowError):
        plain = set()
    if len(plain) != 1 or None in plain:
        raise TrajectoryError(
            f"{saved.origin}: {key} is {', '.join(map(str, values)) or 'not there'} in its parameter groups; it must "
            "be given and the same in all of them"
        )
    return plain.pop()


def _steps(origin: str, values: list[Any]) -> int:
    """The one number of steps of all parameters."""
    try:
        found = sorted({_number(value) for value in values if value is not None} or {None}, key=str)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TrajectoryError(f"{origin}: the number of steps of a parameter is no number") from None
    if len(found) == 1 and found[0] and not 1 <= found[0] < 1e15:
        raise TrajectoryError(f"{origin}: the parameters made {found[0]:g} steps, which cannot be")
    if len(found) != 1 or not found[0]:
        raise TrajectoryError(
            f"{origin}: the parameters made {', '.join(map(str, found))} steps; all must have made the same, so that "
            "one bias correction holds; a layer that is not used in every batch cannot be followed: leave it out"
        )
    return int(found[0])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)  # of a tensor with one element, too


def _sizes(sizes: list[int]) -> str:
    return " and ".join(map(str, sizes)) or "no"
