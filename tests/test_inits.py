"""Starts: each formula against a slow transcription, step 0 is the base, gradients as theory says, files hold on the untouched base."""

from __future__ import annotations

import dataclasses
import json
import sys

import peft
import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit import LorakitError, host
from lorakit.compat import peft as ours
from lorakit.inits import INITS
from lorakit.inits.eva import Components
from lorakit.kernels.svd import fast_svd
from lorakit.recipes import compose

WEIGHT_ONLY = ["pissa", "pissa_niter_4", "milora", "olora"]
FROM_DATA = [{"name": "corda"}, {"name": "corda", "mode": "kpm"}, {"name": "lora-ga"}, {"name": "lora-ga", "direction": "random"}, {"name": "eva"}]
STARTS = [{"name": n} for n in ("pissa", "milora", "olora")] + [{"name": "pissa", "niter": 4}] + FROM_DATA


def batches(n=3):
    return [{"input_ids": tiny.ids() + 0, "labels": tiny.ids() + 0}] + [
        {"input_ids": (ids := torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(k))), "labels": ids} for k in range(n - 1)]


def given(init, data=None):
    return {"init": init} | ({"data": batches() if data is None else data} if INITS[init["name"]].collect else {})


def gap(a, b):
    return float((a - b).detach().abs().max())


def weight(o=12, i=9, seed=0):
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed))


class Loss(nn.Module):
    """A linear layer with a loss, in the shape of a transformers model."""

    def __init__(self, W, seed=0):
        super().__init__()
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.layer.weight.data.copy_(W)

    def forward(self, x, y=None):
        out = self.layer(x)
        return type("Out", (), {"loss": None if y is None else ((out - y) ** 2).sum(), "logits": out})()


def xy(n=40, o=12, i=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, i, generator=g), "y": torch.randn(n, o, generator=g)}


def made(init, W, r=3, data=None, alpha=6.0, **options):
    model = lorakit.adapt(Loss(W), "lora", r=r, alpha=alpha, targets=["layer"], init=init, **({} if data is None else {"data": data}), **options)
    p = {k: v.detach() for k, v in host.slots(model)["layer"].parameters("default").items()}
    return model, p


# What all have in common


@pytest.mark.parametrize("storage", ["offset", "base"])
@pytest.mark.parametrize("init", STARTS, ids=str)
@pytest.mark.parametrize("recipe", ["lora", "dora", "rslora"])
def test_step_0_is_the_base_and_files_hold_on_the_untouched_base(recipe, init, storage, tmp_path):
    if recipe != "lora" and (storage == "base" or "mode" in init or "direction" in init):
        pytest.skip("once is enough")
    model = tiny.llama()
    base, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    lorakit.adapt(model, recipe, r=2, alpha=3, **given(init | {"storage": storage}))
    assert gap(tiny.logits(model), base) < 1e-5
    assert not any(m._forward_pre_hooks for m in model.modules()), "hooks that gathered statistics are gone"
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        opt.step()
        opt.zero_grad()
    y = tiny.logits(model)
    assert gap(y, base) > 1e-3
    lorakit.save(model, tmp_path / "a")
    told = json.loads((tmp_path / "a" / "receipt.json").read_text())["start"]
    if INITS[init["name"]].nonzero:
        assert told.startswith(f"{init['name']}; written as {'factors' if recipe == 'dora' else 'a plain LoRA'}"), told
    else:
        assert told is None
    again = tiny.llama()
    assert gap(tiny.logits(lorakit.load(again, tmp_path / "a")), y) < 2e-5
    assert lorakit.verify(tmp_path / "a", tiny.llama()).ok
    lorakit.detach(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()), "the base comes back to the bit"


@pytest.mark.parametrize("init", STARTS, ids=str)
def test_a_bf16_base(init):
    """Offset: nothing is rounded but the sum of two products; the base's own weights are left as they are."""
    model = tiny.llama().to(torch.bfloat16)
    base, weights = tiny.logits(model), model.lm_head.weight.clone()
    lorakit.adapt(model, "lora", r=2, **given(init))
    assert gap(tiny.logits(model), base) <= 2**-5 * float(base.abs().max()) and torch.equal(model.lm_head.weight, weights)


