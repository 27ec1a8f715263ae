"""A uniform in ±1/sqrt(i), B zero: LoRA's default ("Init[A]" of arXiv 2406.08447). Only B has a gradient at step 0."""

from lorakit.inits import init


@init("kaiming", title="Kaiming A, zero B", formula="A ~ U(±1/sqrt(i)), B = 0", paper="2106.09685", aliases=("default", "init-a", "zero-b"))
def kaiming(method, p, W, gen):
    p["A"].uniform_(-1, 1, generator=gen).mul_(p["A"].shape[1] ** -0.5)
    p["B"].zero_()
