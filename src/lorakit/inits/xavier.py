"""A uniform in ±sqrt(6/(r+i)) (Glorot and Bengio, 2010), B zero."""

from lorakit.inits import init


@init("xavier", title="Xavier A, zero B", formula="A ~ U(±sqrt(6/(r+i))), B = 0")
def xavier(method, p, W, gen):
    p["A"].uniform_(-1, 1, generator=gen).mul_((6 / sum(p["A"].shape)) ** 0.5)
    p["B"].zero_()
