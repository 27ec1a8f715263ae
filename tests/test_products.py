"""Updates that are products or live in another basis, each beside a slow transcription of its formula and, where PEFT has it, beside PEFT."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakit
from lorakit import maps
from lorakit.errors import LorakitError
from lorakit.kernels.dropout import Dropout
from lorakit.kernels.kronecker import kronecker, kronecker_slow, place
from lorakit.kernels.products import columns, hadamard, made, rows, through
from lorakit.kernels.random_basis import combine
from lorakit.kernels.tensor_train import contract, modes
from lorakit.method import METHODS, Origin
from lorakit.methods.bat import Bat
from lorakit.methods.fourierft import FourierFT
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr, factorization
from lorakit.methods.loretta import LoRETTA
from lorakit.methods.miss import MiSS
from lorakit.methods.nola import NOLA
from lorakit.recipes import RECIPES, find
from lorakit.sites import site_for
from lorakit.sites.layers import ConvSite, EmbeddingSite, Site

O, I = 8, 12


def begun(method, o=O, i=I, noise=0.3, seed=1):
    """The leaves at their start, those that train moved."""
    g = torch.Generator().manual_seed(seed)
    p = method.start(o, i, Origin(lambda: torch.zeros(o, i)), g)
    return {k: t + noise * torch.randn(t.shape, generator=g) if method.leaves[k].trains else t for k, t in p.items()}


def delta(method, p, W=None):
    W = torch.zeros(O, I) if W is None else W
    return method.weight(p, W) - W


def acts(method, p, layer=None, x=None):
    """What the fast way adds on a layer, and what the matrix says it should."""
    layer = layer or nn.Linear(I, O)
    site = (EmbeddingSite if isinstance(layer, nn.Embedding) else ConvSite if isinstance(layer, nn.Conv2d) else Site)(layer)
    x = torch.randn(5, 3, I) if x is None else x
    base = maps.Base(site)
    return method.update(p, x, base, site, maps.same), site.op(x, delta(method, p, base.weight()))


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def in_peft(config, layer: nn.Module, method, p, drop=()):
    """PEFT's layer with these leaves: what it puts out."""
    from peft import get_peft_model

    model = nn.Sequential(layer)
    model = get_peft_model(model, config)
    mine = {n.split(".")[-2]: t for n, t in model.named_parameters() if t.requires_grad}
    ours = {method.key(k): t for k, t in p.items() if k not in drop}
    assert mine.keys() == ours.keys()
    for k, t in mine.items():
        assert t.shape == ours[k].shape, (k, t.shape, ours[k].shape)
        t.data.copy_(ours[k])
    return model


# Products that are made again in the backward pass

MADE = {  # the product, its definition from factors, their shapes
    "hadamard": (hadamard, lambda a, c, b, d: (a @ b) * (c @ d), [(5, 2), (5, 2), (2, 6), (2, 6)]),
    "rows": (rows, lambda a, c: torch.stack([torch.kron(*r) for r in zip(a, c, strict=True)]), [(5, 2), (5, 3)]),
    "columns": (columns, lambda b, d: torch.stack([torch.kron(*r) for r in zip(b.T, d.T, strict=True)], 1), [(2, 6), (3, 6)]),
}
KRONS = [[(2, 3), (4, 5)], [(5, 2), (3, 4)], [(2, 3), (4, 2), (2, 5)], [(4, 3), (9, 1), (1, 2)], [(1, 9), (5, 3), (3, 4)], [(9, 1), (4, 3), (3, 5)]]
ACTS = {k: (partial(through, product), lambda x, *f, slow=slow: x @ slow(*f).mT, s) for k, (product, slow, s) in MADE.items()}
ACTS |= {f"kronecker {'-'.join(f'{a}x{b}' for a, b in s)}": (kronecker, kronecker_slow, s) for s in KRONS}


def drawn(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=dtype, requires_grad=True) for s in shapes]


