"""Leaves that many targets share (VeRA, LoTR, Tied-LoRA, VB-LoRA), and methods that depend on their input (HydraLoRA, Poly, serial adapters).

Each against a literal transcription of its paper; a shared tensor exists once in memory, in the optimiser, on disk, in a copy.
"""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_host import shake
from tiny import logits
from torch import nn

import lorakit
from lorakit import LorakitError, host
from lorakit.methods.bottleneck import Bottleneck
from lorakit.methods.hydralora import HydraLoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.loretta_adp import LoRETTAAdp
from lorakit.methods.lotr import LoTR
from lorakit.methods.tied_lora import TiedLoRA
from lorakit.methods.vblora import VBLoRA
from lorakit.methods.vera import VeRA

SHARED = {  # name -> (method, its shared leaves, how many tensors they are on all linear layers of the tiny Llama)
    "vera": (VeRA(5), ("A", "B"), 2),
    "lotr": (LoTR(3), ("A", "B"), 8),  # shapes 16x16 (q, o), 8x16 (k, v), 24x16 (gate, up), 16x24 (down)
    "lotr-model": (LoTR(3, share="model"), ("A", "B"), 2),
    "tied-lora": (TiedLoRA(3), ("A", "B"), 14),  # seven names
    "vblora": (VBLoRA(2, 6, 8), ("V",), 1),
}
LINEARS = 14


def params(model, name="default"):
    return {p: s.params(name) for p, s in host.slots(model, name).items()}


@pytest.mark.parametrize("which", SHARED)
def test_a_shared_tensor_exists_once_everywhere(which, tmp_path):
    method, names, many = SHARED[which]
    model = shake(lorakit.adapt(tiny.llama(), method))
    y = logits(model)

    def tensors(m):
        return {id(t): t for s in host.slots(m).values() for k, t in s.parameters("default").items() if k in names}

    def count(m):
        return len({n for n, p in m.named_parameters() if id(p) in tensors(m)})

    assert len(tensors(model)) == count(model) == many and len(host.slots(model)) == LINEARS
    trains = [p for p in model.parameters() if p.requires_grad]
    assert lorakit.trainable(model)[0] == sum(p.numel() for p in trains) and len({id(p) for p in trains}) == len(trains)
    lorakit.save(model, tmp_path / "a")
    keys = [k for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if not k.startswith("base_model.model.")]
    assert len(keys) == many, keys
    again = lorakit.load(tiny.llama(), tmp_path / "a", trainable=True)
    assert torch.equal(logits(again), y) and len(tensors(again)) == count(again) == many
    other = copy.deepcopy(model)
    assert len(tensors(other)) == count(other) == many and not set(tensors(other)) & set(tensors(model))
    shake(other, seed=5)
    assert torch.equal(logits(model), y), "a copy shares the shared tensors"
    assert torch.allclose(logits(lorakit.merged(model)), y, atol=1e-5)


@pytest.mark.parametrize("which", SHARED)
def test_two_adapters_with_shared_tensors_do_not_meet(which):
    method = SHARED[which][0]
    model = lorakit.adapt(lorakit.adapt(tiny.llama(), method, name="a"), method, name="b", seed=3)
    shake(model, "a", 1), shake(model, "b", 2)
    out = {}
    for n in "ab":
        lorakit.activate(model, n)
        out[n] = logits(model)
    with torch.no_grad():
        for p in {id(t): t for s in host.slots(model, "a").values() for t in s.parameters("a").values()}.values():
            p.zero_()
    lorakit.activate(model, "b")
    assert torch.equal(logits(model), out["b"]), "one adapter's shared tensors are the other's"
    lorakit.delete(model, "a")
    assert torch.equal(logits(model), out["b"])


@pytest.mark.parametrize("which", ["lotr", "tied-lora", "vblora"])
def test_the_gradient_of_a_shared_tensor_is_the_sum_over_its_layers(which):
    method, names, _ = SHARED[which]
    model, x = shake(lorakit.adapt(tiny.llama(), method)), tiny.ids()
    model(input_ids=x, labels=x).loss.backward()
    per_layer: dict[int, torch.Tensor] = {}
    for path in host.slots(model):  # let only this layer see the tensors, everything else a constant copy
        one = copy.deepcopy(model)
        one.zero_grad()
        for p, s in host.slots(one).items():
            if p != path:
                for k in names:
                    holder = s.holders("default")[k]
                    holder._parameters["default"] = nn.Parameter(s.parameters("default")[k].detach().clone(), False)
        one(input_ids=x, labels=x).loss.backward()
        for k in names:
            key = id(host.slots(model)[path].parameters("default")[k])
            per_layer[key] = per_layer.get(key, 0) + host.slots(one)[path].parameters("default")[k].grad
    for s in host.slots(model).values():
        for k in names:
            t = s.parameters("default")[k]
            assert float((t.grad - per_layer[id(t)]).abs().max()) < 1e-5 * max(1, float(t.grad.abs().max()))