@pytest.mark.parametrize("init", [*STARTS[:3], {"name": "lora-ga"}, {"name": "corda"}], ids=str)
def test_offset_and_base_storage_have_the_same_gradients_and_more_than_lora(init):
    grads = {}
    for storage in ("offset", "base"):
        model = lorakit.adapt(tiny.llama(), "lora", r=2, **given(init | {"storage": storage}))
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        grads[storage] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for n, g in grads["offset"].items():
        assert float(g.norm()) > 0 and gap(g, grads["base"][n]) < 1e-3 * float(g.abs().max())
    plain = lorakit.adapt(tiny.llama(), "lora", r=2)
    plain(tiny.ids(), labels=tiny.ids()).loss.backward()
    assert all(float(p.grad.norm()) == 0 for n, p in plain.named_parameters() if "lora_A" in n), "LoRA's A has no gradient at step 0"


def test_pissa_has_larger_gradients_than_lora():
    """At the recommended alpha = r: PiSSA's grow with sqrt(s), LoRA's with s."""
    def norm(**options):
        model = lorakit.adapt(tiny.llama(), "lora", r=2, alpha=2, **options)
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        return float(torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm())

    assert norm(init="pissa") > 1.5 * norm()


@pytest.mark.parametrize("init", WEIGHT_ONLY)
def test_other_layers_conv1d_and_convolutions(init):
    model = tiny.gpt2()
    y = tiny.logits(model)
    lorakit.adapt(model, "lora", r=2, target_modules=["c_attn", "wte"], init=init)
    assert gap(tiny.logits(model), y) < 1e-5
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2))
    x = torch.randn(2, 4, 5, 5)
    y = conv(x)
    lorakit.adapt(conv, "lora", r=2, targets=["0"], init=init)
    assert gap(conv(x), y) < 1e-5


# PiSSA, MiLoRA, OLoRA


@pytest.mark.parametrize("alpha", [3.0, 7.0])
def test_pissa_is_the_best_approximation_and_leaves_the_rest(alpha):
    W = weight()
    model, p = made({"name": "pissa", "storage": "base"}, W, alpha=alpha)
    S = torch.linalg.svdvals(W)
    rest = model.layer.weight.detach()
    assert gap(torch.linalg.svdvals(rest)[:6], S[3:]) < 1e-5 and float((rest + alpha / 3 * p["B"] @ p["A"] - W).abs().max()) < 1e-5
    assert gap(torch.linalg.svdvals(alpha / 3 * p["B"] @ p["A"])[:3], S[:3]) < 1e-5
    assert gap(p["A"] @ p["A"].T, torch.diag(S[:3] * 3 / alpha)) < 1e-5 and gap(p["B"].T @ p["B"], torch.diag(S[:3] * 3 / alpha)) < 1e-5


def test_fast_pissa_finds_the_same_and_draws_from_the_seed():
    W = weight(30, 20)
    W = W @ torch.diag(torch.logspace(0, -3, 20))
    _, exact = made("pissa", W)
    _, fast = made("pissa_niter_16", W)
    _, same = made({"name": "pissa", "niter": 16}, W)
    assert gap(exact["B"] @ exact["A"], fast["B"] @ fast["A"]) < 1e-4 and torch.equal(fast["A"], same["A"])
    U, S, Vh = fast_svd(W, 20, 1, torch.Generator().manual_seed(0))
    assert gap(U * S @ Vh, W) < 1e-5 and gap(U.T @ U, torch.eye(20)) < 1e-5


def test_milora_takes_the_last_triplets():
    W = weight(9, 12)
    model, p = made({"name": "milora", "storage": "base"}, W)
    S = torch.linalg.svdvals(W)
    assert abs(float((2 * p["B"] @ p["A"]).square().sum() - S[-3:].square().sum())) < 1e-4
    assert gap(torch.linalg.svdvals(model.layer.weight.detach())[:6], S[:6]) < 1e-5
    top = torch.linalg.svd(W).Vh[:6]
    assert gap(p["A"] @ top.T, torch.zeros(3, 6)) < 1e-5


