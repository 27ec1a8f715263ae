"""Starts made with the quantisation, QA-LoRA's exact merge, merge routes, bits by budget, and a run from YAML."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.inits import INITS
from lorakit.merges.routes import ROUTES
from lorakit.models import load_base
from lorakit.quantized import dequantize, forget, packed, quantize
from lorakit.quantized.bits import allot, fisher
from lorakit.sites import site_at
from lorakit.stores.scheme import scheme_of

N = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    at = tmp_path_factory.mktemp("tiny")
    tiny.llama().save_pretrained(at)
    return at


def model(scheme=None, keep=True, layer=None) -> nn.Module:
    torch.manual_seed(1)
    m = nn.Sequential(layer or nn.Linear(N, N))
    nn.init.normal_(m[0].weight, std=0.02)
    return m if scheme is None else quantize(m, scheme, target_modules="0", keep=keep)


def shown(m: nn.Module, name="default") -> torch.Tensor:
    """The matrix in effect with the adapter."""
    return host.slots(m)["0"].map({name: 1.0}).weight().detach()


def gap(A: torch.Tensor, B: torch.Tensor) -> float:
    return float((A - B).norm())


def packed_and_read(W: torch.Tensor, scheme="nf4") -> torch.Tensor:
    s = scheme_of(scheme)
    return s.matrix(s.parts(W), *W.shape, torch.float32)


def best(M: torch.Tensor, r: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(M.double(), full_matrices=False)
    return ((U[:, :r] * S[:r]) @ V[:r]).float()


# Starts


def loftq_slow(W, r, steps):
    L = torch.zeros_like(W)
    for _ in range(steps):
        Q = packed_and_read(W - L)
        L = best(W - Q, r)
    return Q, L


def lq_slow(W, r):
    Q, kept = torch.zeros_like(W), None
    for _ in range(20):
        L = best(W - Q, r)
        Q = packed_and_read(W - L)
        error = gap(W - Q, L)
        if kept is not None and error >= kept[0]:
            return kept[1:]
        kept = error, Q, L
    return kept[1:]


@pytest.mark.parametrize("alpha", [8.0, 32.0])
def test_loftq_is_its_literal_loop_for_every_alpha(alpha):
    W = model()[0].weight.detach()
    m = lorakit.adapt(model("nf4"), "lora", r=8, lora_alpha=alpha, target_modules="0", init={"name": "loftq", "steps": 3})
    Q, L = loftq_slow(W, 8, 3)
    assert gap(host.slots(m)["0"].map({}).weight(), Q) < 1e-5
    assert gap(shown(m), Q + L) < 1e-4
    assert gap(shown(m), W) < gap(packed_and_read(W), W), "it must be nearer than the quantised weight alone"


def test_more_rounds_of_loftq_come_nearer():
    W = model()[0].weight.detach()
    errors = [gap(shown(lorakit.adapt(model("nf4"), "lora", r=8, target_modules="0", init={"name": "loftq", "steps": n})), W) for n in (1, 5)]
    assert errors[1] < errors[0]


def test_lq_lora_factors_first_and_keeps_the_last_that_got_better():
    W = model()[0].weight.detach()
    m = lorakit.adapt(model("nf4"), "lora", r=8, lora_alpha=4, target_modules="0", init="lq-lora")
    Q, L = lq_slow(W, 8)
    assert gap(shown(m), Q + L) < 1e-4


def fisher_start(scheme, data, **options):
    m = Told(model(scheme))
    lorakit.adapt(m, "lora", r=8, lora_alpha=4, target_modules="body.0", init={"name": "lq-lora-fisher", **options}, data=data)
    return m, host.slots(m)["body.0"].map({"default": 1.0}).weight().detach()


class Told(nn.Module):
    """A model that gives a loss."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, labels):
        return SimpleNamespace(loss=(self.body(x) * labels).sum())


