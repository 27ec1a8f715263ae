"""Rotations, scalers and changes of the spectrum: each against its paper's formula written out slowly, its start and what it promises."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit.errors import LorakitError
from lorakit.kernels.cayley import cayley, cayley_series, skew, turn
from lorakit.kernels.svd import thin_svd
from lorakit.method import METHODS, Origin
from lorakit.methods.boft import BOFT
from lorakit.methods.hra import HRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.oft import OFT, divisor
from lorakit.methods.spectral import Spectral
from lorakit.methods.svdiff import SVDiff
from lorakit.recipes import compose
from lorakit.spec import Spec

O, I = 6, 12


def made(method, o=O, i=I, noise=0.3, seed=0):
    """Leaves off their start, and a weight, in float64 so that only formulas differ."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(o, i, generator=gen, dtype=torch.float64)
    p = {k: v.double() for k, v in method.start(o, i, Origin(lambda: W.float()), gen).items()}
    method.derive(p, lambda: W)
    method.settle(p, lambda: W)
    for k, v in p.items():
        if method.leaves[k].trains:
            v.add_(torch.randn(v.shape, generator=gen, dtype=torch.float64) * noise)
    return p, W


def close(a, b, tol=1e-9):
    return torch.allclose(a, b, rtol=0, atol=tol)


def skew_slow(v, b):
    Q, at = torch.zeros(b, b, dtype=v.dtype), 0
    for row in range(b):
        for col in range(row + 1, b):
            Q[row, col], Q[col, row] = v[at], -v[at]
            at += 1
    return Q


def cayley_slow(Q):
    one = torch.eye(len(Q), dtype=Q.dtype)
    return (one - Q) @ torch.linalg.inv(one + Q)


def is_rotation(R):
    return close(R @ R.mT, torch.eye(len(R), dtype=R.dtype))


# Kernels


def test_the_sign_of_singular_vectors_is_fixed():
    W = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    U, S, Vh = thin_svd(W)
    assert U.shape == (2, 5, 5) and Vh.shape == (2, 5, 7) and close(U * S[:, None] @ Vh, W, 1e-5)
    assert all(u[int(u.abs().argmax())] > 0 for M in U for u in M.mT)
    again = thin_svd(-W)  # the same left vectors, the other right ones
    assert close(again[0], U, 1e-4) and close(again[2], -Vh, 1e-4)
    assert thin_svd(W.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("b", [2, 3, 5])
def test_cayley_and_skew_are_the_dense_formulas(b):
    v = torch.randn(4, b * (b - 1) // 2, dtype=torch.float64)
    Q = skew(v)
    for k in range(4):
        assert close(Q[k], skew_slow(v[k], b)) and close(cayley(Q)[k], cayley_slow(Q[k])) and is_rotation(cayley(Q)[k])
    x = torch.randn(3, 4 * b, dtype=torch.float64)
    assert close(turn(x, Q), x @ torch.block_diag(*Q)) and close(turn(x, Q[:1]), x @ torch.block_diag(*[Q[0]] * 4))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6, 8])
def test_the_series_is_pefts_and_tends_to_the_transpose(terms):
    from peft.tuners.oft.layer import OFTRotationModule

    v = torch.randn(2, 6) * 0.1
    peft = OFTRotationModule(2, 6, 4, 8)
    assert close(cayley_series(skew(v), terms), peft._cayley_batch(v, 4, True, terms), 1e-6)
    small = skew(v * 0.1)
    if terms >= 5:
        assert close(cayley_series(small, terms), cayley(small).mT, 1e-5) and not close(cayley_series(small, terms), cayley(small), 1e-2)


# OFT