def test_olora_is_a_gram_schmidt_process():
    W = weight()
    _, p = made("olora", W)
    columns = []
    for k in range(3):
        v = W[:, k].clone()
        for q in columns:
            v -= (q @ W[:, k]) * q
        columns.append(v / v.norm())
    Q = torch.stack(columns, 1)
    assert gap(p["B"], Q) < 1e-5 and gap(p["A"], Q.T @ W) < 1e-5
    assert gap(p["A"][:, :3].tril(-1), torch.zeros(3, 3)) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_the_start_is_pefts(init):
    W = weight(16, 12) @ torch.diag(torch.logspace(0, -3, 12))
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 16)), peft.LoraConfig(r=1, target_modules=["0"])).unload()
    theirs[0].weight.data.copy_(W)
    mine = nn.Sequential(nn.Linear(12, 16))
    mine.load_state_dict(theirs.state_dict())
    config = {"r": 3, "lora_alpha": 9, "target_modules": ["0"], "init_lora_weights": init}
    theirs, adapted = peft.get_peft_model(theirs, peft.LoraConfig(**config)), ours.get_peft_model(mine, ours.LoraConfig(**config))
    layer, slot = theirs.base_model.model[0], host.slots(adapted.get_base_model())["0"]
    p = slot.parameters("default")
    theirs_ba = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert gap(p["B"] @ p["A"], theirs_ba) <= (1e-4 if "niter" in init else 1e-5)
    assert gap(W - 3 * p["B"] @ p["A"], layer.base_layer.weight) <= (3e-4 if "niter" in init else 1e-5), "the residual"
    x = torch.randn(5, 12)
    assert gap(adapted(x), theirs(x)) < 1e-5


# CorDA


def test_corda_is_the_papers_formula():
    W, data = weight(), [xy(seed=s) for s in range(3)]
    C = torch.zeros(9, 9, dtype=torch.float64)
    for b in data:
        X = b["x"].double() / b["x"].double().abs().max()
        for row in X:
            C += torch.outer(row, row) / 3
    C += 0.01 * C.diagonal().mean() * torch.eye(9)
    U, S, Vh = torch.linalg.svd(W.double() @ C, full_matrices=False)
    V = Vh @ torch.linalg.inv(C)
    assert gap(U * S @ V, W) < 1e-9, "B9.4: the oriented decomposition is the weight's"
    for mode, at in (("ipm", slice(0, 3)), ("kpm", slice(6, 9))):
        _, p = made({"name": "corda", "mode": mode}, W, data=data)
        assert gap(2 * p["B"] @ p["A"], (U[:, at] * S[at]) @ V[at]) < 1e-4


@pytest.mark.parametrize(("mode", "plain"), [("ipm", "pissa"), ("kpm", "milora")])
def test_corda_on_white_inputs_is_pissa_or_milora(mode, plain):
    W, data = weight(), [{"x": torch.eye(9)}]
    _, a = made({"name": "corda", "mode": mode}, W, data=data)
    _, b = made(plain, W)
    assert gap(a["B"] @ a["A"], b["B"] @ b["A"]) < 1e-4


def test_the_oriented_triplets_are_pefts(monkeypatch):
    """One row of batch at a time, largest entry positive: where PEFT's normalisation means the same."""
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT asks it for `dataclass` only, and does not install it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    W, data = weight(), [{"x": xy(seed=s)["x"].clamp_min(-1.5)} for s in range(3)]
    _, mine = made({"name": "corda"}, W, data=data)
    model = nn.Sequential(nn.Linear(9, 12, bias=False))
    model[0].weight.data.copy_(W)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(model, config, run_model=lambda: [model(b["x"][None]) for b in data])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    assert gap(mine["B"] @ mine["A"], layer.lora_B["default"].weight @ layer.lora_A["default"].weight) < 1e-4


# LoRA-GA


