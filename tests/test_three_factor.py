"""Three-factor and sparse methods against slow transcriptions of their papers' formulas, their starts, and what each of them claims."""

import itertools
import math

import pytest
import torch
from torch import nn

from lorakit import api, host
from lorakit.errors import LorakitError
from lorakit.method import Origin
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.aflora import AFLoRA
from lorakit.methods.diff_pruning import DiffPruning
from lorakit.methods.flora import FLoRA
from lorakit.methods.lora_xs import LoRAXS
from lorakit.methods.low_rank_sparse import LowRankSparse
from lorakit.methods.melora import MELoRA
from lorakit.methods.sora import SoRA
from lorakit.methods.sparse_lora import SparseLoRA
from lorakit.methods.trilora import TriLoRA
from lorakit.recipes import RECIPES, compose
from lorakit.testing import CHECKS, check_method

O, I = 8, 12
ROWS = ("trilora", "asymmetric-lora-core", "adalora", "sora", "aflora", "lora-xs", "flora", "melora", "sparse-adapter", "large-sparse", "roselora",
        "structured-lora", "diff-pruning")
OTHER = torch.randn(O, I, generator=torch.Generator().manual_seed(9))


def begun(method, o=O, i=I, noise=0.0, seed=1):
    """The leaves at their start, those that train moved by noise; and the base."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(o, i, generator=g)
    p = method.start(o, i, Origin(lambda: W), g)
    method.derive(p, lambda: W)
    method.settle(p, lambda: W)
    return {k: t + noise * torch.randn(t.shape, generator=g) if method.leaves[k].trains else t for k, t in p.items()}, W


def delta(method, p, W):
    return method.weight(p, W) - W


def near(a, b, tol=1e-5):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape and float((a - b).norm()) <= tol * max(1.0, float(b.norm())), float((a - b).norm())


def triple(B, M, A, s):
    """s B M A in loops; M a vector or a matrix."""
    o, r, i = B.shape[0], B.shape[1], A.shape[1]
    M = torch.diag(M) if M.dim() == 1 else M
    out = torch.zeros(o, i)
    for a, b, k, j in itertools.product(range(o), range(i), range(r), range(r)):
        out[a, b] += s * B[a, k] * M[k, j] * A[j, b]
    return out


@pytest.mark.parametrize("r", [1, 2, 4])
def test_products_with_a_core_are_the_formulas(r):
    m = TriLoRA(r, 3.0)
    p, W = begun(m, noise=0.3)
    near(delta(m, p, W), triple(p["B"], p["M"], p["A"], 3.0 / r))
    m = TriLoRA(r, 3.0, "rslora", "matrix", "identity")
    p, W = begun(m, noise=0.3)
    near(delta(m, p, W), triple(p["B"], p["M"], p["A"], 3.0 / math.sqrt(r)))
    m = AdaLoRA(r, 5.0)
    p, W = begun(m, noise=0.3)
    near(delta(m, p, W), triple(p["P"], p["E"][:, 0], p["Q"], 5.0 / (r + 1e-5)))
    near(delta(AdaLoRA(r, -5.0), p, W), triple(p["P"], p["E"][:, 0], p["Q"], 1.0), 1e-4)
    m = SoRA(r, 5.0)
    p, W = begun(m, noise=0.3)
    near(delta(m, p, W), triple(p["B"], p["g"][0], p["A"], 5.0 / r))
    m = AFLoRA(r, 0.2)
    p, W = begun(m, noise=0.3)
    near(delta(m, p, W), torch.diag(p["b"]) @ triple(p["B"], p["d"], p["A"], 1.0))
    m = LoRAXS(r, 5.0)
    p, W = begun(m, noise=0.3)
    near(delta(m, p, W), triple(p["B"], p["R"], p["A"], 5.0 / r))


def test_a_zero_core_moves_alone_and_starts_are_the_papers():
    m = TriLoRA(4)
    p, W = begun(m)
    assert not p["M"].any() and p["A"].abs().max() <= I ** -0.5 and 0 < p["B"].abs().max() <= 4 ** -0.5
    p = {k: v.requires_grad_() for k, v in p.items()}
    (m.weight(p, W) * OTHER).sum().backward()
    assert p["M"].grad.any() and not p["A"].grad.any() and not p["B"].grad.any()
    p, _ = begun(TriLoRA(4, middle="matrix", begin="identity"))
    assert torch.equal(p["M"], torch.eye(4)) and not p["B"].any() and p["A"].any()
    p, _ = begun(AdaLoRA(64), 400, 500)
    assert abs(p["Q"].std() - 0.02) < 1e-3 and abs(p["P"].std() - 0.02) < 1e-3 and not p["E"].any() and p["E"].shape == (64, 1)
    p, _ = begun(SoRA(500))
    assert p["g"].shape == (1, 500) and abs(p["g"].std() - 1) < 0.1 and not p["B"].any()
    p, _ = begun(AFLoRA(5), 300, 200)
    assert abs(p["A"].abs().max() - (6 / 200) ** 0.5) < 1e-2 and abs(p["B"].abs().max() - (6 / 5) ** 0.5) < 1e-2
    assert (p["d"] == 0.1).all() and not p["b"].any()
    p, _ = begun(FLoRA(8), 400, 300)
    assert abs(p["U"].std() - 0.25) < 0.01 and abs(p["V"].std() - 0.25) < 0.01 and not p["G"].any()


def test_adalora_is_pefts_live_and_its_penalty():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(I, O))
    theirs = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0"], init_r=3, target_r=2, lora_alpha=5, total_step=10))
    layer = theirs.base_model.model[0]
    m = AdaLoRA(3, 5.0)
    p, W = begun(m, noise=0.5)
    with torch.no_grad():
        for k, leaf in m.leaves.items():
            getattr(layer, leaf.key)["default"].copy_(p[k])
    x = torch.randn(4, I)
    near(theirs.eval()(x) - layer.base_layer(x), x @ delta(m, p, W).mT)
    P, Q = p["P"], p["Q"]
    near(m.penalty(p), (torch.dist(P.mT @ P, torch.eye(3)) + torch.dist(Q @ Q.mT, torch.eye(3))) / 2)
    q = {k: v.clone() for k, v in p.items()}
    q["E"][1] = 0
    near(delta(m, q, W), delta(m, {k: v[:, ::2] if k == "P" else v[::2] for k, v in q.items()}, W))  # a pruned triplet can go, r stays in the scale


def test_a_closed_gate_of_sora_can_be_cut_off_and_can_open():
    m = SoRA(4, 4.0)
    p, W = begun(m, noise=0.3)
    p["g"][0, 2] = 0
    kept = [0, 1, 3]
    cut = {"A": p["A"][kept] * p["g"][0, kept, None], "B": p["B"][:, kept]}
    near(delta(m, p, W), cut["B"] @ cut["A"])
    p = {k: v.requires_grad_() for k, v in p.items()}
    (m.weight(p, W) * OTHER).sum().backward()
    assert p["g"].grad[0, 2] != 0 and not p["B"].grad[:, 2].any()
    near(p["g"].grad[0], torch.diagonal(p["B"].mT @ OTHER @ p["A"].mT))


def test_the_core_row_of_asymmetric_lora():
    model = api.adapt(nn.Sequential(nn.Linear(I, O)), compose("asymmetric-lora-core", targets=["0"], r=3))
    [slot] = host.slots(model).values()
    p = slot.params(next(iter(slot.methods)))
    near(p["A"] @ p["A"].mT, torch.eye(3))
    assert [k for k, v in p.items() if v.requires_grad] == ["B", "M"]


def test_lora_xs_stays_between_singular_vectors():
    m = LoRAXS(3, 6.0)
    p, W = begun(m)
    assert m.trainable(O, I) == m.trainable(80, 70) == 9
    assert 0 < delta(m, p, W).norm() < 1e-2 and p["R"].abs().max() < 1e-4
    U, S, Vh = torch.linalg.svd(W)
    near(p["B"].abs(), U[:, :3].abs())
    near(p["A"].abs(), (S[:3, None] * Vh[:3]).abs())
    near(p["B"] @ p["A"], U[:, :3] @ torch.diag(S[:3]) @ Vh[:3])
    p, W = begun(m, noise=0.5)
    D = delta(m, p, W)
    near(U[:, :3] @ U[:, :3].mT @ D @ Vh[:3].mT @ Vh[:3], D)
    again, _ = begun(LoRAXS(3, 6.0, False))
    assert torch.equal(again["A"], p["A"]) and torch.equal(again["B"], p["B"])
    assert [k for k, leaf in LoRAXS(3, 6.0, False).leaves.items() if leaf.derived] == ["A", "B"] and not any(leaf.derived for leaf in m.leaves.values())
    with pytest.raises(LorakitError, match="singular directions"):
        api.adapt(nn.Sequential(nn.Linear(I, O)), compose("lora-xs", targets=["0"], r=9))


@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)])
@pytest.mark.parametrize("r", [1, 2])
def test_flora_is_the_tucker_product_of_every_mode(kernel, r):
    m = FLoRA(r, 3, 2, 0.7, kernel=kernel)
    c = 4
    p, W = begun(m, O, c * math.prod(kernel), noise=0.5)
    want = torch.zeros(c, O, *kernel)  # modes (in, out, kernel …), as the authors index them
    K = [p[f"K{n}"] for n in range(1, len(kernel) + 1)]
    for core in itertools.product(*(range(n) for n in p["G"].shape)):
        for at in itertools.product(*(range(n) for n in want.shape)):
            value = p["G"][core] * p["V"][at[0], core[0]] * p["U"][at[1], core[1]]
            for n, F in enumerate(K, 2):
                value = value * F[at[n], core[n]]
            want[at] += 0.7 * value
    D = delta(m, p, W)
    near(D, want.transpose(0, 1).flatten(1))
    T = D.view(O, c, *kernel)
    ranks = [torch.linalg.matrix_rank(T.movedim(n, 0).flatten(1), rtol=1e-4) for n in range(T.dim())]
    assert all(a <= b for a, b in zip(ranks, [r, 3, 2, 2], strict=False))
    assert m.trainable(O, c * math.prod(kernel)) == p["G"].numel() + O * r + c * 3 + sum(2 * n for n in kernel)


@pytest.mark.parametrize(("kernel", "layers"), [((3,), ["conv1d", "conv2d-wide"]), ((3, 3), ["conv2d-groups"]), ((2, 2, 2), ["conv3d"])])
def test_flora_with_a_kernel_conforms(kernel, layers):
    assert check_method(FLoRA(2, 3, 1, 0.8, kernel=kernel), layers, ["float32"], [c for c in CHECKS if c != "compile"]) > 20


def test_flora_takes_each_layers_kernel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, (1, 5)), nn.Conv2d(4, 2, 1))
    spec = compose("flora", r=2, targets=["0", "1", "2"])
    x = torch.randn(2, 3, 12, 12)
    y = model(x)
    model = api.adapt(model, spec)
    near(model(x), y)
    assert [s.methods[a].kernel for s in host.slots(model).values() for a in s.methods] == [(3, 3), (5,), ()]
    with pytest.raises(LorakitError, match="does not fit"):
        api.adapt(nn.Sequential(nn.Conv2d(3, 4, 3)), compose("flora", targets=["0"], kernel=(5, 5)))


@pytest.mark.parametrize(("r", "n"), [(1, 4), (2, 2), (1, 1)])
def test_melora_is_block_diagonal_of_full_rank(r, n):
    m = MELoRA(r, 3.0, n)
    p, W = begun(m, noise=0.5)
    want = torch.block_diag(*(3.0 / r * p["B"][k] @ p["A"][k] for k in range(n)))
    D = delta(m, p, W)
    near(D, want)
    off = torch.block_diag(*(torch.ones(O // n, I // n) for _ in range(n))) == 0
    assert not D[off].any() and torch.linalg.matrix_rank(D) == n * r and m.trainable(O, I) == r * (O + I)
    p, _ = begun(m)
    assert p["A"].abs().max() <= (n / I) ** 0.5 and not p["B"].any()


def test_melora_says_where_it_does_not_fit():
    for layer, n in ((nn.Linear(I, O), 3), (nn.Linear(I, O), 8), (nn.Conv1d(4, 9, 3), 3)):
        with pytest.raises(LorakitError, match="divides both"):
            api.adapt(nn.Sequential(layer), compose("melora", targets=["0"], n=n))


def test_masks_of_sparse_lora_keep_their_part_and_stop_effect_and_gradient():
    p, W = begun(SparseLoRA(4))
    assert p["MA"].all() and p["MB"].all() and not p["B"].any()
    m = SparseLoRA(4, 6.0, 0.3)
    p, W = begun(m, noise=0.5)
    assert int(p["MA"].sum()) == 48 - 33 and int(p["MB"].sum()) == 32 - 22 and set(p["MA"].unique().tolist()) == {0.0, 1.0}
    want = torch.zeros(O, I)
    for a, b, k in itertools.product(range(O), range(I), range(4)):
        if p["MB"][a, k] and p["MA"][k, b]:
            want[a, b] += 1.5 * p["B"][a, k] * p["A"][k, b]
    near(delta(m, p, W), want)
    p["A"].requires_grad_()
    (m.weight(p, W) * OTHER).sum().backward()
    assert not p["A"].grad[p["MA"] == 0].any() and p["A"].grad[p["MA"] == 1].any()
    assert begun(SparseLoRA(1, keep=0.01), 3, 5)[0]["MB"].sum() == 1
    with pytest.raises(LorakitError, match="above 0"):
        SparseLoRA(keep=0.0)


def test_structured_lora_is_low_rank_plus_a_few_entries():
    m = LowRankSparse(2, 3.0, 0.1)
    p, W = begun(m, noise=0.5)
    want = 1.5 * p["B"] @ p["A"]
    for v, (a, b) in zip(p["v"], p["at"].mT.long().tolist(), strict=True):
        want[a, b] += v
    near(delta(m, p, W), want)
    assert p["at"].shape == (2, 10) and len(set(map(tuple, p["at"].mT.tolist()))) == 10
    q = p | {"B": torch.zeros_like(p["B"])}
    assert int((delta(m, q, W).abs() > 1e-6).sum()) == 10
    assert not torch.equal(p["at"], begun(m, seed=2)[0]["at"]) and torch.equal(p["at"], begun(m)[0]["at"])
    everywhere = begun(LowRankSparse(1, density=1.0))[0]["at"]
    assert len(set(map(tuple, everywhere.mT.tolist()))) == O * I
    big = begun(LowRankSparse(1, density=1e-5), 5000, 5000)[0]["at"]  # more entries than float32 has whole numbers
    assert big.max() < 5000 and len(set(map(tuple, big.mT.tolist()))) == 250
    with pytest.raises(LorakitError, match="do not survive"):
        m.weight({k: v.bfloat16() for k, v in p.items()}, W)


def hard_concrete(a, u, low=-1.5, high=1.5):
    """One entry, as the paper has it."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a)))
    return min(1.0, max(0.0, s * (high - low) + low))


