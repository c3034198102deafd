"""What a reader of the report should know first: the findings, and what to doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradpursuit.config import OWN
from gradpursuit.evaluation.compare import BASE, FULL
from gradpursuit.evaluation.findings import ALL
from gradpursuit.report.texts import figure

_FAITHFUL = 0.1  # a share of the target’s gradient below which the pool says little about it
_DROPPED = 0.1  # a share of dropped rows worth a word
_KNEE = 0.7  # a knee at most here, as a share of the budget, is worth a word
_UNEVEN = 0.5  # effective rows below this share of the rows
_FEW_SEEDS = 3
_IN_WORDS = {BASE: "the model before fine-tuning", FULL: "the whole pool", OWN: "the run’s own target"}

Report = Mapping[str, Any]


def findings(report: Report) -> list[dict[str, str]]:
    """`{"kind": "good" | "warning" | "note", "text": ...}`, warnings first."""
    found = [finding for rule in RULES for finding in rule(report)]
    order = {"warning": 0, "good": 1, "note": 2}
    return [{"kind": kind, "text": text} for kind, text in sorted(found, key=lambda finding: order[finding[0]])]


Found = Iterator[tuple[str, str]]


def _part(report: Report, name: str) -> Any:
    part = report[name]
    return None if isinstance(part, dict) and "missing" in part else part


def _fit(report: Report) -> Found:
    fit = _part(report, "fit")
    if not fit:
        return
    if fit["explained"] < _FAITHFUL:
        yield (
            "warning",
            f"The chosen rows explain only {_percent(fit['explained'])} of the target’s gradient: the pool may hold "
            "little that helps this target, or the warm-up was too short.",
        )
    others = {name: residual for name, residual in fit["strategies"].items() if name != fit["strategy"]}
    if others and fit["relative_residual"] < min(others.values()):
        rest = ", ".join(f"{_percent(1 - residual**2)} for {name}" for name, residual in others.items())
        yield (
            "good",
            f"The rows of {fit['strategy']} explain {_percent(fit['explained'])} of the target’s gradient ({rest}).",
        )


def _control(report: Report) -> Found:
    control = _part(report, "control")
    if not control:
        return
    own = control["own"]["relative_residual"]
    for other in control["others"]:
        name, residual = other["target"] or "the run’s own target", other["relative_residual"]
        if residual <= own:
            yield (
                "warning",
                f"The same rows explain another target, {name}, as well as their own ({_percent(1 - residual**2)} "
                f"beside {_percent(1 - own**2)}): the choice is not specific.",
            )


def _lengths(report: Report) -> Found:
    lengths, weights = _part(report, "lengths"), _part(report, "weights")
    if not lengths:
        return
    for name, found in lengths.items():
        chosen = found["chosen"][weights["strategy"]]
        if chosen["shifted"]:
            way = "longer" if chosen["median"] > found["pool"]["median"] else "shorter"
            yield (
                "warning",
                f"The chosen rows are {way} than the pool’s: median {chosen['median']:g} {name}, "
                f"{found['pool']['median']:g} in the pool (Kolmogorov–Smirnov p = {chosen['p']:.2g}).",
            )


def _weights(report: Report) -> Found:
    weights = _part(report, "weights")
    if weights and weights["effective"] < _UNEVEN * weights["examples"]:
        yield (
            "warning",
            f"A few rows carry most of the weight: {weights['examples']} rows are {weights['effective']:.1f} effective "
            "ones.",
        )


def _budgets(report: Report) -> Found:
    budgets, strategies = _part(report, "budgets"), _part(report, "strategies")
    if not budgets:
        return
    knee = budgets["knee"]["budget"]
    chosen = next(line for line in strategies if line["strategy"] == budgets["strategy"])
    if knee <= _KNEE * chosen["examples"]:
        yield "note", f"{knee} rows already bring 95 % of what {chosen['layers'][0]} bring: a smaller budget would do."
    if len(chosen["layers"]) > 1:
        yield (
            "note",
            f"The pursuit saturated: after {chosen['layers'][0]} rows no further one lowered the residual, so the rest "
            f"was chosen in {len(chosen['layers']) - 1} more passes over what was left (column “layer”).",
        )


def _duplicates(report: Report) -> Found:
    duplicates = _part(report, "duplicates")
    if not duplicates or "missing" in duplicates["top_k"]:
        return
    own = next(line for line in duplicates["strategies"] if line["strategy"] == duplicates["strategy"])
    avoided = max(duplicates["top_k"][kind] - own[kind] for kind in ("text", "gradient"))
    if avoided > 0:
        yield (
            "good",
            f"Taking the best rows one by one would have taken {avoided} more copies of rows already chosen.",
        )


def _cleaning(report: Report) -> Found:
    cleaning = report["cleaning"]
    dropped = sum(line["rows"] for line in cleaning["dropped"] if line["split"] == "pool")
    total = dropped + cleaning["rows"]["pool"]
    if dropped > _DROPPED * total:
        yield (
            "warning",
            f"{dropped} of {total} rows of the pool were dropped ({_percent(dropped / total)}); see the drop table.",
        )


def _comparison(report: Report) -> Found:
    comparison = _part(report, "comparison")
    if not comparison:
        return
    for found in _telling(comparison["differences"]):
        other, target = _IN_WORDS.get(found["other"], found["other"]), _IN_WORDS.get(found["target"], found["target"])
        named = f"{found['reference']} against {other}" + (f" ({target})" if target else "")
        if found["low"] > 0:
            yield "good", f"{named}: held-out loss lower by {_interval(found)}."
        elif found["high"] < 0:
            yield "warning", f"{named}: held-out loss higher by {_interval(found, -1)}."
        else:
            yield (
                "note",
                f"{named}: held-out loss does not tell them apart; a difference of {found['detectable']:.3f} would "
                "have shown.",
            )
    if comparison["seeds"] < _FEW_SEEDS:
        yield "note", f"The comparison has {comparison['seeds']} seeds: take small differences with care."


def _telling(differences: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Differences of loss with the largest budget, at equal budgets, over all targets if there are several."""
    known = [found for found in differences if found["metric"] == "loss" and found["low"] is not None]
    pooled = [found for found in known if found["target"] == ALL] or known
    largest = max((found["reference_budget"] for found in pooled), default=0)
    return (f for f in pooled if f["reference_budget"] == largest and f["other_budget"] in (0, largest))


def _interval(found: Mapping[str, Any], sign: int = 1) -> str:
    low, high = sorted((sign * found["low"], sign * found["high"]))
    return f"{figure(sign * found['difference'])} (95 % interval {figure(low)} to {figure(high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


RULES = (_fit, _control, _lengths, _weights, _budgets, _duplicates, _cleaning, _comparison)
