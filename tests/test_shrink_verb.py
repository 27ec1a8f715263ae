"""`lorakit shrink`: a lower rank, another method as plain LoRA, the error it states, what it refuses."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import lorakit


@torch.no_grad()
def saved(recipe, path, **kw):
    base = tiny.llama()
    base.save_pretrained(path / "base")
    model = lorakit.adapt(tiny.llama(), recipe, target_modules=["q_proj", "down_proj"], **kw).eval()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    lorakit.save(model, path / "adapter")
    return model


def left_out(small, model):
    """What a folder leaves out of a model's update, as a part of it, from the merged weights."""
    near, full, base = (dict(m.named_parameters()) for m in (lorakit.merged(lorakit.load(tiny.llama(), small)), lorakit.merged(model), tiny.llama()))
    left = sum(float((near[n] - full[n]).double().square().sum()) for n in full)
    return (left / sum(float((full[n] - base[n]).double().square().sum()) for n in full)) ** 0.5


@pytest.mark.parametrize("recipe, kw, exact", [("lora", {"r": 6}, 6), ("oft", {"block_size": 4}, 16)])
def test_a_lower_rank_and_the_error_it_says(recipe, kw, exact, tmp_path, call):
    model = saved(recipe, tmp_path, **kw)
    code, out, err = call("shrink", tmp_path / "adapter", "--rank", 2, "-o", tmp_path / "small", "--base", tmp_path / "base", "--json")
    assert code == 0, err
    want = left_out(tmp_path / "small", model)
    assert 0.01 < want < 1 and abs(json.loads(out)["overall"] - want) < 1e-4
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2
    code, out, err = call("shrink", tmp_path / "adapter", "--rank", exact, "-o", tmp_path / "all", "--base", tmp_path / "base")
    assert code == 0 and "verified" in out and "0.00% of the update's norm left out" in out, (out, err)
    assert left_out(tmp_path / "all", model) < 1e-4


def test_what_it_refuses(tmp_path, call):
    saved("hydralora", tmp_path)
    code, _, err = call("shrink", tmp_path / "adapter", "--rank", 2, "-o", tmp_path / "small", "--base", tmp_path / "base")
    assert code == 1 and "depends on its input" in err and not (tmp_path / "small").exists()
    code, _, err = call("shrink", tmp_path / "adapter", "--rank", 0, "-o", tmp_path / "small", "--base", tmp_path / "base")
    assert code == 1 and "at least 1" in err
