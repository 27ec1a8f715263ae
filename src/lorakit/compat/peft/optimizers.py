"""PEFT's optimisers: LoRA+'s groups, and AdamW for LoRA-FA. `from lorakit.compat.peft.optimizers import …`, was: `from peft.optimizers import …`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from lorakit import host
from lorakit.compat.peft.weights import base_of
from lorakit.errors import LorakitError
from lorakit.hooks.lora_fa import LoRAFA


def create_loraplus_optimizer(model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any) -> Optimizer:
    """An optimiser in which B learns loraplus_lr_ratio times as fast as A (Hayou et al., 2024, arXiv 2402.12354).

    Four groups, as PEFT has them: what else trains and A at lr, what belongs to an adapted embedding at loraplus_lr_embedding (1e-6), B and vectors at
    lr · ratio, and of these biases and norms without loraplus_weight_decay (0.0). Other options go to the optimiser.
    """
    decay, table_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    slots = [(s, a) for s in host.slots(base_of(model)).values() for a in s.methods]
    tables = {id(p) for s, a in slots if s.site.lookup for p in s.parameters(a).values()}
    fast = {id(s.parameters(a)["B"]) for s, a in slots if "B" in s.parameters(a)}
    fast |= {id(p) for s, a in slots if s.site.read and s.site.in_ == 1 for p in s.parameters(a).values()}  # a norm's gain, a bias
    decays = {n for n in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in n}
    slow, embedding, faster, bare = groups = [], [], [], []
    for n, p in model.named_parameters():
        if p.requires_grad:
            first = id(p) not in fast and p.ndim != 1
            (embedding if id(p) in tables else slow if first else faster if n in decays else bare).append(p)
    rates = (lr, table_lr, lr * loraplus_lr_ratio, lr * loraplus_lr_ratio)
    made = [{"params": g, "lr": rate, "weight_decay": 0.0 if g is bare else decay} for g, rate in zip(groups, rates, strict=True)]
    return optimizer_cls(made, lr=lr, **kwargs)


class LoraFAOptimizer(Optimizer):
    """AdamW as transformers had it (eps on the uncorrected root, decay after the step), on gradients that LoRA-FA's hook corrected."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6):
        self.model, self.hook = base_of(model), LoRAFA()
        self.hook.setup(self.model)
        params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.hook.before_step(self.model, self, 0)
        for group in self.param_groups:
            (one, two), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                mean, square = state["exp_avg"].lerp_(p.grad, 1 - one), state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                size = lr * (1 - two ** state["step"]) ** 0.5 / (1 - one ** state["step"])
                p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
                p.mul_(1 - lr * group["weight_decay"])
        return loss


def create_lorafa_optimizer(model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0,
                            use_rslora: bool | None = None) -> LoraFAOptimizer:
    """Freezes every A and gives the optimiser that steps with g_B (A Aᵀ + 1e-8 I)⁻¹ / s² (Zhang et al., 2023, arXiv 2308.03303).

    s and r are each target's own, so r, lora_alpha and use_rslora decide nothing, as in PEFT 0.21.
    """
    if use_rslora is not None:
        said = {n: bool(getattr(c, "use_rslora", False)) for n, c in model.peft_config.items() if n in model.active_adapters}
        if wrong := [n for n, v in said.items() if v != use_rslora]:
            raise LorakitError(f"create_lorafa_optimizer: use_rslora={use_rslora}, and these adapters say otherwise: {', '.join(wrong)}; mend: leave it out")
        warnings.warn("create_lorafa_optimizer: use_rslora decides nothing; LoraConfig says it", FutureWarning, stacklevel=2)
    return LoraFAOptimizer(model, lr, weight_decay)


__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"]
