"""BiLoRA: factors on one part of the training rows, the diagonal between them on the other. Qiang et al., 2024, arXiv 2403.13037.

    W' = W + s P diag(λ) Q,   P (o, r), λ = λ(θ) (r), Q (r, i)
    lower, rows D1:   V = (P, Q) := a step on L1 = C(V, λ; D1) + γ1 mean(‖PᵀP - I‖, ‖QQᵀ - I‖)
    upper, rows D2:   θ := a step on C(V', λ; D2) + γ2 R2(λ),   V' = V - η ∇_V L1,   every `lower` steps, `upper` times
    dC/dλ = ∂C/∂λ - η ∂²L1/∂λ∂V v,   v = ∂C/∂V',   the product as (∂L1/∂λ at V + ε v  -  at V - ε v) / 2ε,   ε = epsilon / ‖v‖

λ = softmax(θ) of each matrix, or θ (`real`), or sigmoid(θ) (`binary`; R2 is its mean entropy, γ2 rises linearly over the training). A step of
training is one of the lower level, and V' is where plain gradient descent would end it; θ moves in the same optimiser step. `first_order`
leaves the second term out. λ has no gradient from D1 and V none from D2. D2 is a share of the training rows drawn by the seed, never those
held out to evaluate, in batches of the size of one device's. An adapter that does nothing yet starts at θ = 0 and P = 0; with `real` as it is.

softmax makes each λ 1 / r: with a scale alpha / r choose alpha r times as large as for LoRA. The paper fixes the levels, the 8:2 split, the
orthogonality and the three λ; numbers of steps, rates, γ1, γ2 (0.1 here), the hypergradient (here that of DARTS, 1806.09055) and R2's form are
not in it. A step of the upper level costs three passes more, with `first_order` one. What is saved is the adapter with the λ it found;
training V anew on all rows with λ fixed is a second run.
"""

from __future__ import annotations

from lorakit.hooks.base import hook
from lorakit.hooks.components import far_from_orthonormal, known_total
from lorakit.hooks.two_levels import TwoLevels
from lorakit.method import choice


@hook("bilora", "BiLoRA", "2403.13037", "P, Q on one part of the rows, λ on the other through one step of P, Q")
class BiLoRA(TwoLevels):
    held: float = 0.2  # share of the training rows that is D2
    variant: str = choice("softmax", ("softmax", "real", "binary"))  # what λ is of θ
    lower: int = 1  # T1: steps of P and Q from one turn of the upper level to the next
    upper: int = 1  # T2: steps of λ in a turn
    lr: float = 0.0  # rate of θ; 0: that of the rest
    first_order: bool = False  # without the second derivative
    gamma1: float = 0.1  # weight of the orthogonality term
    squared: bool = False  # squared norms in that term
    gamma2: float = 0.1  # weight of R2, with `binary`
    epsilon: float = 0.01  # length of the way along v to both sides
    seed: int = 0  # of D2 and its batches

    def __post_init__(self):
        super().__post_init__()
        self.shape, self.weight2 = self.variant, self.gamma2 if self.variant == "binary" else 0.0

    def start(self, model, optimizer, total):
        super().start(model, optimizer, total)
        self.total = known_total(total, "bilora") if self.weight2 else total

    def summary(self):
        least, most = (float(f([f(g.gate.detach().flatten().tolist()) for g in self.of])) for f in (min, max))
        return f"gates from {least:.3g} to {most:.3g} after {self.seen} steps on the {self.held:.0%} of the rows kept apart"

    def extra_loss(self, model, outputs):
        return self.gamma1 * far_from_orthonormal(self.of, self.squared) if self.gamma1 else 0.0
