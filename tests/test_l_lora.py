"""L-LoRA: linear in its factors, whatever the start; LoRA with A frozen where B starts at zero; saved as a plain LoRA."""

from __future__ import annotations

import pytest
import tiny
import torch

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats.folder import Folder
from lorakit.method import METHODS
from lorakit.methods.loha import LoHa
from lorakit.methods.lora import LoRA
from lorakit.methods.magnitude import Magnitude

TARGETS = ["q_proj", "down_proj"]
STARTS = [None, "nonzero", "pissa", {"name": "nonzero", "storage": "base"}, {"name": "nonzero", "storage": "none"}]


def adapted(init=None, recipe="l-lora", move=0, **kw):
    model = lorakit.adapt(tiny.llama(), recipe, init=init, seed=4, **{"r": 3, "target_modules": TARGETS} | kw)
    g = torch.Generator().manual_seed(move)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad and move):
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def slots(model):
    return host.slots(model, "default")


@torch.no_grad()
def update(model, path):
    slot = slots(model)[path]
    return slot.map({"default": 1.0}).weight() - slot.map({}).weight()


@pytest.mark.parametrize("init", STARTS)
def test_the_update_is_the_tangent_of_loras_at_the_start(init):
    """Against the derivative of s B A itself."""
    model, begun = adapted(init, move=1), adapted(init)
    for path, slot in slots(model).items():
        s, now, was = slot.methods["default"].core.s, slot.params("default"), slots(begun)[path].params("default")
        start = {k: was[k].detach() for k in "AB"}
        value, slope = torch.func.jvp(lambda A, B, s=s: s * B @ A, (start["A"], start["B"]), tuple(now[k].detach() - start[k] for k in "AB"))
        kept = update(begun, path)  # what of the start is in the function: all of it, or nothing where it is subtracted
        assert torch.allclose(kept, value, atol=1e-5) or (init != STARTS[-1] and float(kept.norm()) < 1e-5)
        assert torch.allclose(update(model, path) - kept, slope, atol=1e-5), path


@pytest.mark.parametrize("init", STARTS)
def test_it_is_linear_in_both_factors(init):
    model, a, b = (adapted(init, move=k) for k in (0, 1, 2))
    x = tiny.ids()
    for path, slot in slots(model).items():
        pa, pb, p = (slots(m)[path].params("default") for m in (a, b, model))
        start, ua, ub = update(model, path), update(a, path), update(b, path)
        with torch.no_grad():
            for k in "AB":
                p[k].add_(0.3 * (pa[k] - p[k]) + 1.7 * (pb[k] - p[k]))
        assert torch.allclose(update(model, path) - start, 0.3 * (ua - start) + 1.7 * (ub - start), atol=1e-5), path
        assert slot.methods["default"].name == "l-lora"
    assert torch.isfinite(tiny.logits(model, x)).all()


def test_a_mix_of_task_vectors_is_a_mix_of_the_layers_outputs():
    """The point of it: W x + Σ λ (y_t - W x) = the output of the summed factors; LoRA's own summed factors have terms between the tasks."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    gaps = {}
    for recipe in ("l-lora", "lora"):
        models = [adapted("nonzero", recipe, move=k) for k in (0, 1, 2)]
        path = "model.layers.0.self_attn.q_proj"
        with torch.no_grad():
            y = [m.get_submodule(path)(x) for m in models]
            p = [slots(m)[path].params("default") for m in models]
            for k in "AB":
                p[0][k].copy_(p[0][k] + 0.5 * (p[1][k] - p[0][k]) + 0.8 * (p[2][k] - p[0][k]))
            mixed = models[0].get_submodule(path)(x)
        want = y[0] + 0.5 * (y[1] - y[0]) + 0.8 * (y[2] - y[0])
        gaps[recipe] = float((mixed - want).norm() / (want - y[0]).norm())
    assert gaps["l-lora"] < 1e-5 < 1e-2 < gaps["lora"]


def test_with_loras_own_start_it_trains_as_lora_with_a_frozen():
    runs = []
    for recipe, kw in (("l-lora", {}), ("lora", {"freeze": ["A"]})):
        model = adapted(recipe=recipe, lora_dropout=0.0, **kw)
        train = [p for p in model.parameters() if p.requires_grad]
        opt, losses = torch.optim.SGD(train, lr=0.5), []
        for _ in range(4):
            loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(float(loss))
        runs.append((losses, tiny.logits(model), model))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6) and runs[0][0][-1] < runs[0][0][0] - 0.01
    assert torch.allclose(runs[0][1], runs[1][1], atol=1e-5)
    for slot in slots(runs[0][2]).values():
        assert not slot.params("default")["A"].grad.any() and slot.params("default")["B"].grad.any()


@pytest.mark.parametrize("init, rank", zip(STARTS, (3, 6, 6, 6, 6), strict=True))
def test_what_is_saved_is_a_plain_lora_of_the_same_function(init, rank, tmp_path):
    model = adapted(init, move=1)
    lorakit.save(model, tmp_path / "a")
    read = Folder(tmp_path / "a")
    assert {type(m) for m in read.methods.values()} == {LoRA} and {m.r for m in read.methods.values()} == {rank}
    assert sorted(read.receipt["converted_to_lora"]) == sorted(slots(model))
    assert torch.allclose(tiny.logits(lorakit.load(tiny.llama(), tmp_path / "a")), tiny.logits(model), atol=1e-4)
    assert lorakit.verify(tmp_path / "a", tiny.llama()).ok
    lorakit.save(model, tmp_path / "b", form="native")
    again = lorakit.load(tiny.llama(), tmp_path / "b", trainable=True)
    assert {s.methods["default"].name for s in slots(again).values()} == {"l-lora"}
    assert torch.allclose(tiny.logits(again), tiny.logits(model), atol=1e-4)
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.llama()), atol=1e-2)


def test_merging_is_exact_and_comes_back_to_the_bit():
    model = adapted("nonzero", move=1)
    was, want = tiny.llama().state_dict(), tiny.logits(model)
    lorakit.merge(model)
    assert torch.allclose(tiny.logits(model), want, atol=1e-5)
    lorakit.unmerge(model)
    assert all(torch.equal(slots(model)[p].site.store.read(), was[f"{p}.weight"]) for p in slots(model))


def test_on_an_embedding_the_factor_that_is_looked_up_learns(tmp_path):
    model = adapted(target_modules=["embed_tokens"], move=1)
    lorakit.save(model, tmp_path / "a")
    assert {m.r for m in Folder(tmp_path / "a").methods.values()} == {3}
    assert torch.allclose(tiny.logits(lorakit.load(tiny.llama(), tmp_path / "a")), tiny.logits(model), atol=1e-4)
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.llama()), atol=1e-3)


def test_what_it_cannot_linearise_is_refused():
    for inner in (LoHa(), Magnitude(LoRA())):
        with pytest.raises(LorakitError, match="l-lora makes a LoRA linear around its start, not"):
            METHODS["l-lora"](inner)
