"""Every merge rule against a dense transcription of its equation; PEFT's own combinations against PEFT."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.merges import ROWS
from lorakit.merges.base import At, Vector, build, cosines, gram, project
from lorakit.merges.select import Cuts, kth_largest
from lorakit.merges.spaces import SPACES

O, I = 12, 18
W = (0.6, 0.4, -0.3)


def factors(ranks=(2, 4, 3), seed=0, o=O, i=I):
    g = torch.Generator().manual_seed(seed)
    return [Vector((torch.randn(o, r, generator=g), torch.randn(r, i, generator=g))) for r in ranks]


def run(rule, vectors, weights, gen=None, whole=None, stats=(), **options):
    return build(rule, ROWS, options).merge(vectors, weights, At("x", gen, whole, stats))


def gen():
    return host.generator(3, "x")


def masks(tensors, keep):
    """The drops that a rule makes with this generator, in its order."""
    g = gen()
    return [torch.bernoulli(k if isinstance(k, torch.Tensor) else torch.full_like(t, k), generator=g) for t, k in zip(tensors, keep, strict=True)]


def top(t, density):
    k = int(density * t.numel())
    out = torch.zeros_like(t).reshape(-1)
    at = t.reshape(-1).abs().argsort(descending=True)[:k]
    out[at] = t.reshape(-1)[at]
    return out.reshape(t.shape)


def ties(tensors, weights, scale=1.0):
    """Number by number, as the equation is written."""
    out = torch.zeros_like(tensors[0])
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            values = [(w * float(t[o, i]), abs(w)) for t, w in zip(tensors, weights, strict=True)]
            sign = math.copysign(1, s) if (s := sum(v for v, _ in values)) else 0
            some = [(v, w) for v, w in values if v and math.copysign(1, v) == sign]
            out[o, i] = scale * sum(v for v, _ in some) / sum(w for _, w in some) if some else 0
    return out


def same(a, b, limit=1e-5):
    a = a.dense() if isinstance(a, Vector) else a
    assert a.shape == b.shape and float((a - b).norm()) <= limit * float(b.norm()), float((a - b).norm() / b.norm())


# In the factors


def test_sums_stay_in_the_factors_and_are_exact():
    v = factors()
    want = sum(w * t.dense() for t, w in zip(v, W, strict=True))
    for name in ("linear", "task-arithmetic", "cat", "svd", "peft-svd", "peft-cat"):
        out = run(name, v, W)
        assert out.rank == 9
        same(out, want)
    same(run("linear", v, (3.0, 2.0, 1.0), normalize=True), sum(w * t.dense() for t, w in zip(v, (3 / 6, 2 / 6, 1 / 6), strict=True)))


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("rank", [1, 3, 9, 40])
def test_the_nearest_of_a_rank_is_the_dense_one_and_no_dense_matrix_is_made(rank):
    v = factors(o=60, i=50)
    dense = sum(w * t.dense().double() for t, w in zip(v, W, strict=True))
    U, S, V = torch.linalg.svd(dense, full_matrices=False)
    with Shapes() as shapes:
        B, A, left, whole = project(run("svd", v, W), rank)
        gram(v)
    assert not [s for s in shapes.seen if len(s) >= 2 and max(s) >= 50 and s[0] * s[1] >= 50 * 50], shapes.seen
    k = min(rank, 9)
    assert A.shape[0] == k
    same(B.double() @ A.double(), (U[:, :k] * S[:k]) @ V[:k])
    assert left == pytest.approx(float(S[k:].norm()), abs=1e-5 * float(S.norm())) and whole == pytest.approx(float(S.norm()))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (7, 7), (3, 20, 30)])
@pytest.mark.parametrize("rank", [1, 5, None])
def test_a_matrix_is_projected_to_the_nearest(shape, rank):
    D = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    B, A, left, whole = project(Vector(matrix=D), rank)
    U, S, V = torch.linalg.svd(D.double(), full_matrices=False)
    q = rank or min(shape[-2:])
    assert A.shape[-2] == q
    same(B @ A, ((U[..., :q] * S[..., None, :q]) @ V[..., :q, :]).float())
    assert left == pytest.approx(float((D - B @ A).norm()), abs=1e-4) and whole == pytest.approx(float(D.norm()))


@pytest.mark.parametrize("shape", [(60, 80), (2, 60, 80)])
def test_subspace_iteration_is_nearly_the_nearest_and_says_its_own_error(shape):
    g = torch.Generator().manual_seed(2)
    vectors = [Vector((torch.randn(*shape[:-1], 4, generator=g), torch.randn(*shape[:-2], 4, shape[-1], generator=g))) for _ in range(2)]
    D = run("ties", vectors, (1.0, 1.0), density=0.3).matrix
    least, whole = project(Vector(matrix=D), 4)[2:]
    for niter, more, limit in ((3, 8, 1.001), (1, 1, 1.2)):
        B, A, left, size = project(Vector(matrix=D), 4, niter, more)
        assert A.shape[-2] == 4 and left == pytest.approx(float((D - B @ A).norm()), rel=1e-4) and size == pytest.approx(whole, rel=1e-5)
        assert least * 0.9999 <= left <= least * limit, niter
    assert left > least * 1.001  # with no room and one round it is not the nearest
    B, A, *_ = project(Vector(matrix=D), 4, 2, 100)  # as many directions as there are: the exact way
    assert torch.equal(B @ A, torch.matmul(*project(Vector(matrix=D), 4)[:2]))


def test_inner_products_and_cosines_come_from_the_factors():
    v = [*factors(), Vector(matrix=torch.randn(O, I)), Vector.zero((O, I))]
    want = torch.tensor([[float((a.dense().double() * b.dense().double()).sum()) for b in v] for a in v])
    assert torch.allclose(gram(v).float(), want, rtol=1e-4, atol=1e-4)
    flat = torch.stack([a.dense().reshape(-1) for a in v[:4]])
    assert torch.allclose(cosines(gram(v))[:4, :4].float(), torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1), atol=1e-5)
    assert float(cosines(gram(v))[4].abs().sum()) == 0


def test_slerp():
    v, w = factors()[:2], (0.7, 0.3)
    a, b = (x.dense().double() for x in v)
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    t = 0.3
    want = torch.sin((1 - t) * angle) / torch.sin(angle) * a + torch.sin(t * angle) / torch.sin(angle) * b
    same(run("slerp", v, w).dense().double(), want)
    parallel = [v[0], Vector((v[0].factors[0] * 2, v[0].factors[1]))]
    same(run("slerp", parallel, (1.0, 1.0)), v[0].dense() * 1.5)
    other = factors(seed=9)[:2]
    whole = build("slerp", ROWS, {"scope": "global"}).survey(lambda: [("x", v), ("y", other)], 2)
    a, b = (torch.cat([x.dense().double(), y.dense().double()]) for x, y in zip(v, other, strict=True))
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    want = torch.sin((1 - t) * angle) / torch.sin(angle) * a[:O] + torch.sin(t * angle) / torch.sin(angle) * b[:O]
    same(run("slerp", v, w, whole=whole, scope="global").dense().double(), want)


def test_model_stock():
    base = factors((3,))[0].dense()
    v = [Vector(matrix=base + 0.7 * t.dense()) for t in factors(seed=4)]
    T = [x.dense().double() for x in v]
    cos = sum(float((a * b).sum() / (a.norm() * b.norm())) for n, a in enumerate(T) for b in T[:n]) / 3
    assert 0.05 < cos < 0.95
    same(run("model-stock", v, (1.0, 1.0, 1.0)).dense().double(), 3 * cos / (1 + 2 * cos) * sum(T) / 3)


def test_byom_shrinks_each():
    v = factors((4, 2))
    def low(t, q):
        U, S, V = torch.linalg.svd(t, full_matrices=False)
        return (U[:, :q] * S[:q]) @ V[:q]

    same(run("byom", v, (0.5, 1.5)), 0.5 * low(v[0].dense(), 2) + 1.5 * low(v[1].dense(), 1))
    same(run("byom", v, (0.5, 1.5), shrunk=3), 0.5 * low(v[0].dense(), 3) + 1.5 * v[1].dense())


# Number by number


def test_magnitude_prune_and_breadcrumbs():
    v = factors()
    T = [t.dense() for t in v]
    same(run("magnitude-prune", v, W, density=0.3), sum(w * top(t, 0.3) for t, w in zip(T, W, strict=True)))
    band = [top(t, 0.4) - top(t, 0.1) for t in T]
    same(run("breadcrumbs", v, W, density=0.3, gamma=0.1), sum(w * t for t, w in zip(band, W, strict=True)))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), W])
def test_ties(weights):
    v = factors()
    T = [top(t.dense(), 0.4) for t in v]
    same(run("ties", v, weights, density=0.4, scale=1.3), ties(T, weights, 1.3))


def test_ties_of_copies_is_the_copy_and_of_one_the_trimmed_one():
    v = factors((3,))
    same(run("ties", v * 3, (1.0, 1.0, 1.0), density=1.0), v[0].dense())
    same(run("ties", v, (1.0,), density=0.5), top(v[0].dense(), 0.5))


def test_ties_by_count():
    T = [torch.tensor([[5.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([[-1.0, 1.0]])]
    v = [Vector(matrix=t) for t in T]
    assert run("ties", v, (1.0,) * 3, density=1.0, sign="count").dense().tolist() == [[-1.0, 1.0]]
    assert run("ties", v, (1.0,) * 3, density=1.0).dense().tolist() == [[5.0, 1.0]]


def test_dare():
    v = factors()
    T = [t.dense() for t in v]
    D = [m * t / 0.4 for m, t in zip(masks(T, [0.4] * 3), T, strict=True)]
    assert 0.2 < float((D[0] != 0).float().mean()) < 0.6
    same(run("dare-linear", v, W, gen(), density=0.4), sum(w * t for t, w in zip(D, W, strict=True)))
    same(run("dare-ties", v, W, gen(), density=0.4, scale=0.5), ties(D, W, 0.5))
    same(run("dare", v, W, gen(), density=1.0), sum(w * t for t, w in zip(T, W, strict=True)))


def test_della():
    v, n, density, epsilon = factors(), I, 0.5, 0.3
    T, keep = [t.dense() for t in v], []
    for t in T:
        p = torch.zeros_like(t)
        for o in range(O):
            for k, j in enumerate(sorted(range(n), key=lambda j, row=t[o]: -abs(float(row[j])))):
                p[o, j] = (1 - density) - epsilon / 2 + epsilon / n * k
        keep.append(1 - p)
    D = [m * t / k for m, t, k in zip(masks(T, keep), T, keep, strict=True)]
    same(run("della", v, W, gen(), density=density, epsilon=epsilon), ties(D, W))


def test_knots():
    """The rule on the coordinates in the basis that all task vectors share, and back."""
    v = factors()
    T = [t.dense().double() for t in v]
    U, S, V = torch.linalg.svd(torch.cat(T, 1), full_matrices=False)
    k = int((S > 1e-5).sum())
    Z = [(S[:k, None] * part).float() for part in V[:k].split(I, 1)]
    for z, t in zip(Z, T, strict=True):
        same((U[:, :k] @ z.double()), t)
    want = U[:, :k].float() @ ties([top(z, 0.4) for z in Z], (1.0, 1.0, 1.0))
    out = run("knots", v, (1.0, 1.0, 1.0), density=0.4)
    assert out.rank == k == 9
    same(out, want)
    same(run("knots", [Vector(matrix=t.float()) for t in T], (1.0, 1.0, 1.0), density=0.4), want, 1e-4)
    same(run("magnitude-prune", v, W, density=1.0, space="knots"), sum(w * t.float() for t, w in zip(T, W, strict=True)))


@pytest.mark.parametrize("space", ["dense", "knots"])
def test_a_threshold_over_all_targets(space):
    every = {"a": factors(), "b": [Vector((2 * v.factors[0], v.factors[1])) for v in factors(seed=5)]}
    rule = build("magnitude-prune", ROWS, {"density": 0.2, "scope": "global", "space": space})
    cuts = rule.survey(lambda: every.items(), 3)
    for n in range(3):
        numbers = torch.cat([SPACES[space](v)[0][n].abs().reshape(-1) for v in every.values()])
        assert cuts[n] == [float(numbers.sort(descending=True).values[int(0.2 * len(numbers)) - 1])]
    out = rule.merge(every["a"], (1.0, 0.0, 0.0), At("a", None, cuts))
    if space == "dense":
        t = every["a"][0].dense()
        same(out, t * (t.abs() >= cuts[0][0]))


def test_the_kth_largest_of_many_pieces_is_that_of_the_whole():
    g = torch.Generator().manual_seed(2)
    pieces = [torch.randn(n, generator=g) * 10.0**k for n, k in ((50, -3), (1, 0), (400, 0), (9, 4))] + [torch.zeros(5), torch.tensor([1.0, -1.0, 1.0])]
    every, shares = torch.cat(pieces), (0.001, 0.01, 0.3, 0.95, 1.0)
    found = Cuts.of(lambda: ([p] for p in pieces), 1, shares)[0].found
    order = every.abs().sort(descending=True).values
    assert found == [math.inf if not (k := int(s * len(every))) else float(order[k - 1]) for s in shares]
    assert found == [kth_largest(every, int(s * len(every))) for s in shares]


# With statistics


def test_fisher():
    v = factors()
    F = [torch.rand(O, I, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    w = (1.0, 2.0, 0.5)
    want = sum(a * f * t.dense() for a, f, t in zip(w, F, v, strict=True)) / sum(a * f for a, f in zip(w, F, strict=True))
    same(run("fisher", v, w, stats=F, floor=0.0), want)
    same(run("fisher", v, (1.0,) * 3, stats=[torch.ones(O, I)] * 3), sum(t.dense() for t in v) / 3)
    same(run("fisher", v, (1.0,) * 3, stats=[torch.ones(O, I), torch.zeros(O, I), torch.zeros(O, I)], floor=0.0), v[0].dense())


@pytest.mark.parametrize("matrix", [False, True])
def test_regmean(matrix):
    """The normal equations hold, and with all off-diagonals the outputs are nearest to those of the sources."""
    v, g = factors(), torch.Generator().manual_seed(1)
    X = [torch.randn(40, I, generator=g, dtype=torch.float64) @ torch.randn(I, I, generator=g, dtype=torch.float64) for _ in v]
    G = [x.T @ x / len(x) for x in X]
    given = [Vector(matrix=t.dense()) for t in v] if matrix else v
    T = [t.dense().double() for t in v]
    out = run("regmean", given, (1.0,) * 3, stats=G, alpha=1.0, ridge=0.0)
    assert matrix or out.rank == 9
    want = sum(t @ G_ for t, G_ in zip(T, G, strict=True)) @ torch.linalg.inv(sum(G))
    same(out.dense().double(), want, 1e-4)

    def loss(D):
        return sum(float((x @ (D - t).T).square().sum()) for x, t in zip(X, T, strict=True))

    assert loss(want) <= min(loss(want + 0.01 * torch.randn(O, I, generator=g, dtype=torch.float64)) for _ in range(5))
    damped = [0.3 * G_ + 0.7 * torch.diag(G_.diagonal()) for G_ in G]
    below = sum(w * G_ for w, G_ in zip((1, 2, 3), damped, strict=True))
    want = sum(w * t @ G_ for w, t, G_ in zip((1, 2, 3), T, damped, strict=True)) @ torch.linalg.inv(below)
    same(run("regmean", given, (1.0, 2.0, 3.0), stats=G, alpha=0.3, ridge=0.0).dense().double(), want, 1e-4)
    same(run("regmean", given, (1.0, 2.0, 3.0), stats=[G[0], None, G[2]]), sum(w * t.float() for w, t in zip((1 / 6, 2 / 6, 3 / 6), T, strict=True)))


# PEFT's own


KINDS = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(0.7, 0.5), (0.7, -0.3)])
def test_peft_under_its_own_names(kind, weights):
    """Against PEFT's layers, with the same random numbers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(I, O)), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    for n in "ab":
        torch.nn.init.normal_(layer.lora_B[n].weight)
    options = {} if kind in ("linear", "cat", "svd") else {"density": 0.6}
    inject = model.base_model.inject_adapter

    def injected(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(5)  # the new adapter's own start draws numbers, too

    model.base_model.inject_adapter = injected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a", "b"], list(weights), "mix", kind, **options, **({"svd_rank": 3} if "svd" in kind else {}))
    want = layer.get_delta_weight("mix").detach()
    v = [Vector((layer.lora_B[n].weight.detach() * layer.scaling[n], layer.lora_A[n].weight.detach()), scale=layer.scaling[n]) for n in "ab"]
    torch.manual_seed(5)
    B, A, *_ = project(run(f"peft-{kind.replace('_', '-')}", v, weights, **options), 3 if "svd" in kind else None)
    same(B @ A, want, 1e-4 if "svd" in kind else 1e-5)


def test_pefts_linear_is_not_the_sum():
    v = factors((3, 3))
    exact, theirs = (run(n, v, (0.7, -0.3)).dense() for n in ("linear", "peft-linear"))
    assert float((exact - theirs).norm() / exact.norm()) > 0.3


# Names and options


def test_what_is_refused():
    def said(text, rule="ties", weights=(1.0, 1.0), **options):
        with pytest.raises(LorakitError, match=text):
            build(rule, ROWS, options).check(weights)

    said("unknown rule `tie`; did you mean .*`ties`", "tie")
    said("unknown rule `zzz`; known are .*slerp", "zzz")
    said("ties has no option `densty`; did you mean `density`", densty=0.2)
    said("ties: density must be above 0 and at most 1, not 0", density=0)
    said("ties: unknown sign `majority`", sign="majority")
    said("ties: unknown space `knot`; did you mean `knots`", space="knot")
    said("slerp goes between two adapters, not 3", "slerp", (1.0, 1.0, 1.0))
    said("slerp: the weights must not be negative", "slerp", (1.0, -1.0))
    said("model-stock needs at least two", "model-stock", (1.0,))
    said("fisher: the weights must not be negative", "fisher", (1.0, -1.0))
    said("linear: the weights sum to 0", "linear", (1.0, -1.0), normalize=True)
    said("della: density ± epsilon/2", "della", density=0.95, epsilon=0.4)
    said("breadcrumbs: gamma must be at least 0 and at most", "breadcrumbs", density=0.9, gamma=0.2)
    said("peft-ties: density is needed", "peft-ties")
    said("byom: shrunk must be at least 1", "byom", shrunk=0)


@pytest.mark.parametrize("name", list(ROWS))
def test_every_rule_has_a_title_a_formula_and_a_file(name):
    cls = ROWS[name][0]
    assert cls.title and cls.formula and len(sys.modules[cls.__module__].__doc__) > 80
