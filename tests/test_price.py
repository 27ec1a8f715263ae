"""The price benchmark's exact part: bytes saved for the backward pass, beside PEFT; and dropout that keeps no mask."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lorakit
from benchmarks import price
from lorakit.kernels.cayley import cayley, cayley_slow, skew
from lorakit.kernels.dropout import Dropout, _Dropped, dropped_slow, without, zeros

SHAPE = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 128, "rows": 2, "tokens": 64}
PLAIN, DROPPED = "lora", "lora, dropout 0.05"


@pytest.mark.parametrize("name", [PLAIN, DROPPED, "adalora", "dora", "oft", "boft", "hra", "loha", "lokr", "fourierft", "miss"])
def test_saves_no_more_than_peft(name):
    pytest.importorskip("peft")
    ours, theirs = price.both(name, SHAPE)
    ours.eval(), theirs.eval()
    assert torch.allclose(price.call(ours, SHAPE)(), price.call(theirs, SHAPE)(), rtol=1e-3)
    assert price.saved(ours.train(), SHAPE) <= price.saved(theirs.train(), SHAPE)


def test_dropout_saves_nothing_of_the_width():
    """What dropout adds to LoRA's saved bytes is less than one bool mask of one layer's input would take."""
    plain, dropped = (price.saved(price.both(n, SHAPE)[0].train(), SHAPE) for n in (PLAIN, DROPPED))
    assert dropped - plain < SHAPE["rows"] * SHAPE["tokens"] * SHAPE["hidden_size"]


@pytest.mark.parametrize("method", ["lora-fa", "asymmetric-lora"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_frozen_a_saves_only_what_the_thin_product_is_wide(method, dropout):
    """r numbers for each token and layer over the floor, and nothing of the inputs."""
    floor, ours = (price.base(SHAPE), lorakit.adapt(price.base(SHAPE), method, r=4, lora_dropout=dropout).train())
    layers = 7 * SHAPE["num_hidden_layers"]
    assert price.saved(ours, SHAPE) - price.saved(floor, SHAPE) == layers * SHAPE["rows"] * SHAPE["tokens"] * 4 * 4


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(3, 5, generator=g, dtype=dtype, requires_grad=True), torch.randn(2, 5, generator=g, dtype=dtype, requires_grad=True))


def test_dropout_equals_its_reference():
    x, A = inputs()
    fast, slow = (torch.autograd.grad(f(x, A, 0.3, 7).square().sum(), (x, A)) for f in (_Dropped.apply, dropped_slow))
    assert torch.allclose(_Dropped.apply(x, A, 0.3, 7), dropped_slow(x, A, 0.3, 7))
    assert all(torch.allclose(a, b) for a, b in zip(fast, slow, strict=True))
    assert torch.autograd.gradcheck(lambda x, A: _Dropped.apply(x, A, 0.3, 7), (x, A))
    assert torch.autograd.gradgradcheck(lambda x, A: _Dropped.apply(x, A, 0.3, 7), (x, A))


@pytest.mark.parametrize("p", [1e-5, 0.05, 0.3, 0.9, 1.0])
def test_the_mask_drops_its_share_everywhere_and_follows_its_seed(p):
    n = 160_400
    at = zeros(n, p, 5, torch.device("cpu"))
    kept = without(torch.ones(400, 401), at)
    assert torch.equal(kept.flatten()[at[at < n]], torch.zeros(int((at < n).sum()))) and int((kept == 0).sum()) == len(at[at < n].unique())
    for part in (kept, kept[:100], kept[300:], kept[:, ::2]):  # no end of it is left out, and no lane
        share, m = float((part == 0).double().mean()), part.numel()
        assert abs(share - p) <= 5 * (p * (1 - p) / m) ** 0.5 + 1e-12
    near = (kept.flatten()[1:] == 0) & (kept.flatten()[:-1] == 0)  # neighbours know nothing of each other
    assert abs(float(near.double().mean()) - p * p) <= 6 * (p * p * (1 - p * p) / n) ** 0.5 + 1e-5
    assert torch.equal(at, zeros(n, p, 5, at.device)) and (p in (1e-5, 1.0) or not torch.equal(at, zeros(n, p, 6, at.device)))


def test_a_checkpoint_that_is_computed_again_has_the_same_mask():
    def gradient(run):
        x, A = inputs()
        torch.manual_seed(1)
        return torch.autograd.grad(run(lambda x, A: Dropout(0.5).times(x, A).square().sum(), x, A), (x, A))

    plain, again = gradient(lambda f, x, A: f(x, A)), gradient(lambda f, x, A: checkpoint(f, x, A, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_dropout_under_autocast_is_of_its_dtype_and_the_gradients_of_theirs():
    x, A = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = _Dropped.apply(x, A, 0.3, 7), dropped_slow(x, A, 0.3, 7)
    assert fast.dtype == slow.dtype == torch.bfloat16 and torch.allclose(fast.float(), slow.float(), atol=0.05)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(fast.float().sum(), (x, A)))


def test_cayley_equals_its_reference_and_keeps_only_its_result():
    v = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(cayley(skew(v)), cayley_slow(skew(v)))
    assert torch.allclose(*(torch.autograd.grad((f(skew(v)) * target).sum(), v)[0] for f in (cayley, cayley_slow)))
    Q = target.clone().requires_grad_(True)  # the gradient does not need Q to be skew
    assert torch.autograd.gradcheck(cayley, (Q,)) and torch.autograd.gradgradcheck(cayley, (Q,))
    assert torch.allclose(torch.vmap(cayley)(Q), cayley_slow(Q))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        R = cayley(Q)
    assert [t.untyped_storage()._cdata for t in kept] == [R.untyped_storage()._cdata]