def test_diff_pruning_samples_its_gates_in_training_only():
    m = DiffPruning()
    p, W = begun(m)
    assert torch.equal(m.weight(p, W), W) and (p["a"] == 5).all() and p["g"].tolist() == [5.0]
    p = {"w": torch.randn(O, I), "a": torch.randn(O, I), "g": torch.tensor([0.8])}
    want = torch.tensor([[hard_concrete(float(p["a"][a, b]), 0.5) * float(p["w"][a, b]) for b in range(I)] for a in range(O)])
    near(delta(m, p, W), want * hard_concrete(0.8, 0.5))
    torch.manual_seed(1)
    u, v = (torch.rand(s) * (1 - 2e-4) + 1e-4 for s in ((O, I), (1,)))
    want = torch.tensor([[hard_concrete(float(p["a"][a, b]), float(u[a, b])) * float(p["w"][a, b]) for b in range(I)] for a in range(O)])
    assert 0.2 < hard_concrete(0.8, float(v)) < 1
    model = api.adapt(nn.Sequential(nn.Linear(I, O)), compose("diff-pruning", targets=["0"]))
    [slot] = host.slots(model).values()
    x = torch.eye(I)
    with torch.no_grad():
        for k, t in slot.params(next(iter(slot.methods))).items():
            t.copy_(p[k])
        torch.manual_seed(1)
        moved = model.train()(x)
        with api.disabled(model):
            base = model(x)
        near((moved - base).mT, want * hard_concrete(0.8, float(v)))
        assert not torch.equal(model(x), moved)
        near((model.eval()(x) - base).mT, delta(m, p, W))


