"""SLERP: along the arc between two task vectors. Shoemake, 1985 (SIGGRAPH).

    ΔW = sin((1-t) Ω) / sin Ω · ΔW_1 + sin(t Ω) / sin Ω · ΔW_2,   cos Ω = <ΔW_1, ΔW_2> / (|ΔW_1| |ΔW_2|),   t = w_2 / (w_1 + w_2)

Nearly parallel vectors, and a zero one, go by (1-t) ΔW_1 + t ΔW_2. The angle comes from the factors.
"""

from __future__ import annotations

import math

from lorakit.errors import LorakitError
from lorakit.merges.base import Spanning, cosines, rule, scope

PARALLEL = 0.9995  # cosine above which the arc is a line


@rule("slerp", "SLERP", "sin((1-t)Ω)/sinΩ ΔW₁ + sin(tΩ)/sinΩ ΔW₂")
class SLERP(Spanning):
    scope: str = scope()

    def check(self, weights):
        if len(weights) != 2:
            raise LorakitError(f"slerp goes between two adapters, not {len(weights)}")
        if min(weights) < 0 or not sum(weights):
            raise LorakitError(f"slerp: the weights must not be negative, and not both 0: {weights[0]}, {weights[1]}")

    def without_base(self, weights):
        pass

    def coefficients(self, G, weights):
        t, cos = weights[1] / sum(weights), float(cosines(G)[0, 1])
        if abs(cos) > PARALLEL or not (G.diagonal() > 0).all():
            return 1 - t, t
        angle = math.acos(cos)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