# VeRA


def test_vera_is_its_formula_and_its_key_tells_the_projections():
    model = shake(lorakit.adapt(tiny.llama(), "vera", r=5, projection_prng_key=11, target_modules=["q_proj", "down_proj"]))
    g = torch.Generator().manual_seed(11)
    A = nn.init.kaiming_uniform_(torch.empty(5, 24), nonlinearity="relu", generator=g)  # widest input: down_proj's 24
    B = nn.init.kaiming_uniform_(torch.empty(16, 5), nonlinearity="relu", generator=g)
    for path, s in host.slots(model).items():
        p, i = s.params("default"), s.site.in_
        assert torch.allclose(p["A"], A[:, :i], atol=1e-7) and torch.allclose(p["B"], B[: s.site.out], atol=1e-7)
        dense = s.module.weight + torch.diag(p["b"]) @ B[: s.site.out] @ torch.diag(p["d"]) @ A[:, :i]
        assert torch.allclose(s.map({"default": 1.0}).weight(), dense, atol=1e-6), path
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(5 + s.site.out for s in host.slots(model).values())


def test_vera_starts_at_d_initial_and_zero():
    model = lorakit.adapt(tiny.llama(), "vera", r=4)
    assert torch.equal(logits(model), logits(tiny.llama()))
    assert all(torch.equal(p["d"], torch.full((4,), 0.1)) and not p["b"].any() for p in params(model).values())


# LoTR, Tied-LoRA


def test_lotr_updates_share_their_row_and_column_spaces():
    model = shake(lorakit.adapt(tiny.llama(), "lotr", r=2, scale=3.0, target_modules=["q_proj", "o_proj"]))
    every = []
    for s in host.slots(model).values():
        p = s.params("default")
        dW = s.map({"default": 1.0}).weight() - s.module.weight
        assert torch.allclose(dW, (3.0 / 2) * p["B"] @ p["G"] @ p["A"], atol=1e-5)
        every.append(dW)
    assert len(every) == 4
    for dim in (0, 1):
        assert int(torch.linalg.matrix_rank(torch.cat(every, dim), rtol=1e-4)) == 2
    r, L = 2, 4
    assert lorakit.trainable(model)[0] == r * (16 + 16) + L * r * r


@pytest.mark.parametrize("flags", [{}, {"train_u": False}, {"train_v": False}, {"train_A": False}, {"train_B": False}, {"train_A": False, "train_B": False},
                                   {"share": "none"}, {"share": "model"}])
def test_tied_lora_counts_what_its_flags_say_and_can_start(flags):
    model = lorakit.adapt(tiny.llama(), "tied-lora", r=3, lora_alpha=6, target_modules=["q_proj"], **flags)
    assert torch.allclose(logits(model), logits(tiny.llama()), atol=1e-6), "identity at the start"
    on = {k: flags.get(f"train_{k}", True) for k in "ABuv"}
    copies, n, r, d = (2 if flags.get("share") == "none" else 1), 2, 3, 16
    assert lorakit.trainable(model)[0] == copies * (on["A"] + on["B"]) * r * d + n * (on["u"] * r + on["v"] * d)
    x = tiny.ids()
    model(input_ids=x, labels=x).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad), "a start from which nothing moves"
    shake(model)
    for s in host.slots(model).values():
        p = s.params("default")
        u, v = p.get("u", torch.ones(3)), p.get("v", torch.ones(16))
        dense = s.module.weight + 2.0 * torch.diag(v) @ p["B"] @ torch.diag(u) @ p["A"]
        assert torch.allclose(s.map({"default": 1.0}).weight(), dense, atol=1e-5)


def test_tied_lora_refuses_a_start_that_is_dead():
    with pytest.raises(LorakitError, match="B or v must train"):
        TiedLoRA(train_B=False, train_v=False)


# VB-LoRA