def test_fisher_weights_are_the_squared_gradients_of_single_rows():
    x, g = torch.randn(6, 3, N), torch.randn(6, 3, N)
    F = sum((b.T @ a).square() for a, b in zip(x, g, strict=True))  # the loss is <g, W x + b>
    m = Told(model("nf3"))
    site = site_at(dict(m.named_modules()), "body.0")
    [(c, d)] = INITS["lq-lora-fisher"].collect(m, {"body.0": (None, site)}, [{"x": x[:4], "labels": g[:4]}, {"x": x[4:], "labels": g[4:]}], {}).values()
    assert torch.allclose(c, F.mean(1).sqrt(), rtol=1e-4) and torch.allclose(d, F.mean(0).sqrt(), rtol=1e-4)
    assert not m.body[0]._forward_hooks and not m.body[0].weight.requires_grad


def test_lq_lora_weighted_by_fisher_is_nearer_where_the_loss_feels_it():
    torch.manual_seed(6)
    W, rows, columns = model()[0].weight.detach(), torch.logspace(-1, 1, N)[torch.randperm(N)], torch.logspace(-1, 1, N)[torch.randperm(N)]
    data = [{"x": torch.randn(64, 1, N) * columns, "labels": torch.randn(64, 1, N) * rows}]
    m, V = fisher_start("nf3", data)
    plain = shown(lorakit.adapt(model("nf3"), "lora", r=8, lora_alpha=4, target_modules="0", init="lq-lora"))
    weigh = rows[:, None] * columns
    assert gap(V * weigh, W * weigh) < 0.8 * gap(plain * weigh, W * weigh) and gap(V, W) > gap(plain, W)
    p, Q = host.slots(m)["body.0"].params("default"), host.slots(m)["body.0"].map({}).weight()
    assert gap(Q, packed_and_read(W - 0.5 * (p["B"] @ p["A"]).detach(), "nf3")) < 1e-5


def test_equal_fisher_weights_are_plain_lq_lora():
    data = [{"x": torch.eye(N)[:, None], "labels": torch.ones(N, 1, N)}]  # each row touches one input, and all outputs alike
    _, V = fisher_start("nf3", data)
    plain = shown(lorakit.adapt(model("nf3"), "lora", r=8, lora_alpha=4, target_modules="0", init="lq-lora"))
    assert gap(V, plain) < 1e-4


def test_fisher_weights_say_what_they_lack():
    for data, why in (([], "holds no row"), ([{"x": torch.zeros(1, 1, N), "labels": torch.ones(1, 1, N)}], "no gradient there")):
        m = Told(model("nf3"))
        with pytest.raises(LorakitError, match=why):
            lorakit.adapt(m, "lora", r=2, target_modules="body.0", init="lq-lora-fisher", data=data)
        assert host.find_state(m) is None
    with pytest.raises(LorakitError, match="gives no loss"):
        lorakit.adapt(Fed(model("nf3")), "lora", r=2, target_modules="body.0", init="lq-lora-fisher", data=[{"x": torch.randn(2, N)}])


def test_lqer_gives_back_the_largest_part_of_the_error_and_leaves_the_base():
    W, m = model()[0].weight.detach(), model("nf4")
    Q = m[0].weight.clone()
    lorakit.adapt(m, "lora", r=8, target_modules="0", init="lqer")
    assert torch.equal(host.slots(m)["0"].map({}).weight(), Q)
    assert gap(shown(m) - Q, best(W - Q, 8)) < 1e-5
    whole = lorakit.adapt(model("nf4"), "lora", r=N, target_modules="0", init="lqer")
    assert gap(shown(whole), W) < 1e-4, "at full rank nothing is lost"


