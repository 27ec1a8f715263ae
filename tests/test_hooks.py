"""What happens while training: every hook against its formula written out slowly, stopped and resumed to the bit, and what it refuses."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from test_training import ROWS, StopAt, arguments, same_state
from tiny import logits

import lorakit
from lorakit import LorakitError, host
from lorakit.hooks import HOOKS, Hook, build, hooked, rounds, surgery
from lorakit.hooks.factors import pairs
from lorakit.training import AdapterTrainer


def batch(k: int) -> torch.Tensor:
    return torch.randint(4, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(k))


def adapted(recipe="lora", **kw):
    return lorakit.adapt(tiny.llama(), recipe, **{"r": 2, **kw})


def steps(model, step, which, extra=True):
    """A hand-written loop; the losses."""
    model.train()
    out = []
    for k in which:
        x = batch(k)
        y = model(input_ids=x, labels=x)
        (y.loss + step.extra_loss(y)).backward()
        step()
        out.append(float(y.loss.detach()))
    return out


def sgd(groups):
    return torch.optim.SGD(groups)


def run(model, hooks, which=range(4), optimizer=torch.optim.AdamW, **kw):
    with hooked(model, optimizer, hooks, **{"lr": 1e-2, **kw}) as step:
        return steps(model, step, which)


def shake(model, seed=0):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=gen) * 0.1)
    return model


# Stop, resume, go on: for every hook

CASES = {
    "lora_plus": ({"ratio": 4.0}, "lora"), "relora": ({"every": 2, "warmup": 1}, "lora"), "cola": ({"links": 4}, "rslora"),
    "two_stage": ({"at": 3, "warmup": 2}, "dora"), "xgblora": ({"boosters": 4, "layers": 1}, "lora"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_resumes_to_the_bit(name, tmp_path):
    options, recipe = CASES[name] if name in CASES else pytest.skip("tested elsewhere")

    def trainer(out, stop=None):
        model = lorakit.adapt(tiny.llama(), recipe, **({} if recipe == "full" else {"r": 3, "lora_dropout": 0.2}))
        return AdapterTrainer(model=model, args=arguments(out), train_dataset=ROWS, hooks=[build({name: options})], callbacks=[StopAt(stop)] if stop else None)

    straight = trainer(tmp_path / "a")
    straight.train()
    trainer(tmp_path / "b", stop=5).train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert resumed.state.global_step == 8
    same_state(straight, resumed)
    x = logits(straight.model.eval())
    assert torch.equal(x, logits(resumed.model.eval()))
    lorakit.save(straight.model, tmp_path / "out")
    again = lorakit.load(tiny.llama(), tmp_path / "out")
    assert torch.allclose(logits(again), x, atol=1e-4), "the saved adapter is not the trained model"
    assert lorakit.verify(tmp_path / "out", tiny.llama()).ok
    lorakit.detach(straight.model)
    for (k, a), b in zip(tiny.llama().state_dict().items(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{k}: detach does not give the base back"