def test_vblora_pieces_are_mixtures_of_the_k_best():
    method = VBLoRA(2, 6, 4, 2)
    model = shake(lorakit.adapt(nn.Sequential(nn.Linear(12, 8)), method, target_modules=["0"]))
    p = params(model)["0"]
    V, A, B = p["V"], torch.zeros(2, 12), torch.zeros(8, 2)

    def comb(z):
        best = sorted(range(6), key=lambda j: -z[j].item())[:2]
        total = sum(math.exp(z[j].item()) for j in best)
        return sum(math.exp(z[j].item()) / total * V[j] for j in best)

    for i in range(2):
        for t in range(3):
            A[i, 4 * t:4 * t + 4] = comb(p["la"][i, t])
        for t in range(2):
            B[4 * t:4 * t + 4, i] = comb(p["lb"][t, i])
    x = torch.randn(5, 12)
    assert torch.allclose(model(x), F.linear(x, model[0].weight + B @ A, model[0].bias), atol=1e-5)
    model(x).square().sum().backward()
    grads = host.slots(model)["0"].parameters("default")["la"].grad
    assert (grads != 0).sum(-1).max() == 2, "only the chosen logits have a gradient"


def test_vblora_says_which_length_fits():
    with pytest.raises(LorakitError, match="vector_length 256 does not divide"):
        lorakit.adapt(tiny.llama(), "vb-lora")


# HydraLoRA


def test_hydralora_is_its_formula_token_by_token():
    model = shake(lorakit.adapt(nn.Sequential(nn.Linear(6, 5)), "hydralora", r=2, alpha=8.0, n=3, target_modules=["0"]))
    p, x = params(model)["0"], torch.randn(2, 4, 6)
    y = model(x)
    for b in range(2):
        for t in range(4):
            w = torch.softmax(p["G"] @ x[b, t], 0)
            want = model[0].weight @ x[b, t] + model[0].bias + 4.0 * sum(w[k] * (p["B"][k] @ (p["A"] @ x[b, t])) for k in range(3))
            assert torch.allclose(y[b, t], want, atol=1e-5)
    with torch.no_grad():
        order = [2, 0, 1]
        for k in "BG":
            t = host.slots(model)["0"].parameters("default")[k]
            t.copy_(t[order].clone())
    assert torch.allclose(model(x), y, atol=1e-6), "heads permuted together with the router's rows"


def test_hydralora_of_one_head_is_lora():
    x, layer = torch.randn(3, 6), nn.Linear(6, 5)
    hydra = shake(lorakit.adapt(nn.Sequential(copy.deepcopy(layer)), HydraLoRA(2, 8.0, 1), target_modules=["0"]))
    lora = lorakit.adapt(nn.Sequential(layer), LoRA(2, 8.0), target_modules=["0"])
    with torch.no_grad():
        for k in "AB":
            params(lora)["0"][k].copy_(params(hydra)["0"][k].squeeze(0) if k == "B" else params(hydra)["0"][k])
    assert torch.allclose(hydra(x), lora(x), atol=1e-6)


# Poly


