"""Which method for which goal, as a rule that runs: candidates in order of preference, each with its reason, what does not fit ruled out.

The preferences are rules of thumb from papers and vendors' guides (sources beside each), not measurements on your data: `lorakit compare`
measures. What is exact here is the memory, so what is ruled out for it is ruled out for a fact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, near
from lorakit.planning.memory import Memory, memory


@dataclass(frozen=True)
class Candidate:
    """A configuration and why it may be the one. rank: a share of the rule-of-thumb rank; 0 where it has none."""

    method: str
    why: str
    rank: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    quantize: str | None = None


QLORA = "the base in 4 bits, close to 16-bit results (2305.14314); what it loses, init loftq gets back in part (2310.08659)"
FOUR_BITS = [Candidate("lora", QLORA, quantize="nf4"), Candidate("lora", f"{QLORA}; activations computed twice", checkpointing=True, quantize="nf4")]
LORA_ALL = "all linear layers, as many kinds of matrices as possible before a higher rank (2106.09685 tables 5 and 6; 2405.09673)"
GOALS: dict[str, tuple[str, list[Candidate]]] = {
    "quality": ("the best result, as long as it fits", [
        Candidate("dora", "magnitude and direction apart: above LoRA most of all at low rank, so half of LoRA's rank (2402.09353); slower a step", 0.5),
        Candidate("rslora", f"a scale that keeps higher ranks useful (2312.03732); {LORA_ALL}"),
        Candidate("lora", LORA_ALL),
        Candidate("lora", f"{LORA_ALL}; activations computed twice to save memory", checkpointing=True),
        Candidate("lora-fa", "A frozen, so its input need not be kept for the backward pass (2308.03303)", checkpointing=True),
        Candidate("vera", "two vectors a layer, almost no optimiser state (2310.11454)", 0, {"r": 256}, True), *FOUR_BITS]),
    "memory": ("the least memory while training", [
        Candidate("lora-fa", f"{QLORA}; A frozen, so its input need not be kept (2308.03303)", checkpointing=True, quantize="nf4"),
        Candidate("lora-fa", "A frozen, so its input need not be kept for the backward pass (2308.03303)", checkpointing=True),
        Candidate("vera", "two vectors a layer: almost no gradients and no optimiser state (2310.11454)", 0, {"r": 256}, True),
        Candidate("lora", f"the plain one with activations computed twice; {LORA_ALL}", checkpointing=True),
        Candidate("lora-fa", "A frozen, so its input need not be kept for the backward pass (2308.03303)"),
        Candidate("lora", LORA_ALL)]),
    "speed": ("the shortest step, and none of it left after merging", [
        Candidate("lora", f"two thin products a layer, and it merges exactly; {LORA_ALL}"),
        Candidate("lora-fa", "no gradient for A: one thin product less going back (2308.03303)"),
        Candidate("lora", "attention only: fewer layers pay", options={"target_modules": "attention"}),
        Candidate("bitfit", "only biases train (2106.10199); models without biases have nothing there", 0), *FOUR_BITS]),
    "many-tasks": ("many adapters on one base: small files, quick switching, mixed batches", [
        Candidate("vera", "the random pair is one for all, each task keeps two vectors a layer (2310.11454)", 0, {"r": 256}),
        Candidate("lora", "low rank: every server can switch and batch it (rank 8 and below is a few MB)", 0.5),
        Candidate("rslora", "as LoRA, and the scale does not change when ranks differ between tasks (2312.03732)", 0.5), *FOUR_BITS]),
}


@dataclass(frozen=True)
class Advice:
    """The recommended configuration (None where nothing fits), why, and what was ruled out and why."""

    goal: str
    method: str | None
    options: dict[str, Any]
    checkpointing: bool
    why: str
    memory: Memory | None
    rank_rule: str
    ruled_out: list[tuple[str, str]]
    quantize: str | None = None

    def config(self, base: str) -> dict[str, Any]:
        """The part of a configuration for `lorakit train` that this decides."""
        train = {"train": {"gradient_checkpointing": True}} if self.checkpointing else {}
        kept = {"base": {"path": base, "quantize": self.quantize}} if self.quantize else {"model": base}
        return {**kept, "adapter": {"method": self.method, **self.options}, **train}


def rank_for(parameters: int, rows: int) -> tuple[int, str]:
    """(rank, the rule in words) for a base of so many parameters; rows: the sum of inputs and outputs over the targets. A rule of thumb."""
    low, high, size = next(x for x in ((8, 16, 1e9), (16, 32, 13e9), (8, 16, float("inf"))) if parameters < x[2])
    within = int(0.01 * parameters / rows) if rows else high
    r = max(low, min(high, within))
    r = 1 << (r.bit_length() - 1)  # a power of two
    band = "below 1B parameters" if size == 1e9 else "from 1B to 13B parameters" if size == 13e9 else "above 13B parameters"
    return r, f"{band} rank {low} to {high}, and within that at most 1 % of the base (here rank {within})"


def advise(base: str | Path, goal: str = "quality", limit: int | None = None, **step: Any) -> Advice:
    """The first candidate of a goal that fits into `limit` bytes. `step`: batch, length, dtype, task, optimizer as for `memory`."""
    if goal not in GOALS:
        raise LorakitError(f"plan: unknown goal `{goal}`{near(goal, GOALS)}")
    given = step.pop("quantize", None)
    one, whole = memory(base, "lora", r=1, **step), memory(base, None, **step)
    r, rule = rank_for(whole.trainable, one.trainable)
    out: list[tuple[str, str]] = []
    for c in GOALS[goal][1]:
        options = dict(c.options) | ({"r": max(1, int(r * c.rank)), "lora_alpha": max(1, int(r * c.rank)) * 2} if c.rank else {})
        kept = given or c.quantize
        name = c.method + "".join(f" {k}={v}" for k, v in options.items()) + (f" on {kept}" if kept else "") + (
            " with gradient checkpointing" if c.checkpointing else "")
        try:
            need = memory(base, c.method, quantize=kept, gradient_checkpointing=c.checkpointing or step.get("gradient_checkpointing", False),
                          **{k: v for k, v in step.items() if k != "gradient_checkpointing"}, **options)
        except LorakitError as e:
            out.append((name, str(e)))
            continue
        if limit is None or need.peak <= limit:
            if limit is None or whole.peak <= limit:
                out.append(("full fine-tuning", f"it would fit ({whole.peak / 2**30:.2f} GiB), and is the bound to compare with: lorakit compare"))
            else:
                out.insert(0, ("full fine-tuning", f"{whole.peak / 2**30:.2f} GiB at its peak, {limit / 2**30:.2f} GiB are there"))
            return Advice(goal, c.method, options, c.checkpointing, c.why, need, rule, out, kept)
        out.append((name, f"{need.peak / 2**30:.2f} GiB at its peak, {limit / 2**30:.2f} GiB are there"))
    return Advice(goal, None, {}, False, "nothing fits; mend: a smaller batch or length, --dtype bfloat16, or a smaller base", None, rule, out)
