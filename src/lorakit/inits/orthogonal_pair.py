"""Both factors non-zero and yet B A = 0: PEFT's `init_lora_weights="orthogonal"`. r must be even.

Q from the QR of a Gaussian (r, r); its even rows Qo and odd rows Qe span orthogonal halves of rank space:
A = (G1 Qo)ᵀ / 10, B = G2 Qe / 10 with Gaussian G1 (i, r/2), G2 (o, r/2), so B A = G2 Qe Qoᵀ G1ᵀ / 100 = 0.
"""

import torch

from lorakit.errors import LorakitError
from lorakit.inits import init


@init("orthogonal-pair", title="Orthogonal pair", formula="A = (G1 Qo)ᵀ/10, B = G2 Qe/10, Qe Qoᵀ = 0", aliases=("peft-orthogonal",))
def orthogonal_pair(method, p, W, gen):
    (r, i), o = p["A"].shape, p["B"].shape[0]
    if r % 2:
        raise LorakitError(f"init orthogonal-pair: r must be even, not {r}")
    Q = torch.linalg.qr(torch.randn(r, r, generator=gen)).Q
    p["A"].copy_((torch.randn(i, r // 2, generator=gen) @ Q[0::2]).mT / 10)
    p["B"].copy_(torch.randn(o, r // 2, generator=gen) @ Q[1::2] / 10)
    two = method.two(p)
    if two is not None and (two[0] @ two[1]).norm() > 1e-4 * two[0].norm() * two[1].norm():
        raise LorakitError(f"init orthogonal-pair means nothing for {method.name}: B A is zero only where nothing stands between the factors")
