"""A with orthonormal rows, B zero: the recommended start of Asymmetric LoRA (arXiv 2402.16842), A Aᵀ = I.

The rows come from a QR of a Gaussian (i, r), signs fixed; where r exceeds i no such rows exist and that is an error.
"""

import torch

from lorakit.errors import LorakitError
from lorakit.inits import init


@init("orthogonal", title="Orthonormal rows of A, zero B", formula="A Aᵀ = I, B = 0", paper="2402.16842", aliases=("orthogonal-rows",))
def orthogonal(method, p, W, gen):
    r, i = p["A"].shape
    if r > i:
        raise LorakitError(f"init orthogonal: {r} orthonormal rows do not fit into {i} inputs; mend: r at most {i} there (rank_pattern)")
    Q, R = torch.linalg.qr(torch.randn(i, r, generator=gen))
    p["A"].copy_((Q * R.diagonal().sign()).mT)
    p["B"].zero_()
