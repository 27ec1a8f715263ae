"""Wrote the golden folders of format 1 (`PYTHONPATH=src:tests python tests/golden/make.py v1`). Never overwrite one: they are
what people have on disk. A new format gets a new folder, and the old ones must go on loading."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit
from lorakit import host

HERE = Path(__file__).parent
OURS = {
    "lora": ("lora", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 7}}),
    "dora": ("dora", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "native": ("lora-nonzero", {"r": 2, "target_modules": ["v_proj", "embed_tokens"]}),
}


@torch.no_grad()
def base() -> nn.Module:
    """A tiny Llama whose weights come from a formula, so that no generator can change them."""
    model = tiny.llama()
    for n, p in model.named_parameters():
        p.copy_((torch.arange(p.numel(), dtype=torch.float64).mul_(0.37).add_(len(n)).sin_() * 0.3).view_as(p) + ("norm" in n))
    return model


@torch.no_grad()
def fill(named) -> None:
    for n, p in named:
        p.copy_((torch.arange(p.numel(), dtype=torch.float64).mul_(0.53).add_(len(n)).cos_() * 0.2).view_as(p) + 2 * ("magnitude" in n))


def make(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there; a golden folder is never written twice")
    outputs = {"base": tiny.logits(base())}
    for name, (method, options) in OURS.items():
        model = lorakit.adapt(base(), method, **options)
        fill((n, p) for n, p in model.named_parameters() if p.requires_grad)
        lorakit.save(model, folder / name, form="native" if name == "native" else "auto")
        outputs[name] = tiny.logits(model)
        assert host.slots(model)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(), peft.LoraConfig(r=3, lora_alpha=4, target_modules=["o_proj", "gate_proj"], use_dora=True, task_type="CAUSAL_LM"))
        fill((n, p) for n, p in model.named_parameters() if "lora_" in n)
        model.eval().save_pretrained(folder / f"peft-{peft.__version__}")
    outputs[f"peft-{peft.__version__}"] = tiny.logits(model)
    save_file({k: v.contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    make(HERE / sys.argv[1])
