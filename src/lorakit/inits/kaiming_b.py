"""A zero, B uniform with variance 1/r: "Init[B]" of arXiv 2406.08447. Only A has a gradient at step 0; more stable, slower.

The paper fixes the order of the variance, Theta(1/r); the constant 1 is ours.
"""

from lorakit.inits import init


@init("kaiming-b", title="Zero A, random B", formula="A = 0, B ~ U(±sqrt(3/r))", paper="2406.08447", aliases=("init-b", "zero-a"))
def kaiming_b(method, p, W, gen):
    p["A"].zero_()
    p["B"].uniform_(-1, 1, generator=gen).mul_((3 / p["B"].shape[1]) ** 0.5)