def poly(**kw):
    return lorakit.adapt(nn.Sequential(nn.Linear(6, 4)), "poly", target_modules=["0"], **{"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2, **kw})


def test_poly_mixes_skills_for_each_rows_task():
    model, x, ids = shake(poly()).eval(), torch.randn(4, 7, 6), [2, 0, 1, 2]
    p = params(model)["0"]
    with lorakit.given(model, task_ids=ids):
        y = model(x)
    for b, t in enumerate(ids):
        w = torch.sigmoid(p["Z"][t]).view(2, 2)
        w = w / w.sum(1, keepdim=True)
        A = torch.cat([sum(w[q, s] * p["A"][q, s] for s in range(2)) for q in range(2)], 0)
        B = torch.cat([sum(w[q, s] * p["B"][q, s] for s in range(2)) for q in range(2)], 1)
        assert torch.allclose(y[b], F.linear(x[b], model[0].weight, model[0].bias) + x[b] @ A @ B / 3, atol=1e-5)


def test_poly_of_one_task_merges_and_of_one_skill_is_lora():
    model, x = shake(poly(task=1)).eval(), torch.randn(5, 6)
    assert torch.allclose(lorakit.merged(model)(x), model(x), atol=1e-6)
    one = shake(poly(n_tasks=1, n_skills=1, n_splits=1)).eval()
    p = params(one)["0"]
    assert torch.allclose(one(x), one[0].slot.site.op(x, one[0].weight, one[0].bias) + x @ p["A"][0, 0] @ p["B"][0, 0] / 3, atol=1e-5)


def test_poly_without_tasks_and_with_unknown_ones_says_so():
    model = poly()
    with pytest.raises(LorakitError, match="which task"):
        model(torch.randn(2, 6))
    with pytest.raises(LorakitError, match="asks for `task_id`"), lorakit.given(model, task_id=[0]):
        pass
    with pytest.raises(LorakitError, match="poly.*cannot be merged"):
        lorakit.merge(model)


def test_poly_routes_at_random_while_training():
    model = shake(poly(task=0)).train()
    x = torch.randn(3, 6)
    torch.manual_seed(0)
    a, b = model(x), model(x)
    torch.manual_seed(0)
    assert not torch.equal(a, b) and torch.equal(model(x), a)


# Serial adapters


def test_houlsby_sits_behind_both_parts_of_every_block_and_starts_as_the_base():
    model = lorakit.adapt(tiny.bert(), "houlsby", width=5)
    assert set(host.slots(model)) >= {f"bert.encoder.layer.{n}.{p}" for n in range(2) for p in ("attention.output.dense", "output.dense")}
    assert torch.equal(logits(model), logits(tiny.bert()))
    assert set(host.slots(lorakit.adapt(tiny.llama(), "pfeiffer", width=5))) == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}


def test_loretta_adp_is_its_formula_core_by_core():
    model = shake(lorakit.adapt(nn.Sequential(nn.Linear(6, 4)), LoRETTAAdp(3, 2, 3, 0.5, "tanh"), target_modules=["0"]))
    p, x = params(model)["0"], torch.randn(2, 3, 6)

    def train(f):  # every entry on its own
        G = [p[f"{f}{k}"] for k in (1, 2, 3)]
        return torch.stack([(G[0][:, a] @ G[1][:, b] @ G[2][:, c]).reshape(()) for a in range(G[0].shape[1]) for b in range(G[1].shape[1])
                            for c in range(G[2].shape[1])])

    D, U = train("d").view(3, 4), train("u").view(4, 3)
    y = F.linear(x, model[0].weight, model[0].bias)
    assert torch.allclose(model(x), y + 0.5 * (torch.tanh(y @ D.T + p["d"]) @ U.T + p["u"]), atol=1e-6)


@pytest.mark.parametrize("act", ["gelu", "relu", "silu", "tanh"])
def test_a_bottleneck_is_its_formula(act):
    model = shake(lorakit.adapt(nn.Sequential(nn.Linear(6, 4)), Bottleneck(3, 0.5, act), target_modules=["0"]))
    p, x = params(model)["0"], torch.randn(2, 3, 6)
    y = F.linear(x, model[0].weight, model[0].bias)
    want = y + 0.5 * (getattr(F, act)(y @ p["D"].T + p["d"]) @ p["U"].T + p["u"])
    assert torch.allclose(model(x), want, atol=1e-6)


def test_a_serial_adapter_and_a_lora_are_active_at_once():
    model = lorakit.adapt(nn.Sequential(nn.Linear(6, 4)), LoRA(2), name="a", target_modules=["0"])
    lorakit.adapt(model, Bottleneck(3), name="b", target_modules=["0"])
    shake(model, "a", 1), shake(model, "b", 2)
    lorakit.activate(model, "a", "b")
    x, p = torch.randn(5, 6), params(model, "b")["0"]
    y = F.linear(x, host.slots(model)["0"].map({"a": 1.0}).weight(), model[0].bias)
    assert torch.allclose(model(x), y + F.gelu(y @ p["D"].T + p["d"]) @ p["U"].T + p["u"], atol=1e-5)
    with lorakit.rows(model, ["a", "b", None, "b", "a"]):
        mixed = model(x)
    lorakit.activate(model, "b")
    assert torch.allclose(mixed[[1, 3]], model(x)[[1, 3]], atol=1e-6)


@pytest.mark.parametrize("recipe", ["hydralora", "houlsby", "loretta-adp"])
def test_what_depends_on_its_input_is_saved_verified_and_not_merged(recipe, tmp_path):
    options = {"width": 3} if "hydra" not in recipe else {"r": 2, "n": 2}
    model = shake(lorakit.adapt(tiny.llama(), recipe, **options))
    lorakit.save(model, tmp_path / "a")
    again = lorakit.load(tiny.llama(), tmp_path / "a", probe=True)
    assert torch.equal(logits(again), logits(model))
    lorakit.verify(tmp_path / "a", tiny.llama()).raise_if_failed()
    with pytest.raises(LorakitError, match="depends on its input, so it cannot be merged; nothing was"):
        lorakit.merged(model)
    with pytest.raises(LorakitError, match="depends on its input, so no LoRA is near it"):
        lorakit.save(model, tmp_path / "b", form="lora")
    assert not (tmp_path / "b").exists()
