"""VeRA: vector-based random matrix adaptation. Kopiczko et al., 2023, arXiv 2310.11454.

    W' = W + diag(b) B diag(d) A

A (r, i) and B (o, r) are random, frozen and one pair for the whole model: allocated at the widest target, each target sees the corner
that fits. d (r) starts at d_initial, b (o) at zero, so W' = W at step 0; only they train, r + o numbers a layer. There is no alpha.
A, then B are drawn uniform in ±sqrt(6/fan_in) from a CPU generator with the seed `projection_prng_key`, as PEFT does, so a key alone
tells them on every machine; of a wide pair the corner keeps the wide pair's bound. Vectors want about ten times LoRA's learning rate.
"""

from __future__ import annotations

from lorakit.method import Leaf, LowRank, check_rank, constant, method, zeros


def kaiming_relu(shape, method, origin, gen):
    """U(±sqrt(6/fan_in)): torch's `kaiming_uniform_` with the gain of a ReLU."""
    from torch import empty

    bound = (6 / shape[-1]) ** 0.5
    return empty(shape).uniform_(-bound, bound, generator=gen)


@method("vera", title="VeRA", paper="2310.11454", formula="W + diag(b) B diag(d) A, A and B frozen and shared", laws=("rank<=r", "identity"))
class VeRA(LowRank):
    peft_layers = ("linear", "transposed")
    peft_dropout = "vera_dropout"

    r: int = 256  # rank; costs almost nothing here
    d_initial: float = 0.1  # where d starts
    projection_prng_key: int = 0  # the seed of A and B
    save_projection: bool = True  # A and B are written to the file, too

    A = Leaf("r i", kaiming_relu, trains=False, shared="model", key="vera_A")
    B = Leaf("o r", kaiming_relu, trains=False, shared="model", key="vera_B")
    d = Leaf("r", constant("d_initial"), key="vera_lambda_d")
    b = Leaf("o", zeros, key="vera_lambda_b")

    def __post_init__(self):
        check_rank("vera", self.r)

    @classmethod
    def examples(cls):
        return [cls(6, 0.3, 5), cls(3, 0.2, 7, False)]

    @property
    def shared_seed(self):
        return self.projection_prng_key

    def factors(self, p):
        return p["b"], p["B"], p["d"], p["A"]

    @property
    def redrawn(self):
        return () if self.save_projection else ("A", "B")

    def to_peft(self):
        return {"peft_type": "VERA", "r": self.r, "d_initial": self.d_initial, "projection_prng_key": self.projection_prng_key,
                "save_projection": self.save_projection, "fan_in_fan_out": False, "init_weights": True}

    @classmethod
    def from_peft(cls, config):
        if config.get("peft_type") != "VERA":
            return None
        return cls(config.get("r", 256), config.get("d_initial", 0.1), config.get("projection_prng_key", 0), config.get("save_projection", True))