@pytest.mark.parametrize("method", [OFT(4), OFT(2), OFT(r=2), OFT(3, block_share=True), OFT(), OFT(5), OFT(4, side="out"), OFT(4, eps=0.3), OFT(4, series=5)])
def test_oft_is_a_block_diagonal_rotation(method):
    p, W = made(method)
    size = I if method.side == "in" else O
    b = {OFT(5): 4, OFT(): 12, OFT(r=2): 6, OFT(4, side="out"): 3}.get(method, method.block_size)  # 4 and 6 are near 5; 3 and 6 near 4 of 6
    n = size // b
    assert list(p["R"].shape) == [1 if method.block_share else n, b * (b - 1) // 2]
    blocks = []
    for k in range(n):
        Q = skew_slow(p["R"][0 if method.block_share else k], b)
        if method.eps and Q.norm() > method.eps / math.sqrt(n):
            Q = Q / Q.norm() * method.eps / math.sqrt(n)
        one = torch.eye(b, dtype=Q.dtype)
        blocks.append(one + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q if method.series else cayley_slow(Q))
    R = torch.block_diag(*blocks)
    now = method.weight(p, W)
    assert close(now, W @ R.mT if method.side == "in" else R.mT @ W) and not close(now, W, 1e-2)
    if not method.series:
        assert is_rotation(R)
    begun, _ = made(method, noise=0.0)
    assert close(method.weight(begun, W), W, 1e-12)


def test_coft_holds_back_only_what_is_too_far():
    free, held = OFT(4), OFT(4, eps=0.5)
    p, W = made(free, noise=0.01)
    assert close(free.weight(p, W), held.weight(p, W), 1e-12)
    p, W = made(free, noise=5.0)
    far = OFT(4, eps=1e-3).weight(p, W)
    assert 0 < (far - W).norm() / W.norm() < 3e-3


def test_oft_moves_to_the_nearest_divisor_as_peft_does():
    from peft.tuners.oft.layer import OFTLayer

    for n in range(2, 40):
        for near in range(1, 40):
            assert divisor(n, near) == OFTLayer.adjust_oft_parameters(None, n, near), (n, near)
    layer = nn.Linear(7, 4)
    with pytest.raises(LorakitError, match="leave nothing to turn"):
        lorakit.adapt(nn.Sequential(layer), OFT(3), targets=["0"])
    for bad in ({"block_size": 4, "r": 2}, {"block_size": 1}, {"eps": -1.0}):
        with pytest.raises(LorakitError, match="block"):
            OFT(**bad)


def test_an_embedding_is_turned_on_its_vectors():
    model = nn.Sequential(nn.Embedding(10, 8))
    table = model[0].weight.clone()
    lorakit.adapt(model, OFT(4), targets=["0"])
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    now = model(torch.arange(10))
    assert close(now @ now.mT, table @ table.mT, 1e-5) and not close(now, table, 0.1)
    key = next(n for n, p in model.named_parameters() if p.requires_grad)
    assert "oft_embedding_R" in key and sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 6


def test_one_number_per_layer_is_enough():
    m = OFT(2, block_share=True)
    assert m.trainable(O, I) == 1 and OFT(2).trainable(O, I) == 6
    p, W = made(m)
    a = p["R"][0, 0]
    R = torch.stack([torch.stack([1 - a**2, -2 * a]), torch.stack([2 * a, 1 - a**2])]) / (1 + a**2)
    assert close(m.weight(p, W), W @ torch.block_diag(*[R] * 6).mT)


# BOFT


def butterfly_slow(Z, size, b):
    """The dense R, with permutation matrices from loops: P[k, idx[k]] = 1, idx the even, then the odd half blocks of each group."""
    R = torch.eye(size, dtype=Z.dtype)
    for k in range(len(Z)):
        D = torch.block_diag(*[cayley_slow((z - z.mT) / 2) for z in Z[k]])
        group, half, idx = b * 2**k, b // 2, []
        for at in range(0, size, group):
            chunks = [list(range(c, c + half)) for c in range(at, at + group, half)] if k else [list(range(at, at + b))]
            idx += [j for c in chunks[0::2] + chunks[1::2] for j in c]
        P = torch.zeros(size, size, dtype=Z.dtype)
        for row, col in enumerate(idx):
            P[row, col] = 1
        R = P @ D @ P.mT @ R
    return R


@pytest.mark.parametrize("method", [BOFT(4), BOFT(2, factors=2), BOFT(r=4), BOFT(3), BOFT(2, factors=1, side="out"), BOFT(2, factors=4), BOFT(4, factors=3)])
def test_boft_is_a_product_of_butterfly_factors(method):
    p, W = made(method, i=16 if method.factors > 2 else I)
    b = p["Z"].shape[-1]
    size = W.shape[0] if method.side == "out" else W.shape[1]
    assert list(p["Z"].shape) == [method.factors, size // b, b, b] and list(p["m"].shape) == [O, 1]
    R = butterfly_slow(p["Z"], size, b)
    assert is_rotation(R)
    if method.factors > 1:  # more coordinates meet than a block holds
        assert int((R[0].abs() > 1e-12).sum()) > b
    turned = W @ R.mT if method.side == "in" else R.mT @ W
    assert close(method.weight(p, W), p["m"] * turned)
    begun, _ = made(method, i=W.shape[1], noise=0.0)
    assert close(method.weight(begun, W), W, 1e-12)


def test_boft_permutes_as_peft_does():
    from peft.tuners.boft.layer import BOFTLayer

    from lorakit.methods.boft import shuffle

    for size, b, m in ((16, 4, 3), (16, 2, 4), (24, 2, 3), (32, 4, 2)):
        for k in range(1, m):
            idx = BOFTLayer.block_butterfly_perm(None, size, size // b // 2**k, b // 2, m - 1)
            x = torch.arange(size)
            assert torch.equal(shuffle(x, k, b // 2, True), x[idx]) and torch.equal(shuffle(shuffle(x, k, b // 2, True), k, b // 2, False), x)


@pytest.mark.parametrize("method", [BOFT(5), BOFT(r=5), BOFT(2, factors=3), BOFT(3, factors=2), BOFT(8)])
def test_boft_says_what_does_not_divide(method):
    with pytest.raises(LorakitError, match="cannot be cut .* mend"):
        lorakit.adapt(nn.Sequential(nn.Linear(I, O)), method, targets=["0"])


# HRA


@pytest.mark.parametrize("method", [HRA(2), HRA(4), HRA(8), HRA(1, begin="random"), HRA(3, begin="random"), HRA(4, side="out"), HRA(16),
                                    HRA(4, gram_schmidt=True), HRA(1, gram_schmidt=True)])
def test_hra_is_a_chain_of_reflections(method):
    p, W = made(method)
    U = p["U"]
    H = torch.eye(len(U), dtype=U.dtype)
    basis = []
    for k in range(method.r):
        u = U[:, k]
        for v in basis if method.gram_schmidt else ():
            u = u - (v @ u) * v
        u = u / u.norm()
        basis.append(u)
        H = H @ (torch.eye(len(U), dtype=U.dtype) - 2 * torch.outer(u, u))
    assert is_rotation(H) and float(torch.linalg.det(H)) == pytest.approx((-1) ** method.r)
    now = method.weight(p, W)
    assert close(now, W @ H if method.side == "in" else H @ W) and not close(now, W, 1e-2)
    assert torch.linalg.matrix_rank(now - W, atol=1e-9) <= method.r


def test_hra_starts_as_the_model_only_where_it_can():
    p, W = made(HRA(4), noise=0.0)
    assert torch.equal(p["U"][:, 0], p["U"][:, 1]) and not torch.equal(p["U"][:, 1], p["U"][:, 2]) and close(HRA(4).weight(p, W), W, 1e-6)
    with pytest.raises(LorakitError, match="cannot undo each other"):
        HRA(3)
    for m in (HRA(3, begin="random"), HRA(4, gram_schmidt=True)):
        p, W = made(m, noise=0.0)
        assert not close(m.weight(p, W), W, 1e-2) and "identity" not in m.laws
    assert torch.linalg.matrix_rank(p["U"]) == 4, "pairs would be rounding noise after Gram-Schmidt"


def test_hra_moves_away_from_pairs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(I, O)), torch.randn(5, I)
    want = model(x)
    lorakit.adapt(model, HRA(2), targets=["0"])
    assert close(model(x), want, 1e-6)
    (model(x) - torch.randn(5, O)).square().sum().backward()
    U = next(p for p in model.parameters() if p.requires_grad)
    assert U.grad.norm() > 0.1 and not close(U.grad[:, 0], U.grad[:, 1], 1e-3), "the two of a pair must part"


@pytest.mark.parametrize("name, ours, kw", [
    ("HRA", HRA(4), {"r": 4}), ("HRA", HRA(4, gram_schmidt=True), {"r": 4, "apply_GS": True}), ("BOFT", BOFT(4), {"boft_block_size": 4}),
    ("OFT", OFT(4), {"oft_block_size": 4, "use_cayley_neumann": False}), ("OFT", OFT(r=2, series=5), {"r": 2, "oft_block_size": 0}),
    ("OFT", OFT(4, series=5, eps=0.3), {"oft_block_size": 4, "coft": True, "eps": 0.3}), ("OFT", OFT(4, block_share=True, series=3),
     {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 3}), ("IA3", IA3(), {"feedforward_modules": []}),
    ("IA3", IA3("in"), {"feedforward_modules": ["0"]})])
def test_the_same_numbers_mean_the_same_in_peft(name, ours, kw):
    import peft

    torch.manual_seed(0)
    theirs, mine = nn.Sequential(nn.Linear(I, O)), nn.Sequential(nn.Linear(I, O))
    mine.load_state_dict(theirs.state_dict())
    theirs = peft.get_peft_model(theirs, getattr(peft, f"{name}Config")(target_modules=["0"], **kw))
    lorakit.adapt(mine, ours, targets=["0"])
    own = {n: p for n, p in mine.named_parameters() if p.requires_grad}
    for n, p in theirs.named_parameters():
        if p.requires_grad:
            [q] = [q for k, q in own.items() if k.split(".")[-2] == n.split(".default")[0].split(".")[-1]]
            assert p.shape == q.shape
            p.data.add_(torch.randn_like(p) * 0.2)
            q.data.copy_(p.data)
    x = torch.randn(5, I)
    assert close(mine(x), theirs(x), 1e-5) and not close(mine(x), base_of(mine, x), 1e-2)


def base_of(model, x):
    with lorakit.disabled(model):
        return model(x)


# (IA)³


def test_ia3_scales_rows_or_columns():
    for m, shape in ((IA3(), [O, 1]), (IA3("in"), [1, I])):
        p, W = made(m)
        assert list(p["l"].shape) == shape
        l, now = p["l"].flatten(), m.weight(p, W)
        for a in range(O):
            for b in range(I):
                assert float(now[a, b]) == pytest.approx(float(W[a, b] * l[a if m.side == "out" else b]))
        c = torch.randn(O, dtype=torch.float64)
        assert close(m.bias(p, c), c * l if m.side == "out" else c) and m.bias(p, None) is None


def test_a_constant_gain_scales_the_output():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(I, O)), torch.randn(5, I)
    want = model(x)
    lorakit.adapt(model, "ia3", targets=["0"])
    assert torch.equal(model(x), want)
    next(p for p in model.parameters() if p.requires_grad).data.fill_(3.0)
    assert close(model(x), 3 * want, 1e-5)


def test_the_recipe_scales_the_input_where_the_mlp_ends():
    plan = compose("ia3").plan(tiny.llama())
    assert {p.rpartition(".")[2]: m.side for p, m in plan.items()} == {"k_proj": "out", "v_proj": "out", "down_proj": "in"} and len(plan) == 6
    assert {p.rpartition(".")[2]: m.side for p, m in compose("ia3", heads=False).plan(tiny.bert()).items()} == {"key": "out", "value": "out", "dense": "in"}
    assert {p.split(".", 3)[-1]: m.side for p, m in compose("ia3").plan(tiny.gpt2()).items()} == {"attn.c_attn": "out", "mlp.c_proj": "in"}
    named = compose("ia3", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]).plan(tiny.llama())
    assert {p.rpartition(".")[2]: m.side for p, m in named.items()} == {"k_proj": "out", "up_proj": "in"}
    none = compose("ia3", target_modules=["down_proj"], feedforward_modules=[]).plan(tiny.llama())
    assert {m.side for m in none.values()} == {"out"}


# A field that differs by target


def test_any_field_may_differ_by_target(tmp_path):
    spec = Spec(OFT(4), ("q_proj", "k_proj", "embed_tokens"), patterns={"side": {"k_proj": "out"}, "block_size": {r"layers\.0\..*": 2, "?nothing": 8}})
    model = tiny.llama()
    plan = spec.plan(model)
    assert plan["model.embed_tokens"].side == plan["model.layers.1.self_attn.k_proj"].side == "out"
    assert plan["model.layers.0.self_attn.q_proj"] == OFT(2)
    assert plan["model.layers.1.self_attn.q_proj"] == OFT(4)
    assert Spec.from_dict(spec.to_dict()) == spec
    lorakit.adapt(model, spec)
    ids = torch.arange(6)[None]
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    lorakit.save(model, tmp_path)
    again = tiny.llama()
    lorakit.load(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(LorakitError, match="patterns of side: no target matches `embed_token`"):
        Spec(OFT(4), ("q_proj",), patterns={"side": {"embed_token": "out"}}).plan(model)
    with pytest.raises(LorakitError, match="no field `sides`"):
        Spec(OFT(4), patterns={"sides": {"q_proj": "out"}})


# Singular values


@pytest.mark.parametrize("shape", [(O, I), (I, O), (8, 1)])
@pytest.mark.parametrize("relu", [True, False])
def test_svdiff_shifts_the_singular_values(shape, relu):
    m = SVDiff(0.7, relu)
    p, W = made(m, *shape, noise=2.0)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    want = S + 0.7 * p["shift"]
    if relu:
        want = torch.where(want > 0, want, torch.zeros_like(want))
    assert close(m.weight(p, W), U @ torch.diag(want) @ Vh, 1e-6)
    assert close(torch.linalg.svdvals(m.weight(p, W)), want.abs().sort(descending=True)[0], 1e-6)
    begun, _ = made(m, *shape, noise=0.0)
    assert torch.equal(m.weight(begun, W), W)


def test_svdiff_writes_the_shift_alone(tmp_path):
    from safetensors.torch import load_file

    model = tiny.llama()
    lorakit.adapt(model, "svdiff", targets=["q_proj"])
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3)
    lorakit.save(model, tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    assert {tuple(t.shape) for t in load_file(file).values()} == {(16,)}
    again, ids = tiny.llama(), torch.arange(6)[None]
    lorakit.load(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("index", [0, 1])
def test_the_additive_spectral_adapter_moves_one_block(index):
    m = Spectral(2, index=index)
    p, W = made(m)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = torch.stack([u[u.abs().argmax()].sign() for u in U.mT])
    U, V = U * sign, (Vh.mT * sign)
    want = torch.zeros_like(W)
    for k in range(O):
        u, v = U[:, k], V[:, k]
        if k // 2 == index:
            u, v = u + p["X"][:, k % 2], v + p["Y"][:, k % 2]
        want += S[k] * torch.outer(u, v)
    assert close(m.weight(p, W), want, 1e-6) and torch.linalg.matrix_rank(m.weight(p, W) - W, atol=1e-6) <= 4
    begun, _ = made(m, noise=0.0)
    assert torch.equal(m.weight(begun, W), W)


@pytest.mark.parametrize("r, gains", [(2, False), (3, True), (1, True)])
def test_the_rotational_spectral_adapter_turns_one_block(r, gains):
    m = Spectral(r, "rotation", gains)
    p, W = made(m)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = torch.stack([u[u.abs().argmax()].sign() for u in U.mT])
    U, Vh = U * sign, Vh * sign[:, None]
    Ru, Rv = (cayley_slow((p[k] - p[k].mT) / 2) if r > 1 else torch.ones(1, 1).double() for k in ("Zu", "Zv"))
    top = S[:r] + (p["c"] if gains else 0)
    want = U[:, :r] @ Ru @ torch.diag(top) @ (Vh[:r].mT @ Rv).mT + U[:, r:] @ torch.diag(S[r:]) @ Vh[r:]
    now = m.weight(p, W)
    assert close(now, want, 1e-6) and not close(now, W, 1e-2)
    if not gains:
        assert close(torch.linalg.svdvals(now), S, 1e-6)
    begun, _ = made(m, noise=0.0)
    assert torch.equal(m.weight(begun, W), W)


def test_adapters_on_different_columns_add_up():
    a, b = Spectral(2), Spectral(2, index=1)
    (p, W), (q, _) = made(a), made(b)
    U = [t["U"] + t["X"] for t in (p, q)]
    both = W + (a.weight(p, W) - W) + (b.weight(q, W) - W)
    rest = W - sum(t["U"] * t["S"] @ t["V"].mT for t in (p, q))
    assert close(both, rest + sum(u * t["S"] @ (t["V"] + t["Y"]).mT for u, t in zip(U, (p, q), strict=True)))


def test_spectral_says_how_many_directions_there_are():
    with pytest.raises(LorakitError, match="has 6 singular directions, not the 8"):
        lorakit.adapt(nn.Sequential(nn.Linear(I, O)), Spectral(4, index=1), targets=["0"])
    with pytest.raises(LorakitError, match="single direction cannot turn"):
        Spectral(1, "rotation")


# Norms


@pytest.mark.parametrize("make, count", [(tiny.llama, 5 * 16), (tiny.gpt2, 5 * 32), (tiny.bert, 5 * 32 + 3 * 17), (tiny.t5, None)])
def test_ln_tuning_trains_every_norm_and_nothing_else(make, count, tmp_path):
    model = make()
    lorakit.adapt(model, "ln-tuning")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("norm" in n.lower() or "ln_" in n or "classifier" in n for n in names)
    assert count is None or sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    kw = {"input_ids": torch.arange(6)[None]} | ({"decoder_input_ids": torch.arange(4)[None]} if make is tiny.t5 else {})
    want = make()(**kw).logits
    assert close(model(**kw).logits, want, 1e-6)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    assert not close(model(**kw).logits, want, 1e-2)
    lorakit.save(model, tmp_path)
    again = make()
    lorakit.load(again, tmp_path)
    assert torch.equal(again(**kw).logits, model(**kw).logits)
    lorakit.detach(model)
    assert close(model(**kw).logits, want, 1e-6)


def test_a_model_without_norms_says_so():
    with pytest.raises(LorakitError, match="has no normalisation layers"):
        lorakit.adapt(nn.Sequential(nn.Linear(3, 3)), "ln-tuning")


def test_the_smallest_sizes_train():
    """One number, or two, per layer: an adapter of a few dozen bytes still moves the loss."""
    ids = torch.arange(8)[None]
    for m in (OFT(2, block_share=True), OFT(2), BOFT(2), HRA(2), HRA(1, begin="random"), Spectral(1), Spectral(1, "rotation", True), SVDiff(), IA3()):
        model = tiny.llama()
        lorakit.adapt(model, m, targets=["down_proj"])
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
        loss = []
        for _ in range(5):
            loss.append(float(model(ids, labels=ids).loss.detach()))
            opt.zero_grad()
            model(ids, labels=ids).loss.backward()
            opt.step()
        assert loss[-1] < loss[0], m


def test_laws_follow_the_fields():
    assert "orthogonal" in OFT(4).laws and "orthogonal" not in OFT(4, series=5).laws
    assert "row_gain" in IA3().laws and "row_gain" not in IA3("in").laws
    with pytest.raises(LorakitError, match="magnitude around ia3"):
        METHODS["magnitude"](IA3())
    with pytest.raises(LorakitError, match="magnitude around boft"):
        METHODS["magnitude"](BOFT())
    assert METHODS["magnitude"](IA3("in"))


@pytest.mark.parametrize("name", ["oft", "boft", "hra", "svdiff", "spectral-adapter", "ia3"])
def test_a_head_that_is_tied_to_an_embedding_follows(name):
    model, ids = tiny.llama(tied=True), torch.arange(6)[None]
    lorakit.adapt(model, name, targets=["embed_tokens"], tie=True)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn_like(p))
    y = model(ids).logits
    table = model.model.embed_tokens(torch.arange(tiny.VOCAB)).detach()
    plain = tiny.llama(tied=True)
    plain.model.embed_tokens.weight.data.copy_(table)
    assert close(y, plain(ids).logits, 1e-4) and not close(y, tiny.llama(tied=True)(ids).logits, 1e-2)


@pytest.mark.parametrize("method", [OFT(r=3), OFT(5, side="out"), BOFT(2, factors=2), BOFT(r=3), HRA(4), IA3("in"), IA3()])
def test_the_shapes_in_a_file_tell_the_sizes(method):
    shapes = {k: tuple(s) for k, s in method.shapes(O, I).items()}
    plain = type(method)(side="out" if isinstance(method, IA3) else method.side)
    assert plain.from_file(shapes).shapes(O, I) == method.shapes(O, I)