def width(kind):
    """How wide an input the act takes."""
    _, _, (first, *_, last) = ACTS[kind]
    return first[1] * last[1] if kind.startswith("kronecker") else {"rows": first[1] * last[1], "columns": last[1], "hadamard": last[1]}[kind]


def gradients(f, *tensors):
    y = f(*tensors)
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), tensors)


def test_w1_acts_where_it_is_cheapest():
    assert {place(torch.empty(W1), [torch.empty(A) for A in W2]) for W1, *W2 in KRONS if len(W2) == 2} == {0, 1, 2}
    assert {place(torch.empty(W1), [torch.empty(A) for A in W2]) for W1, *W2 in KRONS if len(W2) == 1} == {0, 1}


@pytest.mark.parametrize("kind", MADE)
def test_a_product_is_its_definition_and_keeps_its_factors(kind):
    product, slow, shapes = MADE[kind]
    factors, kept = drawn(*shapes), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        M = made(product, *factors)
    close(M, slow(*factors), 1e-12)
    assert {t.data_ptr() for t in kept} == {f.data_ptr() for f in factors}
    for a, b in zip(gradients(partial(made, product), *factors), gradients(slow, *factors), strict=True):
        close(a, b, 1e-12)
    assert torch.autograd.gradcheck(partial(made, product), factors) and torch.autograd.gradgradcheck(partial(made, product), factors)
    both = [torch.stack([f, 2 * f]) for f in factors]
    close(torch.vmap(partial(made, product))(*both)[1], slow(*(2 * f for f in factors)), 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ACTS)
def test_acting_with_a_product_is_its_definition_and_keeps_input_and_factors(kind, p):
    fast, slow, shapes = ACTS[kind]
    x, *factors = drawn((3, 2, width(kind)), *shapes)
    drop, kept = Dropout(p) if p else maps.same, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.manual_seed(5)
        y = fast(x, *factors, drop=drop)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *factors)}
    torch.manual_seed(5)
    mask = drop.drawn(torch.ones_like(x)) if p else drop
    assert (mask(torch.ones_like(x)) == 0).any() == bool(p)

    def again(x, *factors):
        torch.manual_seed(5)
        return fast(x, *factors, drop=drop)

    def want(x, *factors):
        return slow(mask(x), *factors)

    close(y, want(x, *factors), 1e-12)
    for a, b in zip(gradients(again, x, *factors), gradients(want, x, *factors), strict=True):
        close(a, b, 1e-12)
    assert torch.autograd.gradcheck(again, (x, *factors), fast_mode=True) and torch.autograd.gradgradcheck(again, (x, *factors), fast_mode=True)
    plain, recomputed = (gradients(f, x, *factors) for f in (again, lambda *t: checkpoint(again, *t, use_reentrant=False)))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("kind", ACTS)
def test_acting_with_a_product_under_vmap_autocast_and_with_what_is_frozen(kind):
    fast, slow, shapes = ACTS[kind]
    x, *factors = drawn((3, 2, width(kind)), *shapes, dtype=torch.float32)
    act = partial(fast, drop=maps.same)
    close(torch.vmap(act, (0, *(None for _ in factors)))(x, *factors), slow(x, *factors))
    per = torch.vmap(torch.func.grad(lambda f, x: act(x, f, *factors[1:]).square().sum()), (None, 0))(factors[0], x)
    close(per.sum(0), torch.autograd.grad(slow(x, *factors).square().sum(), factors[0])[0], 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = act(x, *factors), slow(x, *factors)
    assert y.dtype == torch.bfloat16 and float((y - want).detach().norm()) < 0.05 * float(want.detach().norm())
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), (x, *factors)))
    half = act(x.detach().bfloat16(), *factors)
    assert half.dtype == torch.bfloat16 and torch.autograd.grad(half.float().sum(), factors[0])[0].dtype == torch.float32
    frozen = [f.detach() for f in factors]
    close(torch.autograd.grad(act(x, *frozen).sum(), x)[0], torch.autograd.grad(slow(x, *frozen).sum(), x)[0])


