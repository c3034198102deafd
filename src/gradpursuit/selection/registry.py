"""Strategies by name: those of this package, of other distributions (entry points), and new combinations of them."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
from pydantic import BaseModel

from gradpursuit.config import MatchingSection, RunConfig, build_section, target_name
from gradpursuit.errors import ConfigError, GradPursuitError, SelectionError, nearest
from gradpursuit.plugins import STRATEGIES, foreign, registered
from gradpursuit.plugins import distribution as named_distribution
from gradpursuit.selection.base import Method, Needs, Selection, SelectionProblem, Settings

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class Strategy:
    """A method under the name that it has in configuration, files and tables.

    Attributes:
        name: of the strategy.
        method: how it chooses.
        distribution: name and version of the distribution that registered it; empty for this package's own.
    """

    name: str
    method: Method
    distribution: str = ""

    @property
    def source(self) -> str:
        """The paper it follows."""
        return str(self.method.source)

    @property
    def stochastic(self) -> bool:
        """Whether its choice depends on the seed."""
        return bool(self.method.stochastic)

    def needs(self, settings: Settings) -> Needs:
        """The signals it reads.

        Raises:
            ConfigError: a method from elsewhere fails.
        """
        try:
            found = self.method.needs(settings)
        except GradPursuitError:
            raise
        except Exception as error:
            raise ConfigError(self._failure("its needs() failed", error)) from error
        if not isinstance(found, Needs):
            raise ConfigError(self._failure(f"its needs() gave {found!r}, no gradpursuit.selection.Needs"))
        return found

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """Choose at most `k` of the pool; `seed` matters to stochastic strategies alone.

        Raises:
            SelectionError: nothing can be chosen, or a method from elsewhere fails or gives no selection.
        """
        try:
            found = self.method.select(problem, k, seed)
        except GradPursuitError:
            raise
        except Exception as error:
            if not self.distribution:
                raise
            raise SelectionError(self._failure("its select() failed", error)) from error
        if wrong := _checked(found, len(problem.ids), k):
            raise SelectionError(self._failure(f"its select() gave {wrong}"))
        return found

    def _failure(self, what: str, error: Exception | None = None) -> str:
        logger.debug("strategy %s failed", self.name, exc_info=error)
        why = f" ({type(error).__name__}: {error})" if error else ""
        return f"strategy '{self.name}'{_origin(self.distribution)}: {what}{why}; mend it, or leave it out"


def strategy(name: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> Strategy:
    """The strategy of that name, with its options.

    Args:
        name: of a strategy, or of an entry of `options` that says with `selector` whose way of choosing it uses.
        options: `selection.options`: settings by name.

    Raises:
        ConfigError: there is no such strategy, an option is unknown or wrong, or what was registered under the name
            cannot be loaded.
    """
    options = options or {}
    own, within = dict(options.get(name, {})), f"selection.options.{name}"
    selector = str(own.pop("selector", name))
    if selector in STRATEGIES:
        factory, distribution = _load(STRATEGIES[selector]), ""
    else:
        others = foreign()
        known = [*STRATEGIES, *others]
        if name not in known and name not in options:
            raise ConfigError(f"unknown strategy '{name}'; {nearest(name, [*known, *options])}")
        if selector not in known:
            which = "selector" if "selector" in options[name] else "without a selector it is a strategy's own name, but"
            raise ConfigError(f"{within}: {which} '{selector}' is no strategy; {nearest(selector, known)}")
        factory, distribution = _load_other(others[selector])
    if selector != name and (name in STRATEGIES or name in registered()):
        raise ConfigError(f"{within}: '{name}' chooses as '{name}' does; give what uses '{selector}' a name of its own")
    _check_name(name, within)
    return Strategy(name, _build(factory, own, within, distribution), distribution)


def check_strategies(config: RunConfig) -> None:
    """Refuse what can be known before any work.

    Raises:
        ConfigError: a strategy is unknown, options are wrong, a strategy needs a target where there is none, or a
            checkpoint is to count that the warm-up will not keep.
    """
    selection = config.selection
    settings = Settings(config.gradients, config.pursuit, selection.options)
    for name in selection.options:
        _check_checkpoints(config, f"selection.options.{name}", settings.strategy(name).method)
    _check_checkpoints(config, "pursuit", config.pursuit)
    for name in selection.strategies:
        needs = settings.strategy(name).needs(settings)
        if needs.target == "rows" and config.data.in_domain and not selection.target:
            raise ConfigError(
                f"selection.strategies: '{name}' needs the rows of a target, but data.target is the pool itself; give "
                "target files, or leave it out"
            )


def _check_checkpoints(config: RunConfig, where: str, section: object) -> None:
    """How many a given trajectory has is known once it is read."""
    wanted = (section.checkpoints if isinstance(section, MatchingSection) else None) or [1]
    if not config.warmup.trajectory and max(wanted) > config.warmup.checkpoints:
        raise ConfigError(
            f"{where}.checkpoints: there is no checkpoint {max(wanted)}, the warm-up keeps {config.warmup.checkpoints} "
            "(warmup.checkpoints), numbered from 1"
        )


def describe_strategies() -> list[dict[str, Any]]:
    """Every strategy there is: name, source, needs, stochastic, options, distribution; of a broken one the error."""
    found: list[dict[str, Any]] = []
    others = registered()
    for name in others.keys() & STRATEGIES.keys():
        named = ", ".join(map(named_distribution, others.pop(name)))
        found.append({"name": name, "error": f"what {named} registers under this name is not used: it is taken"})
    for name in [*STRATEGIES, *others]:
        try:
            made = strategy(name)
            needs = made.needs(Settings())
        except ConfigError as error:
            found.append({"name": name, "error": str(error)})
            continue
        found.append(
            {
                "name": name,
                "source": made.source,
                "needs": str(needs),
                "target": needs.target,
                "stochastic": made.stochastic,
                "options": _options(made.method),
                "distribution": made.distribution,
            }
        )
    return found


def _options(method: Method) -> dict[str, Any]:
    """Name to default."""
    return dict(method.model_dump(mode="json")) if isinstance(method, BaseModel) else {}


def _origin(distribution: str) -> str:
    return f" (of {distribution})" if distribution else ""


def _load(place: str) -> Callable[..., Method]:
    module, _, attribute = place.partition(":")
    factory: Callable[..., Method] = getattr(importlib.import_module(module), attribute)
    return factory


def _load_other(points: Sequence[EntryPoint]) -> tuple[Callable[..., Method], str]:
    """What a distribution registered, and its name and version."""
    first, distributions = points[0], [named_distribution(point) for point in points]
    if len(points) > 1:
        raise ConfigError(
            f"strategy '{first.name}' is registered by {' and by '.join(distributions)}; uninstall all but one"
        )
    try:
        return first.load(), distributions[0]
    except Exception as error:  # whatever the module of somebody else does
        raise ConfigError(
            f"strategy '{first.name}' (of {distributions[0]}, {first.value}) cannot be loaded "
            f"({type(error).__name__}: {error}); mend or uninstall that distribution"
        ) from error


def _build(factory: Callable[..., Method], own: dict[str, Any], within: str, distribution: str) -> Method:
    """The method with its options."""
    if isinstance(factory, type) and issubclass(factory, BaseModel):
        return build_section(factory, own, within)  # type: ignore[return-value]
    try:
        made: Any = factory(**own)
    except GradPursuitError:
        raise
    except Exception as error:
        raise ConfigError(f"{within}{_origin(distribution)}: {type(error).__name__}: {error}") from error
    lacking = [name for name in ("source", "stochastic", "needs", "select") if not hasattr(made, name)]
    if lacking:
        raise ConfigError(f"{within}{_origin(distribution)}: it has no {', '.join(lacking)}, as every strategy must")
    method: Method = made
    return method


def _check_name(name: str, within: str) -> None:
    try:
        target_name(name)
    except ValueError as error:
        raise ConfigError(f"{within}: {str(error).replace('target', 'strategy')}") from None


def _checked(found: Any, N: int, k: int) -> str:
    """As :func:`_what_is_wrong`, also of smaller budgets and of evidence, whatever they are."""
    try:
        if wrong := _what_is_wrong(found, N, k):
            return wrong
        for smaller in found.path:
            if wrong := _what_is_wrong(smaller, N, k):
                return f"a path with {wrong}"
        json.dumps([found.evidence, *(smaller.evidence for smaller in found.path)])
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        return (
            f"evidence, arrays or a path that are none, or cannot be written as JSON ({type(error).__name__}: {error})"
        )
    return "" if isinstance(found.evidence, dict) else f"evidence that is no dict, but {type(found.evidence).__name__}"


def _what_is_wrong(found: Any, N: int, k: int) -> str:
    """Why `found` is no selection of at most k of N rows; empty if it is one."""
    if not isinstance(found, Selection):
        return f"{type(found).__name__}, no gradpursuit.selection.Selection"
    chosen: Sequence[int] = found.indices.tolist()
    if len(chosen) > k or not chosen:
        return f"{len(chosen)} rows where 1 to {k} were asked for"
    if len(set(chosen)) < len(chosen) or not all(0 <= i < N for i in chosen):
        return f"positions that are not distinct or not those of the pool's {N} rows"
    if found.weights.shape != found.indices.shape or found.layers.shape != found.indices.shape:
        return "weights or layers of another number than its rows"
    if not (np.isfinite(found.weights).all() and (found.weights >= 0).all() and found.weights.any()):
        return "weights that are negative, not finite, or all zero"
    return ""
