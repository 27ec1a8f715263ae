"""Adapters made of other adapters: one file per rule, `ROWS` the names that people know."""

from __future__ import annotations

from typing import Any

from lorakit.merges import (
    breadcrumbs,
    byom,
    dare_linear,
    dare_ties,
    della,
    fisher,
    linear,
    magnitude_prune,
    model_stock,
    peft,
    regmean,
    slerp,
    svd,
    ties,
)
from lorakit.merges.base import RULES, Rule

__all__ = ["ROWS", "breadcrumbs", "byom", "dare_linear", "dare_ties", "della", "fisher", "linear", "magnitude_prune", "model_stock", "peft", "regmean", "slerp",
           "svd", "ties"]

ROWS: dict[str, tuple[type[Rule], dict[str, Any]]] = {name: (cls, {}) for name, cls in RULES.items()} | {
    "task-arithmetic": (RULES["linear"], {}),
    "cat": (RULES["linear"], {}),
    "dare": (RULES["dare-linear"], {}),
    "knots": (RULES["ties"], {"space": "knots"}),  # as the paper names its TIES variant
    "knots-ties": (RULES["ties"], {"space": "knots"}),
    "knots-dare-ties": (RULES["dare-ties"], {"space": "knots"}),
}
