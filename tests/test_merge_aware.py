"""Merge-aware training: the forward pass is the requantised merge, the gradient passes straight through, and what is learnt survives rounding."""

import json

import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.maps import Applied, Base
from lorakit.merges.routes import ROUTES
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import Full
from lorakit.methods.hydralora import HydraLoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.magnitude import Magnitude
from lorakit.methods.merge_aware import MergeAware
from lorakit.models import load_base
from lorakit.planning.memory import counting_saved
from lorakit.quantized import packed, quantize
from lorakit.stores.scheme import scheme_of

N, M = 96, 64
SCHEMES = ("nf4", {"name": "nf4", "double_quant": False}, "nf3", "nf2", {"name": "int8"}, {"name": "int5", "group": 32}, {"name": "int4", "group": 32},
           {"name": "int3", "group": 16})
every = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: str(s if isinstance(s, str) else "-".join(map(str, s.values()))))


def layer(scheme=None) -> nn.Sequential:
    torch.manual_seed(1)
    m = nn.Sequential(nn.Linear(M, N))
    nn.init.normal_(m[0].weight, std=0.02)
    return m if scheme is None else quantize(m, scheme, target_modules="0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    tiny.llama().save_pretrained(at)
    return at


def adapted(scheme, method="lora", size=0.03, **options) -> nn.Sequential:
    m = lorakit.adapt(layer(scheme), method, r=4, target_modules="0", merge_aware=True, **options)
    torch.manual_seed(2)
    for p in m.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=size)
    return m


def rounded(W: torch.Tensor, scheme) -> torch.Tensor:
    s = scheme_of(scheme)
    return s.matrix(s.parts(W), *W.shape, torch.float32)


def codes(m: nn.Module) -> dict[str, torch.Tensor]:
    return {k: b.clone() for k, b in m.named_buffers()}


# The definition


@every
def test_the_forward_pass_is_the_rounded_sum_to_the_letter(scheme):
    m, x = adapted(scheme, lora_alpha=6), torch.randn(5, M)
    p, W = host.slots(m)["0"].params("default"), m[0].weight
    V = W + (6 / 4) * p["B"] @ p["A"]
    want = x @ rounded(V.detach(), scheme).T + m[0].bias
    assert torch.allclose(m(x), want, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(m(x), want, atol=1e-6)
    assert (rounded(V.detach(), scheme) - V).norm() > 1e-3 * V.norm(), "the rounding must be seen"


def test_the_gradient_passes_straight_through_to_the_update_and_through_the_rounded_weight_to_the_input():
    m, x, g = adapted("nf4", lora_alpha=6), torch.randn(5, M, requires_grad=True), torch.randn(5, N)
    p, W = host.slots(m)["0"].params("default"), m[0].weight
    m(x).backward(g)
    Q, G = rounded((W + 1.5 * p["B"] @ p["A"]).detach(), "nf4"), g.T @ x.detach()  # G: what the rounded weight gets, handed on as it is
    assert torch.allclose(x.grad, g @ Q, atol=1e-5)
    holders = {k: getattr(m[0], f"lora_{k}").default.grad for k in "AB"}
    assert torch.allclose(holders["B"], 1.5 * G @ p["A"].T, atol=1e-4) and torch.allclose(holders["A"], 1.5 * p["B"].T @ G, atol=1e-4)


@every
def test_an_untrained_adapter_changes_no_code(scheme):
    m, x = lorakit.adapt(layer(scheme), "lora", r=4, target_modules="0", merge_aware=True), torch.randn(5, M)
    y, constants = layer(scheme)(x), 0.0 if "nf" not in str(scheme) or "double" in str(scheme) else 2e-3
    assert (m(x) - y).norm() <= max(constants, 1e-6) * y.norm()


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "qa-lora", "oft"])
def test_around_other_methods_act_is_the_rounded_weight(method):
    m, x = adapted({"name": "int4", "group": 16}, method, 0.1, **({"group": 16} if method == "qa-lora" else {})), torch.randn(5, M)
    slot = host.slots(m)["0"]
    V = slot.methods["default"].inner.weight(slot.params("default"), m[0].weight).detach()
    assert torch.allclose(m(x), x @ rounded(V, {"name": "int4", "group": 16}).T + m[0].bias, atol=1e-5)
    assert (V - m[0].weight).norm() > 0.01 * V.norm()