@pytest.mark.parametrize("niter", [0, 4])
def test_lora_ga_makes_the_first_step_the_best_one(niter):
    W, data = weight(), [xy(seed=s) for s in range(2)]
    G = sum(2 * (b["x"] @ W.T - b["y"]).T @ b["x"] for b in data) / 2
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    model, p = made({"name": "lora-ga", "scale": "unit", "niter": niter}, W, data=data)
    A, B = p["A"], p["B"]
    assert gap(B @ B.T @ G + G @ A.T @ A, (U[:, :6] * S[:6]) @ Vh[:6]) < 1e-4 * float(S[0]), "B9.3"
    _, q = made({"name": "lora-ga", "niter": niter}, W, data=data)
    assert gap(q["A"], 12**0.25 / 4 * A) < 1e-6 and gap(q["B"], 12**0.25 / 4 * B) < 1e-6
    _, q = made({"name": "lora-ga", "scale": "gd", "niter": niter}, W, data=data)
    assert gap(q["A"], A / 2) < 1e-6
    before, rate = (2 * p["B"] @ p["A"]).clone(), 1e-5  # one real step of gradient descent, short
    loss = sum(model(**b).loss for b in data) / 2
    loss.backward()
    slot = host.slots(model)["layer"].parameters("default")
    after = 2 * (slot["B"] - rate * slot["B"].grad) @ (slot["A"] - rate * slot["A"].grad)
    want = -rate * 4 * (U[:, :6] * S[:6]) @ Vh[:6]
    assert gap(after.detach() - before, want) < 0.02 * float(want.abs().max())


@pytest.mark.parametrize(("direction", "a", "b"), [("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [0, 2], [1, 3])])
def test_directions_of_lora_ga(direction, a, b):
    W, data = weight(), [xy()]
    G = 2 * (data[0]["x"] @ W.T - data[0]["y"]).T @ data[0]["x"]
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    _, p = made({"name": "lora-ga", "scale": "unit", "niter": 0, "direction": direction}, W, r=2, data=data)
    assert gap((p["A"] @ Vh[a].T).abs(), torch.eye(2)) < 1e-4 and gap((p["B"].T @ U[:, b]).abs(), torch.eye(2)) < 1e-4


def test_random_directions_are_disjoint():
    W, data = weight(), [xy()]
    G = 2 * (data[0]["x"] @ W.T - data[0]["y"]).T @ data[0]["x"]
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    _, p = made({"name": "lora-ga", "scale": "unit", "niter": 0, "direction": "random"}, W, data=data)
    a, b = ((p["A"] @ Vh.T).abs().argmax(1)).tolist(), ((p["B"].T @ U).abs().argmax(1)).tolist()
    assert sorted(a + b) == list(range(6))


# EVA


def test_incremental_components_are_those_of_all_rows():
    X = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -2, 8)) + 3
    c = Components(8)
    for piece in X.split([20, 31, 39]):
        c.take(piece)
    S, V, shares = c.done()
    _, want, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert gap(S, want) < 1e-3 and gap((V @ Vh.T).abs(), torch.eye(8)) < 1e-2 and gap(shares, want.square() / want.square().sum()) < 1e-5
    few = Components(3)
    for piece in X.split(30):
        few.take(piece)
    assert gap((few.done()[1] @ Vh[:3].T).abs(), torch.eye(3)) < 0.05


def test_eva_spans_the_inputs_and_keeps_the_budget():
    model = lorakit.adapt(tiny.llama(), "lora", r=2, alpha=4, init={"name": "eva", "rho": 3.0}, data=batches())
    slots = host.slots(model)
    ranks = {path: s.methods["default"].core.r for path, s in slots.items()}
    every = len([m for n, m in tiny.llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"])
    assert sum(ranks.values()) == 2 * every and len(set(ranks.values())) > 1 and max(ranks.values()) <= 6
    for s in slots.values():
        p = s.parameters("default")
        assert gap(p["A"] @ p["A"].T, torch.eye(len(p["A"]))) < 1e-4 and not p["B"].any() and s.methods["default"].core.s == 2.0
    same = lorakit.adapt(tiny.llama(), "lora", r=2, init={"name": "eva", "rho": 1}, data=batches())
    assert {s.methods["default"].core.r for s in host.slots(same).values()} == {2} and len(host.slots(same)) == every


def test_eva_finds_a_low_rank_input_and_ignores_padding():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 2, generator=g)).Q.T
    _, p = made({"name": "eva", "rho": 1}, weight(), r=2, data=[{"x": torch.randn(50, 2, generator=g) @ basis}])
    assert gap(p["A"].T @ p["A"], basis.T @ basis) < 1e-4
    ids = torch.randint(3, tiny.VOCAB, (2, 9), generator=g)
    longer, mask = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1), torch.tensor([[1] * 9 + [0] * 3] * 2)
    A = [host.slots(lorakit.adapt(tiny.llama(), "lora", r=2, init={"name": "eva", "rho": 1}, data=[b]))["model.layers.0.mlp.up_proj"].parameters("default")["A"]
         for b in ({"input_ids": ids}, {"input_ids": longer, "attention_mask": mask})]
    assert gap(*A) < 1e-3