def test_diff_pruning_counts_and_fixed_masks():
    m = DiffPruning()
    p = {"w": torch.randn(O, I), "a": torch.randn(O, I), "g": torch.tensor([0.3])}
    near(m.penalty(p), torch.cat([p["a"].flatten(), p["g"]]).sigmoid().sum())
    skew = DiffPruning(0.0, -0.5, 1.5, False)
    a = torch.full((400, 500), 0.4)  # the expected number of open gates, counted
    near(skew.penalty({"a": a}) / a.numel(), (skew.gate(a, True) > 0).float().mean(), 0.01)
    kept = torch.rand(O, I) < 0.2
    p |= {"a": torch.where(kept, 30.0, -30.0), "g": torch.tensor([30.0])}
    for sampled in (False, True):
        assert torch.equal(m.change(p, sampled), p["w"] * kept)


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_at_the_lowest_ranks(row, r):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, O), nn.Conv2d(4, 4, 3), nn.Embedding(10, 4))
    options = {"r": r} if row != "diff-pruning" else {"logit": 0.5}
    model = api.adapt(model, compose(row, targets=["0", "1", "2"], **options))
    inputs = torch.randn(5, I), torch.randn(5, 4, 6, 6), torch.arange(10)
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(6):
        opt.zero_grad()
        loss = sum((layer(x) - 1).square().mean() for layer, x in zip(model, inputs, strict=True))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and RECIPES[row].title