def test_dropout_is_on_the_input_of_the_update_alone():
    m, x = adapted("nf4", lora_dropout=0.5).train(), torch.randn(5, M)
    slot = host.slots(m)["0"]
    torch.manual_seed(3)
    y = m(x)
    torch.manual_seed(3)
    xd, D = slot.drop("default")(x), slot.map({"default": 1.0}).weight() - m[0].weight
    assert torch.allclose(y, x @ m[0].weight.T + xd @ D.T + m[0].bias, atol=1e-5) and not torch.equal(xd, x)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_lies_below_it_in_a_chain_trains_too(dropout):
    m, x, g = adapted("nf4", lora_dropout=dropout).train(), torch.randn(5, M), torch.randn(5, N)
    lorakit.adapt(m, "lora", r=2, target_modules="0", name="below")
    slot = host.slots(m)["0"]
    with torch.no_grad():
        slot.params("below")["B"].normal_(std=0.03)
    lorakit.activate(m, "below", "default", chain=True)
    m(x).backward(g)
    below, s = slot.parameters("below"), 16 / 2
    if not dropout:
        assert torch.allclose(below["B"].grad, s * g.T @ x @ below["A"].T, rtol=1e-4, atol=1e-4)
    assert all(t.grad is not None and t.grad.any() for t in (*below.values(), *slot.parameters("default").values()))


def test_autocast_rounds_the_weight_that_is_merged():
    m, x = adapted("nf4"), torch.randn(5, M)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    W = host.slots(m)["0"].map({"default": 1.0}).weight().detach()
    assert torch.equal(y, (x.bfloat16() @ W.bfloat16().T + m[0].bias.bfloat16()).to(y.dtype)) or torch.allclose(y.float(), x @ W.T + m[0].bias, atol=5e-3)


def test_no_dense_matrix_is_kept_for_the_backward_pass():
    m, x = adapted("nf4").train(), torch.randn(2, M, requires_grad=True)
    with counting_saved(m) as saved:
        m(x).sum()
    assert saved and sum(saved.values()) < 4 * N * M, "only thin factors and activations"


# Merging


@every
def test_requantising_gives_the_trained_model_to_the_bit(scheme):
    m, x = adapted(scheme), torch.randn(7, M)
    with torch.no_grad():
        y = m(x)
    told = ROUTES["requantize"](m)["0"]
    assert told.share == pytest.approx(1, abs=1e-4) and told.error < 1e-3
    assert torch.allclose(m(x), y, atol=1e-6)
    assert torch.equal(m[0].weight_codes, scheme_codes(scheme, adapted(scheme)))
    lorakit.unmerge(m)
    with torch.no_grad():
        assert torch.equal(m(x), y)


def scheme_codes(scheme, m) -> torch.Tensor:
    slot = host.slots(m)["0"]
    V = slot.methods["default"].inner.weight(slot.params("default"), m[0].weight).detach()
    return scheme_of(scheme).parts(V)["codes"]


def test_other_routes_keep_it_too():
    for route in ("dequantized", "residual"):
        m, x = adapted("nf4"), torch.randn(7, M)
        y = m(x).detach()
        ROUTES[route](m)
        assert (m(x) - y).norm() < 0.06 * (y - layer("nf4")(x)).norm(), route


def test_what_is_learnt_stays_where_a_plain_lora_loses_it_in_rounding(folder):
    ids = torch.randint(0, 48, (8, 12), generator=torch.Generator().manual_seed(0))
    loss = {}
    for aware in (False, True):
        m = lorakit.adapt(load_base(folder, quantize="nf3"), "lora", r=4, merge_aware=aware)
        begun, steps = float(m(input_ids=ids, labels=ids).loss.detach()), 60
        opt = torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-2)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        for _ in range(steps):
            opt.zero_grad()
            m(input_ids=ids, labels=ids).loss.backward()
            opt.step()
            falling.step()
        with torch.no_grad():
            loss[aware] = begun, *(float(x(input_ids=ids, labels=ids).loss) for x in (m, lorakit.merged(m, "requantize", force=True)))
    (begun, live, rounded_), (_, aware, kept) = loss[False], loss[True]
    assert live < aware < begun, "both learn; without rounding it is easier"
    assert kept == pytest.approx(aware, abs=1e-5), "merging changes nothing"
    assert rounded_ - live > 0.3 * (begun - live) and kept < rounded_, "a plain LoRA loses much of it, more than it cost to learn with the rounding"