# Refusals


@pytest.mark.parametrize(("init", "why"), [
    ({"name": "corda", "mod": "kpm"}, "init has no option `mod`; did you mean `mode`"),
    ({"name": "corda", "mode": "kmp"}, "init corda: unknown mode `kmp`; did you mean `kpm`"),
    ({"name": "pissa", "niter": -1}, "niter must be a whole number of at least 0"),
    ({"name": "lora-ga", "gamma": 0}, "gamma must be a number above 0"),
    ({"name": "eva", "whiten": 1}, "whiten must be true or false"),
    ({"name": "pissa", "batches": 3}, "init has no option `batches`"),
    ({"name": "eva", "batches": 0}, "batches must be a whole number of at least 1"),
    ("pisa", "unknown start `pisa`; did you mean `pissa`")])
def test_options_are_checked(init, why):
    with pytest.raises(LorakitError, match=why):
        compose("lora", init=init)


@pytest.mark.parametrize(("options", "why"), [
    ({"init": "corda"}, "init corda looks at data; mend"),
    ({"init": "corda", "data": []}, "the data holds no batch"),
    ({"init": "pissa", "data": [{}]}, "init pissa looks at no data"),
    ({"init": "eva", "data": [torch.ones(3)]}, "batches are dictionaries"),
    ({"init": "lora-ga", "data": [{"input_ids": tiny.ids()}]}, "gives no loss.*mend: put `labels`"),
    ({"init": "corda", "target_modules": ["embed_tokens"], "data": batches()}, "embed_tokens: init corda looks at the inputs of layers"),
    ({"init": "pissa", "r": 17}, "r must be at most")])
def test_what_cannot_be_is_refused_and_the_model_left_alone(options, why):
    model = tiny.llama()
    with pytest.raises(LorakitError, match=why):
        lorakit.adapt(model, "lora", **options)
    assert not any(isinstance(m, host.Host) or m._forward_pre_hooks for m in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_peft_folder_that_needs_its_changed_base_is_refused(init, tmp_path):
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(LorakitError, match=f"`{init}`, which changed the base's weights.*mend: save it from PEFT with path_initial"):
        lorakit.load(tiny.llama(), tmp_path / "a")


@pytest.mark.parametrize("init", WEIGHT_ONLY[:2] + ["olora"])
def test_compat_saves_what_the_untouched_base_can_carry(init, tmp_path):
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM"))
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.3)
    y = tiny.logits(model)
    model.save_pretrained(tmp_path / "a")
    assert gap(tiny.logits(ours.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")), y) < 1e-5
    assert gap(tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")), y) < 1e-5, "PEFT itself reads it"


def test_inspect_says_what_became_of_the_start(tmp_path, call):
    for name in ("pissa", "lora"):
        lorakit.save(lorakit.adapt(tiny.llama(), name, r=2, target_modules=["q_proj"]), tmp_path / name)
    assert "start: pissa; written as a plain LoRA of the whole update, of rank 2r" in " ".join(call("inspect", tmp_path / "pissa")[1].split())
    assert "start:" not in call("inspect", tmp_path / "lora")[1]