@pytest.mark.parametrize("kind", ["rows", "kronecker 2x3-4x2-2x5"])
def test_acting_with_a_product_compiles(kind):
    fast, slow, shapes = ACTS[kind]
    x, *factors = drawn((3, 2, width(kind)), *shapes, dtype=torch.float32)
    torch._dynamo.reset()
    close(torch.compile(partial(fast, drop=maps.same), backend="eager", fullgraph=True)(x, *factors), slow(x, *factors))


# LoHa


@pytest.mark.parametrize("r", [1, 2, 3])
def test_loha_is_the_hadamard_product_of_two_products(r):
    m = LoHa(r, 5.0)
    p = begun(m)
    want = torch.zeros(O, I)
    for o, i in itertools.product(range(O), range(I)):
        one = sum(p["w1_a"][o, k] * p["w1_b"][k, i] for k in range(r))
        want[o, i] = 5.0 / r * one * sum(p["w2_a"][o, k] * p["w2_b"][k, i] for k in range(r))
    close(delta(m, p), want)
    close(*acts(m, p))
    assert (m.two(p) is None) == (r == 3), "factors only where they are smaller than the matrix"
    if r < 3:
        B, A = m.two(p)
        close(B @ A, want)


def test_loha_reaches_the_square_of_its_rank():
    m = LoHa(2)
    assert torch.linalg.matrix_rank(delta(m, begun(m, 32, 24), torch.zeros(32, 24)).double(), rtol=1e-6) == 4


@pytest.mark.parametrize(("begin", "zero"), [("peft", "w2_b"), ("lycoris", "w2_a")])
def test_loha_starts_with_one_factor_at_zero(begin, zero):
    p = begun(LoHa(4, begin=begin), 200, 300, noise=0)
    assert [k for k, t in p.items() if not t.any()] == [zero]
    assert float(p["w1_a"].std()) == pytest.approx({"peft": 4**-0.5 / 3**0.5, "lycoris": 0.1}[begin], rel=0.1)
    assert float(p["w1_b"].std()) == pytest.approx({"peft": 300**-0.5 / 3**0.5, "lycoris": 1.0}[begin], rel=0.1)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(I, O), lambda: nn.Conv2d(3, O, 2)])
def test_loha_is_pefts(layer):
    from peft import LoHaConfig

    layer, m = layer(), LoHa(2, 3.0)
    p = begun(m)
    x = torch.randn(4, I) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 6, 6)
    out = layer(x)
    close(out + acts(m, p, layer, x)[0], in_peft(LoHaConfig(r=2, alpha=3, target_modules=["0"]), layer, m, p)(x))


def rebuilt(core, a, b):
    """A core (r, r, pixels) times a (r, o) and b (r, channels), entry by entry."""
    (r, _, P), o, c = core.shape, a.shape[1], b.shape[1]
    out = torch.zeros(o, c, P)
    for j, q in itertools.product(range(r), range(r)):
        out += core[j, q] * a[j, :, None, None] * b[q, None, :, None]
    return out


@pytest.mark.parametrize("r", [1, 3])
def test_loha_with_cores(r):
    layer = nn.Conv2d(3, O, 2)
    m = LoHa(r, 5.0, tucker=True).on(ConvSite(layer))
    p = begun(m)
    assert {k: tuple(t.shape) for k, t in p.items()} == {"w1_a": (r, O), "w2_a": (r, O), "w1_b": (r, 3), "w2_b": (r, 3), "t1": (r, 4 * r), "t2": (r, 4 * r)}
    one, two = (rebuilt(p[f"t{n}"].view(r, r, 4), p[f"w{n}_a"], p[f"w{n}_b"]) for n in (1, 2))
    close(delta(m, p), 5.0 / r * (one * two).flatten(1))
    close(*acts(m, p, layer, torch.randn(2, 3, 6, 6)))
    assert [k for k, t in begun(m, noise=0).items() if not t.any()] == ["w2_b"]
    for other in (nn.Linear(I, O), nn.Conv2d(I, O, 1), nn.Embedding(I, O)):
        assert list(LoHa(r, tucker=True).on(site_for(other)).shapes(O, I)) == ["w1_a", "w1_b", "w2_a", "w2_b"], "no kernel, no core"


