"""DropBP: the backward pass skips random branches, the forward pass none. Woo et al., 2024, arXiv 2402.17812.

    x := x + D(h(x)),   D(y) = y, or with probability p: y without gradient

h is attention or feed-forward of a block. The values are exactly those without the hook; a dropped branch computes them without
keeping anything for the backward pass, and its parameters get no gradient in that step. In every step at least a share p of the
branches is dropped (more are dropped, those of the highest rate first, where chance dropped fewer), and one in which something trains is
always kept. No rescaling by 1 / (1 - p). Once, after a tenth of the steps, the rates are set by what each branch matters:

    S_l = Σ over parameters (|g| - |g without branch l|)²;   all rates 0, then + 0.1 for the branch of least S_l (rate_l + 0.1), up to 0.9,
    until Σ F_l (1 - rate_l) <= (1 - p) Σ F_l          F: operations for a token, two for each weight and 4 h n for attention over n tokens

which takes a forward and backward pass for each branch on that step's batch. Drops are drawn from seed and step: the same in all
processes and in recomputed blocks. In several processes the data-parallel wrapper must look for unused parameters.
"""

from __future__ import annotations

import torch

from lorakit.errors import LorakitError
from lorakit.hooks.base import Hook, hook
from lorakit.hooks.branches import branches
from lorakit.hooks.factors import trained
from lorakit.hooks.surgery import draw


@hook("dropbp", "DropBP", "2402.17812", "x + D(h(x)), D keeps the value and drops the gradient")
class DropBP(Hook):
    p: float = 0.5  # share of the branches whose backward pass is skipped
    rates: list[float] | None = None  # a probability for each branch (attention and feed-forward of block 0, of block 1, …); default: p for all
    measure: float = 0.1  # after this share of the steps the rates are set by sensitivity; 0, or rates given: never
    seed: int = 0  # of the drops

    place = 40
    due = None  # the step after which that is

    def __post_init__(self):
        if not all(0 <= p <= 1 for p in [self.p, self.measure, *(self.rates or [])]):
            raise LorakitError("dropbp: p and rates are probabilities, and measure is a share")

    def setup(self, model):
        self.branches, self.dropped, self.before = branches(model, "dropbp"), set(), {}
        if self.rates is not None and len(self.rates) != len(self.branches):
            raise LorakitError(f"dropbp: {len(self.rates)} rates for {len(self.branches)} branches")
        paths = [path for path, _ in trained(model)]
        inside = [[q for q in paths if q == b.path or q.startswith(f"{b.path}.")] for b in self.branches]
        self.needed = [n for n, mine in enumerate(inside) if mine] if sum(map(len, inside)) == len(paths) else []
        self.given, self.set_rates = None, self.rates
        self.handles = [model.register_forward_pre_hook(self._note, with_kwargs=True)]
        for n, b in enumerate(self.branches):
            self.handles.append(b.module.register_forward_pre_hook(lambda module, args, n=n: self._enter(n, module)))
            self.handles.append(b.module.register_forward_hook(lambda module, args, out, n=n: self._leave(n), always_call=True))

    def start(self, model, optimizer, total):
        self.due = max(1, round(self.measure * total)) if total and self.measure and self.rates is None else None

    def _note(self, module, args, kwargs):
        """The batch on which sensitivity will be measured."""
        if module.training and self.last:
            self.given = args, {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}

    def _enter(self, n: int, module) -> None:
        if n in self.dropped and module.training:
            self.before[n] = torch.is_grad_enabled()
            torch.set_grad_enabled(False)

    def _leave(self, n: int) -> None:
        if n in self.before:
            torch.set_grad_enabled(self.before.pop(n))

    def draw(self, step: int) -> set[int]:
        """The branches dropped in this step."""
        n = len(self.branches)
        rates = self.set_rates or [self.p] * n
        u = torch.rand(n, generator=draw(self.seed, step, "dropbp")).tolist()
        out = {k for k in range(n) if u[k] < rates[k]}
        kept = min(self.needed, key=lambda k: (rates[k], -u[k]), default=None)  # in case all are dropped in which something trains
        for k in sorted(range(n), key=lambda k: (-rates[k], u[k])):
            if len(out - {kept} if out.issuperset(self.needed) else out) >= self.p * n:
                break
            out.add(k)
        return out - {kept} if kept is not None and out.issuperset(self.needed) else out

    def before_forward(self, model, step):
        self.dropped, self.last = self.draw(step), step + 1 == self.due

    last = False  # whether this step's batch is the one to measure on

    def on_interval(self, model, optimizer, scheduler, step):
        if step == self.due and self.given is not None:
            costs = self.costs(model)
            self.set_rates = allocate(self.sensitivity(model), costs, self.p)
        self.given = self.given if step != self.due else None

    def sensitivity(self, model) -> list[float]:
        """S of every branch, from the gradient of all processes together."""
        (args, kwargs), params = self.given, [p for p in model.parameters() if p.requires_grad]

        def norms(dropped: set[int]) -> torch.Tensor:
            self.dropped, self.last = dropped, False
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                grads = torch.autograd.grad(model(*args, **kwargs)["loss"], params, allow_unused=True)
            whole = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(whole)
                whole /= torch.distributed.get_world_size()
            return torch.stack([g.norm() for g in whole.split([p.numel() for p in params])])

        whole = norms(set())
        alone = [k for k in range(len(self.branches)) if set(self.needed) == {k}]  # without it there is no gradient at all
        return [float((whole if k in alone else whole - norms({k})).square().sum()) for k in range(len(self.branches))]

    def costs(self, model) -> list[float]:
        """F of every branch."""
        ids = next((t for t in (*self.given[0], *self.given[1].values()) if isinstance(t, torch.Tensor)), None)
        length, wide = ids.shape[1] if ids is not None and ids.dim() > 1 else 0, getattr(model.config.get_text_config(), "hidden_size", 0)
        return [2.0 * sum(W.numel() for W in b.module.parameters() if W.dim() > 1) + (4.0 * wide * length if b.kind == "attention" else 0.0)
                for b in self.branches]

    def state_dict(self):
        return {"rates": self.set_rates}

    def load_state_dict(self, state):
        self.set_rates = state["rates"]

    def close(self, model):
        for h in self.handles:
            h.remove()


def allocate(sensitivity: list[float], costs: list[float], p: float) -> list[float]:
    """A rate for each branch, the less it matters the higher, until the share p of the operations is saved."""
    tenths = [0] * len(costs)
    while sum(f * (1 - t / 10) for f, t in zip(costs, tenths, strict=True)) > (1 - p) * sum(costs) * (1 + 1e-9):
        free = [k for k, t in enumerate(tenths) if t < 9]
        if not free:
            break
        tenths[min(free, key=lambda k: sensitivity[k] * (tenths[k] + 1))] += 1
    return [t / 10 for t in tenths]