# Files


def noisy(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    return model


def test_save_load_verify_and_the_merged_folder(folder, tmp_path):
    q = noisy(lorakit.adapt(load_base(folder, quantize="nf4"), "lora", r=4, merge_aware=True))
    ids = torch.arange(12)[None]
    want = q(ids).logits
    lorakit.save(q, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {m["method"] for m in config["modules"].values()} == {"merge-aware"}
    again = lorakit.load(load_base(folder, quantize="nf4"), tmp_path / "a")
    assert torch.equal(again(ids).logits, want)
    lorakit.save_merged(q, tmp_path / "m", route="requantize")
    assert lorakit.verify(tmp_path / "a", folder, merged=tmp_path / "m").ok
    merged = load_base(tmp_path / "m")
    assert packed(merged) and torch.allclose(merged(ids).logits, want, atol=1e-5)
    with pytest.raises(LorakitError, match="not quantised; mend: quantize: nf4"):
        lorakit.load(load_base(folder), tmp_path / "a", check_base=False)


def test_modules_saved_whole_biases_and_two_adapters_stand_beside_it(folder):
    q = lorakit.adapt(load_base(folder, quantize="nf4"), "dora", r=2, merge_aware=True, bias="lora_only", modules_to_save=["lm_head"])
    methods = {s.methods["default"].name for s in host.slots(q).values()}
    assert methods == {"merge-aware", "full"}
    q = noisy(lorakit.adapt(load_base(folder, quantize="nf4"), "lora", r=2, merge_aware=True))
    lorakit.adapt(q, "lora", r=2, name="other")
    ids = torch.arange(6)[None]
    lorakit.activate(q, "default", "other")
    both = q(ids).logits
    lorakit.activate(q, "default")
    assert torch.allclose(q(ids).logits, both, atol=1e-6), "an untrained one beside it adds nothing"


# What is refused


def test_an_unquantised_base_is_refused_and_left_alone():
    m = layer()
    with pytest.raises(LorakitError, match=r"0: merge-aware training .* is not quantised; mend: quantize: nf4"):
        lorakit.adapt(m, "lora", r=2, target_modules="0", merge_aware=True)
    assert host.find_state(m) is None and type(m[0]) is nn.Linear


def test_what_is_no_one_weight_is_refused():
    for inner in (HydraLoRA(), Full(), BitFit(), MergeAware(LoRA())):
        with pytest.raises(LorakitError, match="means nothing"):
            MergeAware(inner)
    with pytest.raises(LorakitError, match="means nothing"):
        Magnitude(MergeAware(LoRA()))


def test_it_is_no_plain_lora_and_says_so(tmp_path):
    m = adapted("nf4")
    with pytest.raises(LorakitError, match="rounded with the base"):
        lorakit.save(m, tmp_path / "a", form="lora", rank=4)
    assert not (tmp_path / "a").exists()


def test_a_refused_requantisation_names_this_mend():
    m = lorakit.adapt(layer("nf4"), "lora", r=4, target_modules="0")
    for p in m.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.002)
    with pytest.raises(LorakitError, match="merge_aware: true"):
        lorakit.merge(m, "requantize")


def test_a_half_weight_is_half_way_to_the_rounded_weight():
    m = adapted("nf4")
    slot = host.slots(m)["0"]
    one, half = (Applied(slot.methods["default"], slot.params("default"), Base(slot.site), slot.site, gain=g).weight() for g in (1.0, 0.5))
    assert torch.allclose(half, (one + m[0].weight) / 2, atol=1e-6)
