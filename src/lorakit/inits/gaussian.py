"""A normal with standard deviation 1/r (PEFT's `gaussian`: the deviation, not the variance), B zero."""

from lorakit.inits import init


@init("gaussian", title="Gaussian A, zero B", formula="A ~ N(0, (1/r)²), B = 0", paper="2106.09685")
def gaussian(method, p, W, gen):
    p["A"].normal_(0, 1 / p["A"].shape[0], generator=gen)
    p["B"].zero_()
