"""OLoRA: B with orthonormal columns from the QR decomposition of the weight. Büyükakyüz, 2024, arXiv 2406.01775.

W = Q R;  B = Q[:, :r], A = R[:r]. Nothing is divided by s, as in PEFT: with s other than 1 the start is s Q_r R_r, and just
that is subtracted. Signs are fixed by a positive diagonal of R. PEFT takes a transposed layer (Conv1D) as it is stored; here
the weight is (o, i) on every layer.
"""

import torch

from lorakit.inits import init
from lorakit.inits.base import seen


@init("olora", title="OLoRA", formula="W = Q R, B = Q_r, A = R_r, W := W - s B A", paper="2406.01775", nonzero=True)
def olora(method, p, W, gen):
    r = p["A"].shape[0]
    Q, R = torch.linalg.qr(seen(p, W()))
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    p["B"].copy_((Q * sign)[:, :r])
    p["A"].copy_((sign[:, None] * R)[:r])
