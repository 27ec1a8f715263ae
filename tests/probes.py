"""Methods that strain the contracts in ways no shipped method does yet; importing this registers them.

Not part of the library: a shared frozen basis, shared trainable leaves, a row gain that moves the bias, a product of
products, an update that reads W, and a rotation. The conformance suite must hold for each as it stands.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.method import Additive, Leaf, LowRank, Method, constant, kaiming, method, normal, ones, zeros


@method("probe-shared-basis", title="shared frozen basis, private diagonals", formula="W + diag(b) B diag(d) A", laws=("rank<=r", "identity"))
class SharedBasis(LowRank):
    r: int = 6
    d_start: float = 0.1

    A = Leaf("r i", kaiming, trains=False, shared="model")
    B = Leaf("o r", kaiming, trains=False, shared="model")
    d = Leaf("r", constant("d_start"))
    b = Leaf("o", zeros)

    def factors(self, p):
        return p["b"], p["B"], p["d"], p["A"]


@method("probe-shared-trained", title="shared trained factors, private core", formula="W + B M A", laws=("rank<=r", "identity"))
class SharedTrained(LowRank):
    r: int = 6

    A = Leaf("r i", kaiming, shared="model")
    B = Leaf("o r", kaiming, shared="model")
    M = Leaf("r r", zeros)

    def factors(self, p):
        return p["B"], p["M"], p["A"]


@method("probe-gain", title="row gain, bias too", formula="diag(l) W, diag(l) b", laws=("row_gain", "identity"))
class Gain(Method):
    l = Leaf("o", ones)

    def weight(self, p, W):
        return p["l"].to(W.dtype)[:, None] * W

    def act(self, p, x, f, site, drop):
        y = f(x)
        return site.scale(y, p["l"].to(y.dtype), last=True)

    def bias(self, p, b):
        return None if b is None else b * p["l"].to(b.dtype)


@method("probe-hadamard", title="product of products", formula="W + (B1 A1) * (B2 A2)", laws=("rank<=r*r", "identity"))
class Hadamard(Additive):
    r: int = 4

    A1 = Leaf("r i", normal(1.0))
    B1 = Leaf("o r", normal(0.1))
    A2 = Leaf("r i", normal(1.0))
    B2 = Leaf("o r", zeros)

    def delta(self, p, W):
        return (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])


@method("probe-reads-w", title="update that reads W", formula="W + W * (B A)", laws=("identity",))
class ReadsW(Additive):
    reads_base = True
    r: int = 4

    A = Leaf("r i", kaiming)
    B = Leaf("o r", zeros)

    def delta(self, p, W):
        return W() * (p["B"] @ p["A"])


@method("probe-rotation", title="orthogonal rotation", formula="R W, R = (I + S)⁻¹ (I - S)", laws=("orthogonal", "identity"))
class Rotation(Method):
    k: int = 8

    S = Leaf("n k k", zeros)

    def dims(self, o, i):
        if o % self.k:
            raise LorakitError(f"probe-rotation: blocks of {self.k} do not divide {o} outputs")
        return super().dims(o, i) | {"n": o // self.k}

    def weight(self, p, W):
        S = p["S"] - p["S"].mT
        eye = torch.eye(self.k, dtype=S.dtype, device=S.device)
        return torch.block_diag(*torch.linalg.solve(eye + S, eye - S)).to(W.dtype) @ W
