"""Kernels that make one step of several: each equals its slow definition, in values and gradients, and keeps what it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorakit
from lorakit.kernels import spectrum
from lorakit.kernels.beside import LEAST, Thin, beside, beside_slow, merged, takes, thin
from lorakit.kernels.cayley import cayley_series, series_of, skew, turn, turn_slow
from lorakit.kernels.dropout import Dropout
from lorakit.kernels.products import made, through
from lorakit.kernels.spectrum import grown, sparse_spectrum
from lorakit.methods.fourierft import FourierFT, places

D = torch.float64


def numbers(*shape, dtype=D):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def case(bias, e, g, p=0.0, dtype=D):
    """(f, slow, tensors): both as functions of the tensors that train; x (2, 3, 5), o = 4, r = 2."""
    torch.manual_seed(0)
    W = torch.randn(4, 5, dtype=dtype)
    there = {"x": numbers(2, 3, 5, dtype=dtype), "A": numbers(2, 5), "B": numbers(4, 2)}
    there |= {"b": numbers(4, dtype=dtype)} if bias else {}
    there |= {"e": numbers(2)} if e else {}
    there |= {"g": numbers(4)} if g else {}

    def run(f):
        def of(*tensors):
            t = dict(zip(there, tensors, strict=True))
            return f(t["x"], W, t.get("b"), Thin(t["B"], t["A"], t.get("e"), 0.7, p, 5), t.get("g"))

        return of

    return run(beside), run(beside_slow), list(there.values())


def same_gradients(f, slow, tensors, **near):
    target = torch.randn_like(slow(*tensors))
    got, want = (torch.autograd.grad((k(*tensors) * target).sum(), tensors) for k in (f, slow))
    assert all(a.dtype == b.dtype and torch.allclose(a.double(), b.double(), **near) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bias, e, g, p", [*itertools.product((False, True), (False, True), (False, True), (0.0, 0.3))])
def test_the_sum_equals_its_definition(bias, e, g, p):
    f, slow, tensors = case(bias, e, g, p)
    assert torch.allclose(f(*tensors), slow(*tensors))
    same_gradients(f, slow, tensors)
    assert torch.autograd.gradcheck(f, tensors) and torch.autograd.gradgradcheck(f, tensors)
    with torch.no_grad():
        assert torch.equal(f(*tensors), f(*tensors)) and torch.allclose(f(*tensors), slow(*tensors))


def test_the_sum_in_bfloat16_gives_gradients_of_each_ones_dtype():
    f, slow, tensors = case(True, True, True, 0.3, torch.bfloat16)
    assert f(*tensors).dtype == torch.bfloat16 and torch.allclose(f(*tensors), slow(*tensors), atol=0.1)
    same_gradients(f, slow, tensors, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("after", [lambda y: y.relu_(), lambda y: y.view(-1).mul_(2), lambda y: y.transpose(0, 1)[..., :2].tanh_()])
def test_the_gain_learns_the_same_whoever_changes_the_result_in_place(after):
    f, slow, tensors = case(False, False, True)
    same_gradients(lambda *t: after(f(*t)), lambda *t: after(slow(*t)), tensors)


def test_the_gain_learns_the_same_when_a_detached_result_is_changed():
    f, slow, tensors = case(False, False, True)
    y = f(*tensors)
    y.detach().zero_()
    y.sum().backward()
    assert torch.allclose(tensors[-1].grad, torch.autograd.grad(slow(*tensors).sum(), tensors[-1])[0])


def test_a_gain_of_zero_gives_nothing_and_learns():
    f, slow, tensors = case(False, True, True)
    with torch.no_grad():
        tensors[-1][:2] = torch.tensor([0.0, -0.0])
    assert float(f(*tensors)[..., :2].detach().abs().max()) < 100 * LEAST
    same_gradients(f, slow, tensors)


@pytest.mark.parametrize("g", [False, True])
def test_the_sum_keeps_its_input_the_thin_middle_and_with_a_gain_its_result(g):
    f, _, tensors = case(False, True, g, 0.3)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t):
        y = f(*tensors)
    mine = {t.untyped_storage()._cdata for t in (*tensors, y)}
    assert [tuple(t.shape) for k, t in kept.items() if k not in mine][1:] == [(6, 2)]  # the first is W
    assert (y.untyped_storage()._cdata in kept) == g


def test_a_checkpoint_around_the_sum_gives_the_same_gradients():
    f, _, tensors = case(False, True, True, 0.3)
    plain, again = (torch.autograd.grad(run(*tensors).relu_().sum(), tensors) for run in (f, lambda *t: checkpoint(f, *t, use_reentrant=False)))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_the_sum_does_not_take():
    x, W, B, A, e = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4, 2), torch.randn(2, 5), torch.randn(2)
    assert takes(x, W) and not takes(x, None) and not takes(x.half(), W.half()) and not takes(x.bfloat16(), W) and not takes(x, nn.Parameter(W))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(x, W)
    assert thin((B, A), x, None) is None, "a frozen A needs nothing of x"
    with torch.no_grad():
        assert thin((B, A), x, None) == Thin(B, A)
    A.requires_grad_()
    assert thin((B, 0.5, e, 3.0, A), x, None) == Thin(B, A, e, 1.5)
    assert thin((B, 2.0, A), x, Dropout(0.1)).p == 0.1
    for factors in ((torch.randn(4), B, e, A), (B, torch.randn(2, 2), A), (B, e, e, A), (A,)):
        assert thin(factors, x, None) is None
    assert thin((B, A), x, lambda x: x) is None


@pytest.mark.parametrize("terms", [1, 2, 3, 5, 7])
def test_the_series_of_what_trains_equals_autograds(terms):
    v = (torch.randn(3, 6, dtype=D) / 4).requires_grad_()
    same_gradients(lambda v: series_of(v, terms), lambda v: cayley_series(skew(v), terms), [v])
    assert torch.autograd.gradcheck(lambda v: series_of(v, terms), v) and torch.autograd.gradgradcheck(lambda v: series_of(v, terms), v)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        series_of(v, terms)
    small = [t for t in kept if t.untyped_storage()._cdata != v.untyped_storage()._cdata]
    assert terms < 3 or (len(small) == max(terms - 1, 3) - 2 and all(t.shape == (3, 4, 4) for t in small)), "Q and the sums but two"
    two = torch.vmap(lambda v: series_of(v, terms))(torch.stack([v, -v]))
    assert torch.allclose(two, torch.stack([cayley_series(skew(v), terms), cayley_series(skew(-v), terms)]))


@pytest.mark.parametrize("n", [1, 3])
def test_turning_by_blocks_equals_its_definition(n):
    x, R = numbers(2, 5, 12), numbers(n, 4, 4)
    same_gradients(turn, turn_slow, [x, R])
    assert torch.autograd.gradcheck(turn, (x, R)) and torch.autograd.gradgradcheck(turn, (x, R))
    assert torch.allclose(torch.vmap(turn, (None, 0))(x, torch.stack([R, 2 * R])), torch.stack([turn_slow(x, R), turn_slow(x, 2 * R)]))
    with torch.autocast("cpu", torch.bfloat16):
        y = turn(x.detach().float().requires_grad_(), R.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


@pytest.mark.parametrize("o, i", [(6, 8), (7, 5), (1, 4), (4, 1)])
def test_the_spectrums_gradient_is_read_off_the_transform(o, i):
    n = min(o * i, 9)  # some entries meet their mirror images
    _, _, at, of, first = places(o, i, n, 3, torch.device("cpu"))
    c, product = numbers(n), sparse_spectrum(o, i, 2.5, at, of, first)
    same_gradients(lambda c: made(product, c), lambda c: grown(o, i, 2.5, at, of, c), [c])
    x, W, b = numbers(3, 2, i), torch.randn(o, i, dtype=D), numbers(o)
    same_gradients(lambda x, b, c: merged(x, W, b, product, c), lambda x, b, c: F.linear(x, W + grown(o, i, 2.5, at, of, c), b), [x, b, c])
    assert torch.autograd.gradgradcheck(lambda x, c: merged(x, W, None, product, c), (x, c))


@pytest.mark.parametrize("o, i", [(20, 30), (21, 29), (40, 25)])
def test_few_entries_learn_without_the_matrixs_gradient(o, i, monkeypatch):
    """By tokens and by the matrix the same, of every place of the spectrum and however many are gathered at a time."""
    torch.manual_seed(0)
    for n, tokens in ((6, 5), (o * i, 2**12)):
        _, _, at, of, first = places(o, i, n, 3, torch.device("cpu"))
        c, g, x = numbers(n), torch.randn(tokens, o, dtype=D), torch.randn(tokens, i, dtype=D)
        monkeypatch.setattr(spectrum, "THIN", 100 if n == 6 else 0)
        product = sparse_spectrum(o, i, 2.5, at, of, first)
        assert product.thin and torch.allclose(product.back(g, x, c)[0], product.pull(g.mT @ x, c)[0])
    monkeypatch.undo()
    assert sparse_spectrum(o, i, 2.5, at, of, first).thin is None
    _, _, at, of, first = places(o, i, 6, 3, torch.device("cpu"))
    c, x, W, product = numbers(6), numbers(3, 2, i), torch.randn(o, i, dtype=D), sparse_spectrum(o, i, 2.5, at, of, first)
    for way in (lambda x, c: merged(x, W, None, product, c), lambda x, c: F.linear(x, W) + through(product, x, c, drop=lambda x: x)):
        same_gradients(way, lambda x, c: F.linear(x, W + grown(o, i, 2.5, at, of, c)), [x, c])
        assert torch.autograd.gradgradcheck(way, (x, c), fast_mode=True)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "sora", "fourierft", "oft", "miss"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_acts_and_learns_as_its_weight_says(method, bias):
    torch.manual_seed(0)
    fields = {"fourierft": {"n_frequency": 90}, "miss": {"r": 5}}.get(method, {})
    model = lorakit.adapt(nn.Sequential(nn.Linear(24, 16, bias=bias)), method, target_modules="0", **fields)
    with torch.no_grad():
        for q in model.double().parameters():
            if q.requires_grad:
                q.add_(torch.randn_like(q) * 0.1)
    slot, x, target = model[0].slot, numbers(3, 24), torch.randn(3, 16, dtype=D)
    tensors = [x, *(q for q in model.parameters() if q.requires_grad)]
    W = slot.map({"default": 1.0}).weight()
    got, want = (torch.autograd.grad((y * target).sum(), tensors) for y in (model(x), F.linear(x, W, slot.bias({"default": 1.0}))))
    near = {"rtol": 1e-6, "atol": 1e-8}
    assert len(got) > 1 and all(torch.allclose(a, b, **near) for a, b in zip(got, want, strict=True))


def test_a_frequencys_merged_product_is_only_taken_where_it_loses_nothing():
    assert not FourierFT(1000).thin({"sizes": torch.zeros(0, 512, 512)}) and FourierFT(2).thin({"sizes": torch.zeros(0, 512, 512)})
