"""Both factors uniform with variance of order 1/width: "Beyond zero initialization", arXiv 2505.23194.

A, B ~ U(±1/sqrt(i)), i for both. delta is not zero then; by default it is subtracted (storage `offset` or `base`), so
the model is the base at step 0 and both factors have gradients there.
"""

from lorakit.inits import init


@init("nonzero", title="Non-zero symmetric", formula="A, B ~ U(±1/sqrt(i)), W := W - s B A", paper="2505.23194", nonzero=True,
      aliases=("nonzero-symmetric", "init-ab"))
def nonzero(method, p, W, gen):
    bound = p["A"].shape[1] ** -0.5
    for k in ("A", "B"):
        p[k].uniform_(-1, 1, generator=gen).mul_(bound)