class Fed(nn.Module):
    """A model that takes batches by name."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def test_l2qer_is_lqer_where_all_inputs_are_of_one_size_and_else_serves_the_large_ones():
    def fed(scale):
        torch.manual_seed(5)
        x = torch.randn(4, 20, N).sign() * scale
        m = Fed(model("nf4"))
        lorakit.adapt(m, "lora", r=8, target_modules="body.0", init="l2qer", data=[{"x": x}])
        return host.slots(m)["body.0"].map({"default": 1.0}).weight().detach()

    W = model()[0].weight.detach()
    plain = shown(lorakit.adapt(model("nf4"), "lora", r=8, target_modules="0", init="lqer"))
    assert gap(fed(torch.ones(N)), plain) < 1e-5
    scale = torch.logspace(-1.5, 1.5, N)
    weighted = (fed(scale) - W) * scale
    assert weighted.norm() < ((plain - W) * scale).norm()


def test_pissa_into_a_quantised_base_quantises_what_is_left_of_the_original():
    W = model()[0].weight.detach()
    m = lorakit.adapt(model("nf4"), "lora", r=8, target_modules="0", init={"name": "pissa", "storage": "base"})
    assert gap(host.slots(m)["0"].map({}).weight(), packed_and_read(W - best(W, 8))) < 1e-4
    assert gap(shown(m), W) < gap(packed_and_read(W), W)


@pytest.mark.parametrize("init", ["loftq", "lq-lora", "lqer", {"name": "pissa", "storage": "base"}])
def test_taking_the_adapter_off_gives_back_the_very_base(init):
    m = model("nf3")
    was = dict(m[0].named_buffers())
    y = m(torch.ones(1, N))
    lorakit.detach(lorakit.adapt(m, "dora", r=4, target_modules="0", init=init))
    now = dict(m[0].named_buffers())
    assert all(now[k] is t for k, t in was.items()) and torch.equal(m(torch.ones(1, N)), y)


@pytest.mark.parametrize("name", [n for n, i in INITS.items() if i.joint or i.mends])
def test_a_start_for_quantised_bases_says_so_elsewhere(name):
    data = {"data": [{"x": torch.randn(2, N)}]} if INITS[name].collect else {}
    for m, why in ((Fed(model()), "for a quantised base"), (Fed(model("nf4", keep=False)), "not known"), (forget(Fed(model("nf4"))), "not known")):
        with pytest.raises(LorakitError, match=why):
            lorakit.adapt(m, "lora", r=2, target_modules="body.0", init=name, **data)
        assert host.find_state(m) is None


def test_a_model_loaded_quantised_reads_its_originals_from_disk(folder):
    q, whole = load_base(folder, quantize="nf4"), load_base(folder)
    lorakit.adapt(q, "lora", r=4, init="loftq")
    path = next(iter(host.slots(q)))
    W = whole.get_submodule(path).weight.detach()
    E = host.slots(q)[path].map({"default": 1.0}).weight()
    assert gap(E, W) < gap(packed_and_read(W), W)


def test_a_loftq_base_is_saved_and_the_adapter_belongs_to_it(folder, tmp_path):
    q = load_base(folder, quantize="nf4")
    lorakit.adapt(q, "lora", r=4, init="loftq")
    ids = torch.arange(12)[None]
    want = q(ids).logits
    with pytest.warns(UserWarning, match="fits no other; mend: lorakit.save_base"):
        lorakit.save(q, tmp_path / "alone")
    lorakit.save_base(q, tmp_path / "base")
    lorakit.save(q, tmp_path / "a")
    assert lorakit.verify(tmp_path / "a").ok, "the adapter names its base"
    again = lorakit.load(load_base(tmp_path / "base"), tmp_path / "a")
    assert torch.equal(again(ids).logits, want)
    with pytest.raises(LorakitError, match="another base"):
        lorakit.load(load_base(folder, quantize="nf4"), tmp_path / "a")


# Merging


def trained(scheme, method="lora", size=0.01, **options) -> nn.Module:
    m = lorakit.adapt(model(scheme), method, r=8, target_modules="0", **options)
    torch.manual_seed(2)
    for p in m.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=size)
    return m


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_qa_lora_goes_into_zero_points_exactly(pooling):
    m = trained({"name": "int4", "group": 16}, "qa-lora", 0.05, group=32, pooling=pooling)
    x = torch.randn(7, N)
    y, codes, scale = m(x), m[0].weight_codes, m[0].weight_scale.clone()
    new = lorakit.merged(m, "exact")
    assert type(new[0]).__name__ == "PackedLinear" and (new(x) - y).abs().max() < 1e-5 and (y - lorakit.detach(m)(x)).abs().max() > 0.01
    assert torch.equal(new[0].weight_codes, codes) and torch.equal(new[0].weight_scale, scale)


def test_qa_lora_pools_its_input():
    m = trained("nf4", "qa-lora", 0.1, group=32, lora_alpha=24)
    x, p = torch.randn(3, N), host.slots(m)["0"].params("default")
    want = (24 / 8) * x.view(3, 3, 32).mean(2) @ p["A"].mT @ p["B"].mT
    lone = m(x) - host.slots(m)["0"].map({})(x) - m[0].bias
    assert torch.allclose(lone, want, atol=1e-5)


@pytest.mark.parametrize(("scheme", "method", "why"), [("nf4", "lora", "no zero points"), ("int8", "qa-lora", "no zero points"),
                                                       ({"name": "int4", "group": 32}, "lora", "not constant over the base's groups of 32")])
def test_an_update_that_zero_points_cannot_hold_is_refused(scheme, method, why):
    m = trained(scheme, method)
    y = m(torch.ones(1, N))
    with pytest.raises(LorakitError, match=why):
        lorakit.merge(m, "exact")
    assert torch.equal(m(torch.ones(1, N)), y)


def test_requantising_is_refused_where_rounding_eats_the_update():
    m = trained("nf4", size=0.005)
    y, was = m(torch.ones(1, N)), m[0].weight_codes
    with pytest.raises(LorakitError, match=r"would keep .*% of the update.*dequantized"):
        lorakit.merge(m, "requantize")
    assert m[0].weight_codes is was and torch.equal(m(torch.ones(1, N)), y)
    told = ROUTES["requantize"](m, force=True)["0"]
    lorakit.unmerge(m)
    W, V = packed_and_read(model()[0].weight.detach()), shown(m)
    got = packed_and_read(V)
    assert told.share == pytest.approx(float(((got - W) * (V - W)).sum() / (V - W).square().sum()), abs=1e-3) and told.share < 0.5
    assert torch.equal(m(torch.ones(1, N)), y)


def test_requantising_keeps_a_large_update():
    m = trained("int8", size=0.05)
    y = m(torch.eye(N))
    new = lorakit.merged(m, "requantize")
    assert type(new[0]).__name__ == "PackedLinear" and not host.find_state(new)
    assert (new(torch.eye(N)) - y).norm() < 0.05 * (y - lorakit.detach(m)(torch.eye(N))).norm()


@pytest.mark.parametrize(("scheme", "size"), [("nf4", 0.005), ("int8", 0.05)])
def test_what_rounding_drops_stays_as_a_small_lora(scheme, size):
    m = trained(scheme, size=size)
    x = torch.eye(N)
    y, base = m(x), copy.deepcopy(m)
    moved = (y - lorakit.detach(base)(x)).norm()
    told = ROUTES["residual"](m, error=0.05)["0"]
    assert (m(x) - y).norm() < 0.06 * moved and told.rank <= 8 and told.changed == (scheme == "int8")
    assert list(host.find_state(m).specs) == ["residual"] if told.rank else host.find_state(m) is None


def test_a_thawed_merge_is_what_was_trained_and_comes_back():
    m = trained("nf2")
    y, cls = m(torch.eye(N)), type(m[0])
    lorakit.merge(m)
    assert isinstance(m[0], nn.Linear) and "weight" in m[0]._parameters and torch.allclose(m(torch.eye(N)), y, atol=1e-5)
    lorakit.unmerge(m)
    assert type(m[0]) is cls and torch.equal(m(torch.eye(N)), y)


def test_an_unknown_route_names_the_nearest():
    with pytest.raises(LorakitError, match="did you mean `requantize`"):
        lorakit.merge(trained("nf4"), "requantise")


# Bits by budget


def mixed(scale=(1.0, 30.0, 1.0)) -> nn.Module:
    torch.manual_seed(3)
    m = nn.Sequential(*(nn.Linear(N, N) for _ in scale))
    for layer, s in zip(m, scale, strict=True):
        nn.init.normal_(layer.weight, std=0.02 * s)
    return m


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.2, 7.0])
def test_the_choice_is_the_best_within_the_budget(bits):
    from itertools import product

    names = ("nf2", "nf3", "nf4", "int8")
    m = mixed()
    groups = allot(m, bits, names, target_modules=["0", "1", "2"])
    chosen = {p: scheme_of(g["scheme"]).name for g in groups for p in g["layers"]}
    cost = {(k, n): float((layer.weight.detach() - packed_and_read(layer.weight.detach(), n)).square().sum()) for k, layer in enumerate(m) for n in names}
    size = {n: 8 * scheme_of(n).bytes(N, N) / (N * N) for n in names}
    ways = [c for c in product(names, repeat=3) if sum(size[n] for n in c) / 3 <= bits]
    want = min(ways, key=lambda c: sum(cost[k, n] for k, n in enumerate(c)))
    assert tuple(chosen[str(k)] for k in range(3)) == want
    quantize(m, groups)
    assert {p: layer.scheme.name for p, layer in packed(m).items()} == chosen


def test_importance_moves_bits_and_a_budget_too_small_says_what_the_smallest_takes():
    m = mixed((1.0, 1.0, 1.0))
    at = {str(k): torch.full((N, N), 100.0 if k == 2 else 1.0) for k in range(3)}
    chosen = {p: scheme_of(g["scheme"]).bits for g in allot(m, 3.2, target_modules=["0", "1", "2"], importance=at) for p in g["layers"]}
    assert chosen["2"] == max(chosen.values()) > min(chosen.values())
    with pytest.raises(LorakitError, match=r"at most 1.5 bits a weight; the smallest takes 2\.1"):
        allot(m, 1.5, target_modules=["0"])


def test_fisher_is_the_sum_of_squared_gradients_of_single_rows(folder):
    m = load_base(folder)
    path = "model.layers.0.self_attn.q_proj"
    ids = torch.arange(24).view(3, 8)
    F = fisher(m, [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}], [path])[path]
    want = torch.zeros_like(F)
    for row in ids:
        m.zero_grad()
        m(input_ids=row[None], labels=row[None]).loss.backward()
        want += m.get_submodule(path).weight.grad.square()
    assert torch.allclose(F, want, rtol=1e-4, atol=1e-12)


# Runs and plans


def test_a_run_from_yaml_trains_on_a_quantised_base(tmp_path):
    from lorakit.training import run as r
    from lorakit.training.config import parse

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"def f{k}(x):\n    return x + {k}\n" * 4}) for k in range(24)), encoding="utf-8")
    settings = {"base": {"path": "embedded", "quantize": {"name": "nf4", "block": 32}}, "adapter": {"method": "dora", "r": 4},
                "data": {"train": str(rows), "max_length": 48}, "train": {"max_steps": 6, "learning_rate": 5e-3, "batch_size": 4},
                "eval": {"samples": 0}, "output": str(tmp_path / "run")}
    done = r.train(parse(settings))
    told = json.loads((tmp_path / "run" / "adapter" / "receipt.json").read_text())
    assert told["base"]["packed"][0]["scheme"] == {"kind": "normal_float", "bits": 4, "block": 32, "double_quant": True}
    assert lorakit.verify(tmp_path / "run" / "adapter").ok and done is not None
    merged = lorakit.verify(tmp_path / "run" / "adapter")
    assert any(p.name == "probe" and p.ok for p in merged.points)


def test_an_unknown_scheme_in_yaml_names_the_nearest():
    from lorakit.training.config import parse

    with pytest.raises(LorakitError, match="did you mean `nf4`"):
        parse({"base": {"quantize": "nf5"}, "data": {"train": "x"}})


def test_trainable_counts_what_is_packed():
    assert lorakit.trainable(lorakit.adapt(model("nf4"), "lora", r=2, target_modules="0")) == (4 * N, N * N + N + 4 * N)


def test_dequantising_gives_ordinary_layers_of_the_same_function():
    m = model("nf4")
    y = m(torch.eye(N))
    m = dequantize(m)
    assert type(m[0]) is nn.Linear and torch.allclose(m(torch.eye(N)), y, atol=1e-6) and math.prod(m[0].weight.shape) == N * N


# On the packed base itself


def test_methods_that_read_the_weight_get_the_right_gradient():
    for method in ("dora", "oft", "fourierft", "lokr"):
        grads = []
        for k in (model("nf4"), dequantize(model("nf4"))):
            lorakit.adapt(k, method, target_modules="0")
            torch.manual_seed(1)
            for p in k.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.1)
            x = torch.randn(4, N, generator=torch.Generator().manual_seed(2))
            grads.append(torch.autograd.grad(k(x).square().sum(), [p for p in k.parameters() if p.requires_grad]))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True)), method


def test_the_product_can_be_differentiated_twice():
    m = model("nf4").double()
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: m(x) ** 2, (x[:1],))


def test_an_adapter_on_another_base_says_what_is_quantised(folder, tmp_path):
    q = lorakit.adapt(load_base(folder, quantize="nf4"), "lora", r=2)
    lorakit.save(q, tmp_path / "a")
    assert lorakit.verify(tmp_path / "a").points[1].ok, "verify packs the base as the receipt says"
    with pytest.raises(LorakitError, match="quantised when saved, not here"):
        lorakit.load(load_base(folder), tmp_path / "a")
    with pytest.raises(LorakitError, match="values differ"):
        lorakit.load(load_base(folder, quantize={"name": "nf4", "double_quant": True, "block": 32}), tmp_path / "a", check_base=True)


# The verbs


def test_a_start_that_makes_the_base_anew_leaves_it_beside_the_adapter(tmp_path):
    from lorakit.training import run as r
    from lorakit.training.config import parse

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"x = {k}\n" * 6}) for k in range(16)), encoding="utf-8")
    r.train(parse({"base": {"path": "embedded", "quantize": "nf3"}, "adapter": {"method": "loftq", "r": 2, "init": {"name": "loftq", "niter": 1, "steps": 2}},
                   "data": {"train": str(rows), "max_length": 24}, "train": {"max_steps": 2, "batch_size": 4}, "eval": {"samples": 0},
                   "output": str(tmp_path / "run")}))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["verify"]["ok"]
    assert (tmp_path / "run" / "base" / "tokenizer_config.json").is_file()
    told = lorakit.verify(tmp_path / "run" / "adapter")
    assert told.ok and json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("run/base")
    assert not lorakit.verify(tmp_path / "run" / "adapter", load_base("embedded", quantize="nf3")).ok, "another packing of the same model is another base"


def test_quantize_writes_a_base_that_other_verbs_take(folder, tmp_path, call):
    code, out, err = call("quantize", folder, "-o", tmp_path / "q", "--scheme", "int4", "--set", "group=8")
    assert code == 0, err
    assert "int4: " in out and "bits a weight" in out and "of the logits" in out
    assert {m.scheme for m in packed(load_base(tmp_path / "q")).values()} == {scheme_of({"name": "int4", "group": 8})}
    code, out, err = call("quantize", folder, "-o", tmp_path / "b", "--bits", "3.4")
    assert code == 0, err
    size = [(8 * m.scheme.bytes(*m.shape), math.prod(m.shape)) for m in packed(load_base(tmp_path / "b")).values()]
    assert sum(a for a, _ in size) / sum(b for _, b in size) <= 3.4
    for words, why in ((["--scheme", "nf5"], "did you mean `nf4`"), (["--set", "group"], "KEY=VALUE"),
                       (["--bits", "3", "--set", "block=32"], "leave --set out"), (["--bits", "0.5"], "the smallest takes")):
        code, _, err = call("quantize", folder, "-o", tmp_path / "no", *words)
        assert code == 1 and why in err and not (tmp_path / "no").exists(), err


def test_merge_says_what_a_packed_base_keeps(folder, tmp_path, call):
    for name, method in (("qa", "qa-lora"), ("plain", "lora")):
        q = lorakit.adapt(load_base(folder, quantize={"name": "int4", "group": 8}), method, r=2, **({"group": 8} if name == "qa" else {}))
        torch.manual_seed(3)
        for p in q.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.01)
        lorakit.save(q, tmp_path / name)
    code, out, err = call("merge", tmp_path / "qa", "-o", tmp_path / "exact", "--route", "exact")
    assert code == 0, err
    assert "PASS  merged into a quantised base" in out and "PASS  merged logits" in out and packed(load_base(tmp_path / "exact"))
    code, out, err = call("merge", tmp_path / "plain", "-o", tmp_path / "thawed")
    assert code == 0 and "PASS  merged weights" in out and not packed(load_base(tmp_path / "thawed")), err
    for route, why in (("requantize", "of the update, less than 90%"), ("exact", "not constant over the base's groups"),
                       ("residual", "leaves an adapter beside")):
        code, _, err = call("merge", tmp_path / "plain", "-o", tmp_path / "no", "--route", route)
        assert code == 1 and why in err and not (tmp_path / "no").exists(), err
    code, out, err = call("merge", tmp_path / "plain", "-o", tmp_path / "forced", "--route", "requantize", "--force")
    assert code == 0 and "FAIL  merged into a quantised base" in out and packed(load_base(tmp_path / "forced")), err


def test_merge_streamed_from_the_command_line(folder, tmp_path, call):
    lorakit.save(lorakit.adapt(load_base(folder), "lora-nonzero", r=2), tmp_path / "a")
    code, out, err = call("merge", tmp_path / "a", "-o", tmp_path / "m", "--streamed")
    assert code == 0 and "weights changed" in out, err
    assert lorakit.verify(tmp_path / "a", folder, merged=tmp_path / "m").points[-1].ok


def test_a_comparison_varies_how_the_base_is_kept_and_refuses_what_cannot_train(tmp_path):
    from lorakit.experiments import plain
    from lorakit.experiments.config import parse
    from lorakit.training.config import parse as parse_run
    from lorakit.training.prepare import prepare

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"x = {k}\n" * 6}) for k in range(16)), encoding="utf-8")
    c = parse({"base": "embedded", "data": {"train": str(rows)}, "seeds": 1, "output": str(tmp_path / "c"),
               "cells": [{"name": "a", "adapter": "lora"}, {"name": "b", "adapter": "lora", "quantize": "nf4"},
                         {"name": "c", "adapter": "none", "quantize": "nf2"}]})
    assert {t.cell: t.run.base.quantize for t in c.trials} == {"a": None, "b": "nf4", "c": "nf2"}
    with pytest.raises(LorakitError, match=r"keeps them quantised; mend: leave base\.quantize out"):
        plain.build("full", None, prepare(parse_run({"base": {"quantize": "nf4"}, "data": {"train": str(rows)}})))