# LoKr


def by_loops(m, p):
    W1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    W2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    (L, M), (K, N) = W1.shape, W2.shape
    out = torch.zeros(L * K, M * N)
    for l, k, a, n in itertools.product(range(L), range(K), range(M), range(N)):
        out[l * K + k, a * N + n] = m.alpha / m.r * W1[l, a] * W2[k, n]
    return out


LOKRS = {LoKr(8, 3.0): ["w1", "w2"], LoKr(2, 3.0): ["w1", "w2"], LoKr(1, 2.0): ["w1", "w2_a", "w2_b"], LoKr(1, 2.0, 2, True): ["w1", "w2_a", "w2_b"],
         LoKr(1, 2.0, -1, True): ["w1_a", "w1_b", "w2_a", "w2_b"]}


@pytest.mark.parametrize("m", LOKRS, ids=str)
def test_lokr_is_the_kronecker_product(m):
    p = begun(m)
    assert list(p) == LOKRS[m]
    close(delta(m, p), by_loops(m, p))
    close(*acts(m, p))
    close(*acts(m, p, nn.Embedding(I, O), torch.arange(6)))


@pytest.mark.parametrize("m", LOKRS, ids=str)
def test_lokrs_rank_is_the_product_of_the_ranks(m):
    p = begun(m)
    one = torch.linalg.matrix_rank(p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"])
    two = torch.linalg.matrix_rank(p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"])
    assert torch.linalg.matrix_rank(delta(m, p).double(), rtol=1e-5) == one * two


def test_lokr_cuts_sizes_as_peft_does():
    from peft.tuners.lokr.layer import factorization as theirs

    for d, f in itertools.product([1, 2, 6, 7, 12, 16, 127, 128, 360, 768], [-1, 1, 2, 3, 4, 5, 7, 8, 16, 1000]):
        assert factorization(d, f) == theirs(d, f), (d, f)


@pytest.mark.parametrize(("m", "zero"), [(LoKr(8), "w1"), (LoKr(1, 1.0, -1, True), "w1_a"), (LoKr(8, begin="lycoris"), "w2"),
                                         (LoKr(1, 1.0, begin="lycoris"), "w2_b")], ids=str)
def test_lokr_starts_with_one_factor_at_zero(m, zero):
    assert [k for k, t in begun(m, noise=0).items() if not t.any()] == [zero]


@pytest.mark.parametrize("m", LOKRS, ids=str)
def test_lokr_is_pefts(m):
    from peft import LoKrConfig

    layer, p, x = nn.Linear(I, O), begun(m), torch.randn(4, I)
    config = LoKrConfig(r=m.r, alpha=m.alpha, decompose_factor=m.decompose_factor, decompose_both=m.decompose_both, target_modules=["0"])
    close(layer(x) + acts(m, p, layer, x)[0], in_peft(config, layer, m, p)(x))


@pytest.mark.parametrize(("m", "leaves"), [(LoKr(1, 2.0, tucker=True), {"w1", "w2_a", "w2_b", "t2"}), (LoKr(1, 2.0), {"w1", "w2_a", "w2_b"}),
                                           (LoKr(8, 2.0, tucker=True), {"w1", "w2"})], ids=("core", "low", "full"))
@pytest.mark.parametrize("swapped", [False, True])
def test_lokr_cuts_a_convolutions_channels(m, leaves, swapped):
    layer = nn.Conv2d(6, 4, (1, 3))
    m = dataclasses.replace(m, swapped=swapped).on(ConvSite(layer))
    p = begun(m, 4, 18)
    assert set(p) == leaves
    if "t2" in p:
        W2 = rebuilt(p["t2"].view(1, 1, 3), p["w2_a"], p["w2_b"])
    else:
        W2 = (p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]).view(2, 3, 3)
    want, (k, n) = torch.zeros(4, 6, 3), (2, 3)
    for a, b, c, d in itertools.product(range(2), range(k), range(2), range(n)):
        want[(b * 2 + a, d * 2 + c) if swapped else (a * k + b, c * n + d)] = 2.0 / m.r * p["w1"][a, c] * W2[b, d]
    close(delta(m, p, torch.zeros(4, 18)), want.flatten(1))
    x = torch.randn(2, 6, 5, 5)
    got, slow = acts(m, p, layer, x)
    close(got, slow)


def test_pefts_lokr_with_a_core_on_a_conv1d_is_read_though_peft_cannot_run_it(tmp_path):
    """PEFT 0.21.2 makes such an adapter and saves it; its own forward pass fails in torch.kron."""
    import peft

    theirs = peft.get_peft_model(nn.Sequential(nn.Conv1d(6, 4, 3)), peft.LoKrConfig(r=1, alpha=2, use_effective_conv2d=True, target_modules=["0"]))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        theirs(torch.randn(2, 6, 9))
    p = {k.split("lokr_")[1].split(".")[0]: t.data.normal_() for k, t in theirs.named_parameters() if "lokr" in k}
    theirs.save_pretrained(tmp_path / "a")
    base = nn.Sequential(nn.Conv1d(6, 4, 3))
    mine = lorakit.load(base, tmp_path / "a", check_base=False)
    W2 = torch.einsum("jqp,jk,qn->knp", p["t2"][..., 0], p["w2_a"], p["w2_b"])
    close(lorakit.merged(mine)[0].weight - base[0].weight, 2 * torch.kron(p["w1"][:, :, None], W2))
    lorakit.save(mine, tmp_path / "b")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# FourierFT


@pytest.mark.parametrize(("o", "i", "n"), [(8, 12, 1), (7, 9, 5), (6, 5, 30), (9, 8, 40), (40, 30, 2)])
def test_fourierft_is_the_real_part_of_the_inverse_transform(o, i, n):
    m = FourierFT(n, 5.0)
    p = begun(m, o, i)
    at = torch.randperm(o * i, generator=torch.Generator().manual_seed(777))[:n].tolist()
    want = torch.zeros(o, i, dtype=torch.float64)
    for a, b in itertools.product(range(o), range(i)):
        for c, k in zip(p["c"].tolist(), at, strict=True):
            want[a, b] += 5.0 / (o * i) * c * math.cos(2 * math.pi * ((k // i) * a / o + (k % i) * b / i))
    close(m.delta(p, None), want.float())
    if two := m.two(p):
        close(two[0] @ two[1], want.float())
    assert (m.two(p) is not None) == (4 * n * (o + i) < o * i)
    close(*acts(m, p, nn.Linear(i, o), torch.randn(4, i)))


def test_fourierft_is_pefts():
    from peft import FourierFTConfig

    m, layer, x = FourierFT(20, 30.0, 5), nn.Linear(I, O), torch.randn(4, I)
    p = begun(m)
    config = FourierFTConfig(n_frequency=20, scaling=30.0, random_loc_seed=5, target_modules=["0"])
    close(layer(x) + acts(m, p, layer, x)[0], in_peft(config, layer, m, p, drop=("sizes",))(x))


def test_fourierft_is_linear_in_c_and_says_when_it_does_not_fit():
    m = FourierFT(30, 5.0)
    p, q = begun(m), begun(m, seed=2)
    close(m.delta(p | {"c": 2 * p["c"] - q["c"]}, None), 2 * m.delta(p, None) - m.delta(q, None))
    assert "97" in FourierFT(97).unfit(Site(nn.Linear(I, O))) and FourierFT(96).unfit(Site(nn.Linear(I, O))) is None
    assert not begun(FourierFT(5, begin="zeros"), noise=0)["c"].any() and begun(FourierFT(5), noise=0)["c"].all()


def test_fourierft_trains_after_it_first_ran_in_inference_mode():
    m = FourierFT(31, 5.0)  # a number no other test has, or the places would be there already
    p = begun(m)
    with torch.inference_mode():
        m.delta(p, None)
    c = p["c"].requires_grad_()
    m.delta(p, None).square().sum().backward()
    assert c.grad.abs().sum() > 0


# MiSS and Bat


@pytest.mark.parametrize(("r", "mini"), [(1, 0), (2, 0), (4, 0), (5, 0), (12, 0), (3, 2), (5, 4)])
def test_miss_sums_shards(r, mini):
    m = MiSS(r, mini)
    p = begun(m)
    want = torch.zeros(O, I)
    for o, i in itertools.product(range(O), range(I)):
        want[o, i] = p["D"][i % r, o % mini if mini else o]
    close(delta(m, p), want)
    close(*acts(m, p))
    close(*acts(m, p, nn.Embedding(I, O), torch.arange(6)))
    close(*acts(m, p, nn.Conv2d(3, O, 2), torch.randn(2, 3, 5, 5)))
    B, A = m.two(p)
    close(B @ A, want)
    assert p["D"].shape == (r, mini or O) and torch.equal(A.sum(0), torch.ones(I)), "every input is in one shard"
    assert not delta(m, begun(m, noise=0)).any()


def test_bat_is_affine_on_blocks():
    m, W = Bat(4), torch.randn(O, I)
    p = begun(m)
    V = m.weight(p, W)
    for a, c in itertools.product(range(2), range(3)):
        rows, cols, D = slice(4 * a, 4 * a + 4), slice(4 * c, 4 * c + 4), p["D"][a]
        close(V[rows, cols], W[rows, cols] @ (torch.eye(4) + D) + D)
        close((V[rows, cols] - D) @ torch.linalg.inv(torch.eye(4) + D), W[rows, cols], 1e-4)
    close(*acts(m, p))


@pytest.mark.parametrize(("m", "word"), [(MiSS(4), True), (MiSS(5), True), (MiSS(3, 2), "mini"), (Bat(2), "bat")], ids=str)
def test_miss_and_bat_are_pefts(m, word):
    from peft import MissConfig

    layer, x = nn.Linear(I, O), torch.randn(4, I)
    p = begun(m)
    out, fast = layer(x), acts(m, p, layer, x)[0]
    close(out + fast, in_peft(MissConfig(r=m.r, mini_r=getattr(m, "mini_r", 1), init_weights=word, target_modules=["0"]), layer, m, p, ("sizes",))(x))


def test_miss_and_bat_say_when_they_do_not_fit():
    site = Site(nn.Linear(I, O))
    assert "12" in MiSS(13).unfit(site) and "divide" in MiSS(2, 3).unfit(site) and "blocks of 8" in Bat(8).unfit(site)
    assert MiSS(12, 8).unfit(site) is None and Bat(4).unfit(site) is None


# LoRETTA


def test_a_size_is_cut_evenly():
    assert modes(768 * 64, 5) == (8, 8, 8, 8, 12) and modes(7, 3) == (1, 1, 7) and modes(1, 2) == (1, 1)
    assert all(math.prod(modes(n, k)) == n for n in (4096 * 32, 1024 * 32, 50257 * 8) for k in (1, 2, 5))


def test_a_train_is_contracted_entry_by_entry():
    g = torch.Generator().manual_seed(0)
    ranks, sizes = (1, 3, 2, 1), (2, 4, 3)
    cores = [torch.randn(ranks[k], sizes[k], ranks[k + 1], generator=g) for k in range(3)]
    want = [float(cores[0][:, a] @ cores[1][:, b] @ cores[2][:, c]) for a, b, c in itertools.product(*map(range, sizes))]
    got = contract(cores)
    close(got, torch.tensor(want))
    for k in (1, 2):
        unfolded = got.view(math.prod(sizes[:k]), -1)
        assert torch.linalg.matrix_rank(unfolded) <= ranks[k]


@pytest.mark.parametrize("m", [LoRETTA(2, 5.0, 3, 3), LoRETTA(1, 5.0, 2, 4), LoRETTA(3, 5.0, 1, 1)], ids=str)
def test_loretta_is_two_trains(m):
    p = begun(m)
    A, B = (contract([p[f"{w}{k}"] for k in range(1, m.modes + 1)]) for w in "ab")
    want = 5.0 / m.r * (A.reshape(I, m.r) @ B.reshape(m.r, O)).T
    close(delta(m, p), want)
    close(*acts(m, p))
    assert torch.linalg.matrix_rank(delta(m, p).double(), rtol=1e-5) <= m.r


def test_lorettas_start():
    assert not delta(LoRETTA(2), begun(LoRETTA(2), noise=0)).any() and delta(LoRETTA(2, begin="random"), begun(LoRETTA(2, begin="random"), noise=0)).any()
    m = LoRETTA(8, tensor_rank=5, modes=5, begin="random")
    pairs = [m.factors(begun(m, 64, 96, 0, seed)) for seed in range(60)]
    for n, size, scale in ((0, 64, 2.0), (1, 96, 1.0)):
        assert float(torch.stack([p[n] for p in pairs]).square().mean() / scale**2) == pytest.approx(1 / size, rel=0.25)
    assert modes(768 * 8, 5) == (4, 4, 6, 8, 8) and m.trainable(768, 768) == 2 * 5 * (4 + 5 * 4 + 5 * 6 + 5 * 8 + 8)


# NOLA


def entry(seed: int, which: int, basis: int, e: int) -> float:
    """One entry of a basis, in Python's own integers."""

    def scramble(x):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    key = scramble(scramble(seed + which * 2**24) ^ scramble(basis))
    return (2 * (scramble(key ^ scramble(e)) >> 9) + 1 - 2**23) / 2**23


@pytest.mark.parametrize("r", [1, 2, 3])
def test_nola_is_a_combination_of_bases(r):
    m = NOLA(r, 5.0, 4, 6)
    p = begun(m)
    seed = int(p["seed"] @ torch.tensor([1.0, 256, 65536]))
    A = torch.tensor([[entry(seed, 0, 0, k * I + i) * I**-0.5 + sum(float(p["a"][j]) * entry(seed, 1, j, k * I + i) for j in range(4)) * 4**-0.5
                       for i in range(I)] for k in range(r)])
    B = torch.tensor([[sum(float(p["b"][j]) * entry(seed, 2, j, k * O + o) for j in range(6)) * 6**-0.5 for k in range(r)] for o in range(O)])
    close(delta(m, p), 5.0 / r * B @ A)
    close(*acts(m, p))


def test_nolas_gradient_is_the_product_with_each_basis():
    seed, c = torch.tensor([3.0, 1.0, 200.0]), torch.randn(7, requires_grad=True)
    probe = torch.randn(20)
    (combine(c, seed, 1, 20) * probe).sum().backward()
    number = 3 + 256 + 200 * 65536
    close(c.grad, torch.tensor([sum(entry(number, 1, j, e) * float(probe[e]) for e in range(20)) for j in range(7)]))
    d = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: combine(d, seed, 1, 9), d)


def test_nola_keeps_no_basis_for_the_backward_pass(monkeypatch):
    def kept(k):
        m, total = NOLA(2, 5.0, k, k), 0
        p = {n: t.requires_grad_(m.leaves[n].trains) for n, t in begun(m, 32, 48).items()}

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            site = Site(nn.Linear(48, 32))
            y = m.update(p, torch.randn(4, 48), maps.Base(site), site, maps.same)
        y.sum().backward()
        assert p["b"].grad.shape == (k,)
        return total

    assert kept(500) == kept(5) < 4 * 48 + 1000
    monkeypatch.setattr("lorakit.kernels.random_basis.AT_ONCE", 100)
    assert kept(50) == kept(5)


def test_nolas_bases_do_not_depend_on_chunks_vmap_compilation_or_precision(monkeypatch):
    seeds, c = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.randn(2, 9)
    want = torch.stack([combine(c[n], seeds[n], 1, 30) for n in range(2)])
    close(torch.vmap(lambda c, s: combine(c, s, 1, 30))(c, seeds), want)
    close(torch.compile(lambda c, s: combine(c, s, 1, 30), backend="eager", fullgraph=True)(c[0], seeds[0]), want[0])
    one = torch.eye(9)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(combine(one[4], seeds[0].to(dtype), 1, 30), combine(one[4], seeds[0], 1, 30)), "a seed must survive half precision"
    monkeypatch.setattr("lorakit.kernels.random_basis.AT_ONCE", 60)
    close(combine(c[0], seeds[0], 1, 30), want[0])


def test_nolas_bases_look_random():
    seed = torch.tensor([7.0, 0, 0])
    bases = torch.stack([combine(e, seed, 1, 4000) for e in torch.eye(40)])
    assert abs(float(bases.mean())) < 0.01 and float(bases.var()) == pytest.approx(1 / 3, rel=0.02) and float(bases.abs().max()) < 1
    gram = (bases @ bases.T * 3 / 4000 - torch.eye(40)).abs()
    assert float(gram.max()) < 0.12 and bases.unique().numel() > 0.98 * bases.numel()
    other = combine(torch.eye(40)[0], torch.tensor([8.0, 0, 0]), 1, 4000)
    assert abs(float(other @ bases[0])) * 3 / 4000 < 0.08


def test_nola_starts_alive_and_its_file_is_small():
    m = NOLA(2, 5.0, 10, 20)
    p = {k: t.requires_grad_(m.leaves[k].trains) for k, t in begun(m, noise=0).items()}
    D = delta(m, p)
    assert not D.any()
    D.sum().backward()
    assert p["b"].grad.abs().sum() > 0, "a dead start"
    assert sum(t.numel() for t in p.values()) == 10 + 20 + 3
    assert not torch.equal(begun(m, seed=1)["seed"], begun(m, seed=2)["seed"])


# All of them


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("name", ["loha", "lokr", "miss", "bat", "loretta", "nola"])
def test_the_lowest_ranks_work_everywhere(name, r):
    m = METHODS[name](r)
    p = begun(m)
    close(*acts(m, p))
    close(*acts(m, p, nn.Embedding(I, O), torch.arange(6)))
    close(*acts(m, p, nn.Conv2d(3, O, 2), torch.randn(2, 3, 5, 5)))
    W = torch.randn(O, I)
    close(m.weight(begun(m, noise=0), W), W)
    assert delta(m, p, W).abs().max() > 1e-3


def test_names_people_know():
    for name, row in (("LoHa", "loha"), ("hada", "loha"), ("LoKr", "lokr"), ("fourier", "fourierft"), ("bone", "miss"), ("bat", "bat"),
                      ("loretta_rep", "loretta"), ("nola", "nola")):
        assert find(name) == row and RECIPES[row].method.name == row
    for bad in (lambda: NOLA(2, bases_a=0), lambda: FourierFT(0), lambda: LoKr(2, decompose_factor=0), lambda: LoRETTA(2, modes=0), lambda: LoHa(0)):
        with pytest.raises(LorakitError):
            bad()
