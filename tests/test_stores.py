"""Quantised stores: codes and constants, products without a dense copy, layers that stay layers, and what `quantize` refuses."""

import copy
import io
import math
import pickle
from statistics import NormalDist

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit.errors import LorakitError
from lorakit.kernels.codes import EVEN, WORDS, look_up, pack, packed_bytes, unpack
from lorakit.models import load_base
from lorakit.planning.memory import Live, counting_saved
from lorakit.quantized import described, packed
from lorakit.stores import scheme as schemes
from lorakit.stores.layer import PREFIX, PackedLayer
from lorakit.stores.normal_float import DYNAMIC, NF4, NormalFloat
from lorakit.stores.product import back, times
from lorakit.stores.scheme import SCHEMES, scheme_of

ALL = {"nf4": "nf4", "nf4-plain": {"name": "nf4", "double_quant": False}, "nf4-32": {"name": "nf4", "block": 32}, "nf3": "nf3", "nf2": "nf2", "int8": "int8",
       "int7": "int7", "int6": "int6", "int5": "int5", "int4": "int4", "int3": "int3", "int2": "int2", "int4-sym": {"name": "int4", "symmetric": True},
       "int8-groups": {"name": "int8", "group": 64, "symmetric": False}}
every = pytest.mark.parametrize("scheme", list(ALL.values()), ids=list(ALL))


def drawn(n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) * 0.02


def bits_of(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, -0 and 0 told apart."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def whole(scheme, M: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    s = scheme_of(scheme)
    return s.matrix(s.parts(M), *M.shape, dtype)


def one(scheme, layer: nn.Module | None = None) -> nn.Sequential:
    """A model of one packed layer."""
    torch.manual_seed(3)
    return lorakit.quantize(nn.Sequential(layer or nn.Linear(192, 128)), scheme, target_modules="0")


# bitsandbytes

SHAPES = [(3, 7), (100, 52), (512, 256), (64, 1), (1, 64), (129, 65)]


def theirs(M: torch.Tensor, block: int = 64, double: bool = True):
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    return functional, *functional.quantize_4bit(M, blocksize=block, compress_statistics=double, quant_type="nf4")


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_nf4_codes_their_packing_and_the_constants_are_bitsandbytes_to_the_bit(shape, block):
    M = drawn(*shape)
    _, codes, state = theirs(M, block, double=False)
    ours = NormalFloat(4, block, False).parts(M)
    assert torch.equal(ours["codes"], codes.view(-1))
    assert same(ours["absmax"], state.absmax)
    assert torch.tensor(NF4).equal(state.code)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_second_quantisation_is_bitsandbytes_but_where_ours_is_nearer(shape):
    M = drawn(*shape)
    _, codes, state = theirs(M)
    ours, plain = NormalFloat().parts(M), NormalFloat(double_quant=False).parts(M)["absmax"]
    assert torch.equal(ours["codes"], codes.view(-1))
    assert same(ours["nested_absmax"], state.state2.absmax) and same(ours["offset"], state.offset)
    assert torch.tensor(DYNAMIC).equal(state.state2.code)
    top = ours["nested_absmax"].repeat_interleave(256)[: len(plain)]
    other = (ours["absmax"] != state.absmax) & (top > 0)  # where all constants are one, every code stands for their mean
    scaled = ((plain - ours["offset"]) / top).clamp(-1, 1)
    q = torch.tensor(DYNAMIC, dtype=torch.float64)
    gaps = [(q[c.long()] - scaled).abs()[other] for c in (ours["absmax"], state.absmax)]
    assert bool((gaps[0] < gaps[1]).all())
    assert bool((ours["absmax"].int() - state.absmax.int())[other].abs().le(1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
def test_the_same_state_reads_as_the_same_numbers(double, dtype):
    M = drawn(512, 256)
    functional, codes, state = theirs(M.to(dtype), double=double)
    parts = {"codes": codes.view(-1), "absmax": state.absmax}
    if double:
        parts |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    assert same(NormalFloat(double_quant=double).matrix(parts, 512, 256, dtype), functional.dequantize_4bit(codes, state))


# Errors, bits, codes


def slow_codes(bits: int) -> torch.Tensor:
    """2^(b-1) + 1 and 2^(b-1) points of the normal distribution's quantiles, zero once, over the largest."""
    delta, half = (1 - 1 / 30 + 1 - 1 / 32) / 2, 2 ** (bits - 1)
    up = [NormalDist().inv_cdf(p) for p in torch.linspace(delta, 0.5, half + 1, dtype=torch.float64)[:-1].tolist()]
    down = [-NormalDist().inv_cdf(p) for p in torch.linspace(delta, 0.5, half, dtype=torch.float64)[:-1].tolist()]
    return torch.tensor(sorted([*up, 0.0, *down]), dtype=torch.float64) / max(up)


def slow_normal_float(M: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    q, out = slow_codes(bits), []
    for w in M.double().view(-1).split(block):
        c = w.abs().max()
        out.append(q[(w[:, None] / c - q).abs().argmin(1)] * c)
    return torch.cat(out).view(M.shape)


def slow_affine(M: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    out = []
    for w in M.double().reshape(-1).split(group or M.shape[1]):
        if symmetric:
            top = 2 ** (bits - 1) - 1
            step = w.abs().max() / top
            out.append(torch.round(w / step) * step)
        else:
            low, high = min(w.min(), 0), max(w.max(), 0)
            step = (high - low) / (2**bits - 1)
            zero = -low / step
            out.append((torch.round(w / step + zero).clamp(0, 2**bits - 1) - zero) * step)
    return torch.cat(out).view(M.shape)


SLOW = {f"nf{b}": (lambda M, b=b: slow_normal_float(M, b, 64)) for b in (2, 3, 4)} | {
    "int8": lambda M: slow_affine(M, 8, 0, True), "int7": lambda M: slow_affine(M, 7, 64, False), "int6": lambda M: slow_affine(M, 6, 64, False),
    "int5": lambda M: slow_affine(M, 5, 64, False), "int4": lambda M: slow_affine(M, 4, 64, False),
    "int3": lambda M: slow_affine(M, 3, 32, False), "int2": lambda M: slow_affine(M, 2, 16, False)}


@pytest.mark.parametrize("name", SLOW)
def test_the_error_on_gaussian_weights_is_that_of_the_formula(name):
    M = drawn(256, 512)
    want = float((SLOW[name](M) - M).norm() / M.norm())
    plain = {"double_quant": False} if name.startswith("nf") else {}
    assert float((whole({"name": name, **plain}, M) - M).norm() / M.norm()) == pytest.approx(want, rel=1e-3)
    assert float((whole(name, M) - M).norm() / M.norm()) == pytest.approx(want, rel=1e-2), "double quantisation costs next to nothing"


def test_nf4_in_blocks_of_64_loses_0_092_of_gaussian_weights():
    M = drawn(1024, 1024)
    assert float((whole({"name": "nf4", "double_quant": False}, M) - M).norm() / M.norm()) == pytest.approx(0.0920, abs=2e-4)


@every
def test_quantising_again_changes_no_code(scheme):
    s, M = scheme_of(scheme), drawn(64, 192)
    first = s.parts(M)
    again = s.parts(s.matrix(first, 64, 192, torch.float32))
    read = [unpack(p["codes"], s.bits, 0, M.numel()) for p in (first, again)]
    assert torch.equal(*read)


@every
@pytest.mark.parametrize("shape", [(64, 192), (7, 320)], ids=["64x192", "7x320"])
def test_bytes_are_what_the_parts_take(scheme, shape):
    s = scheme_of(scheme)
    parts = s.parts(drawn(*shape))
    assert s.bytes(*shape) == sum(p.nbytes for p in parts.values())
    assert {k: (tuple(p.shape), p.dtype) for k, p in parts.items()} == s.layout(*shape)


def test_unsigned_bytes_of_earlier_files_are_the_same_numbers():
    """Before int8 kept its codes as they are, they were written with 128 added; such a file's configuration does not say `signed`."""
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    now, before = scheme_of("int8"), scheme_of({"kind": "affine", "bits": 8, "group": 0, "symmetric": True})
    new, old = now.parts(W), before.parts(W)
    assert new["codes"].dtype == torch.int8 and old["codes"].dtype == torch.uint8 and torch.equal(new["codes"].int() + 128, old["codes"].int())
    assert torch.equal(now.matrix(new, 24, 40, torch.float32), before.matrix(old, 24, 40, torch.float32))
    assert scheme_of(now.to_dict()) == now and scheme_of(before.to_dict()) == before
    assert not scheme_of({"name": "int8", "symmetric": False, "group": 8}).signed


def test_sums_over_pieces_in_16_bits_are_rounded_once(monkeypatch):
    """gx of many pieces is as near to the exact one as of one piece."""
    W, g = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)), torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    s = scheme_of("int8")
    parts = s.parts(W)
    exact = g.double() @ s.matrix(parts, 256, 32, torch.float32).double()
    whole = float((back(g, s, (256, 32), parts).double() - exact).norm())
    monkeypatch.setattr(schemes, "CHUNK", 32 * 4)
    assert float((back(g, s, (256, 32), parts).double() - exact).norm()) < 1.5 * whole


def test_bits_per_weight():
    n = m = 4096
    for scheme, bits in (("nf4", 4 + 8 / 64 + 32 / (256 * 64)), ({"name": "nf4", "double_quant": False}, 4.5), ("nf2", 2 + 8 / 64 + 32 / (256 * 64)),
                         ("int4", 5.0), ("int5", 6.0), ("int7", 8.0), ("int8", 8 + 32 / m), ("int2", 6.0)):
        assert scheme_of(scheme).bytes(n, m) * 8 / (n * m) == pytest.approx(bits, abs=1e-5)


@pytest.mark.parametrize("bits", WORDS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 64, 101])
def test_packing_and_unpacking_for_every_width_and_length(bits, n):
    codes = torch.randint(0, 1 << bits, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    kept = pack(codes, bits)
    assert len(kept) == packed_bytes(n, bits) and kept.dtype == torch.uint8
    assert torch.equal(unpack(kept, bits, 0, n), codes)
    values = tuple(float(v) for v in torch.randn(1 << bits))
    want = torch.tensor(values)[codes.long()]
    for start in range(0, n, EVEN):
        assert torch.equal(unpack(kept, bits, start, n), codes[start:])
        assert torch.equal(look_up(kept, values, bits, start, n, torch.float32), want[start:])


# Pieces


@every
@pytest.mark.parametrize("shape", [(48, 320), (50, 192), (3, 64)], ids=["48x320", "50x192", "3x64"])
def test_a_matrix_made_in_pieces_is_the_one_made_at_once(scheme, shape, monkeypatch):
    s, M = scheme_of(scheme), drawn(*shape)
    parts = s.parts(M)
    at_once = s.numbers(parts, 0, M.numel(), shape, torch.float32).view(shape)
    monkeypatch.setattr(schemes, "CHUNK", 1024)
    assert s.chunk(shape[1], parts, torch.float32) < M.numel() or M.numel() <= 1024
    assert same(s.matrix(parts, *shape, torch.float32), at_once)
    at = torch.tensor([2, 0, 2])
    if (rows := s.rows(parts, at, shape, torch.float32)) is not None:
        assert same(rows, at_once[at])


def test_blocks_that_straddle_rows_are_made_in_pieces_too(monkeypatch):
    s, M = scheme_of("nf4"), drawn(100, 52)
    parts = s.parts(M)
    at_once = s.numbers(parts, 0, M.numel(), (100, 52), torch.float32).view(100, 52)
    monkeypatch.setattr(schemes, "CHUNK", 640)
    assert same(s.matrix(parts, 100, 52, torch.float32), at_once)
    x, g = torch.randn(5, 52), torch.randn(5, 100)
    assert torch.allclose(times(x, None, s, (100, 52), parts), x @ at_once.T, atol=1e-6)
    assert torch.allclose(back(g, s, (100, 52), parts), g @ at_once, atol=1e-6)


@every
@pytest.mark.parametrize("chunk", [1 << 19, 4096], ids=["whole", "pieces"])
def test_the_product_and_its_gradients_are_the_dense_layers(scheme, chunk, monkeypatch):
    monkeypatch.setattr(schemes, "CHUNK", chunk)
    m = one(scheme).double()
    W, bias = m[0].weight.clone(), m[0].bias.requires_grad_()
    x = torch.randn(2, 5, 192, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 128, dtype=torch.float64)
    got = torch.autograd.grad(m(x), (x, bias), g)
    want = torch.autograd.grad(F.linear(x, W, bias), (x, bias), g)
    assert W.dtype == torch.float64 and torch.allclose(m(x), F.linear(x, W, bias))
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


# Memory

BUILDS = {"linear": (lambda: nn.Linear(192, 128), (4, 192)), "conv": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 5, 5)),
          "conv1d": (lambda: Conv1D(128, 192), (4, 192))}
OPTIONS = {"lora": {"r": 4}, "dora": {"r": 4}, "oft": {"block_size": 0, "r": 8}}


def kept_and_grads(m: nn.Module, x: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes kept for the backward pass, and the gradients of what trains and of the input."""
    x = x.clone().requires_grad_()
    with counting_saved(m) as saved:
        y = m(x)
    y.square().sum().backward()
    return sum(saved.values()), {n: p.grad for n, p in m.named_parameters() if p.requires_grad} | {"": x.grad}


@pytest.mark.parametrize("layer", BUILDS)
@pytest.mark.parametrize("method", OPTIONS)
def test_nothing_dense_is_kept_for_the_backward_pass(method, layer):
    build, shape = BUILDS[layer]
    torch.manual_seed(0)
    quantised, dense = lorakit.quantize(nn.Sequential(build()), "nf4", target_modules="0"), nn.Sequential(build())
    with torch.no_grad():
        dense[0].weight.copy_(quantised[0].weight)
        dense[0].bias.copy_(quantised[0].bias)
    for m in (quantised, dense):
        torch.manual_seed(0)
        lorakit.adapt(m, method, target_modules="0", **OPTIONS[method])
        with torch.no_grad():
            for p in m.parameters():
                if p.requires_grad:
                    p += 0.01 * torch.randn_like(p)
    x = torch.randn(shape)
    (mine, got), (theirs, want) = kept_and_grads(quantised, x), kept_and_grads(dense, x)
    assert mine <= theirs
    assert got.keys() == want.keys() and len(want) > 1
    assert all(torch.allclose(got[n], want[n], rtol=1e-4, atol=1e-5) and want[n].any() for n in want)


def test_a_large_layer_is_never_whole_in_a_product():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    dense = m[0].weight.nbytes
    lorakit.quantize(m, "nf4", target_modules="0")
    x = torch.randn(4, 2048, requires_grad=True)
    with Live(m) as live:
        m(x).sum().backward()
    assert live.peak < 0.8 * dense
    with Live(m) as live:
        m[0].weight  # noqa: B018 - what reading it whole takes
    assert live.peak >= dense, "the meter must see a dense copy"


# A layer like others


@every
def test_autocast_computes_in_its_own_dtype(scheme):
    m = one(scheme)
    x = torch.randn(4, 192, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
        want = F.linear(x, m[0].weight, m[0].bias)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), want.float(), atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and torch.allclose(x.grad, m[0].weight.sum(0).expand(4, -1), atol=2e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    m = lorakit.adapt(one("nf4"), method, r=4, target_modules="0")
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p += 0.01
    x = torch.randn(4, 192, requires_grad=True)
    train = [p for p in m.parameters() if p.requires_grad]
    m(x).square().sum().backward()
    want = [p.grad.clone() for p in train]
    for p in train:
        p.grad = None
    checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.allclose(p.grad, w) for p, w in zip(train, want, strict=True)) and all(w.any() for w in want[1:])


def through_pickle(m):
    return pickle.loads(pickle.dumps(m))


def through_torch(m):
    at = io.BytesIO()
    torch.save(m, at)
    at.seek(0)
    return torch.load(at, weights_only=False)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_copies_are_the_same_and_their_own(copied, scheme):
    m = one(scheme)
    c, x = copied(m), torch.randn(2, 192)
    assert type(c[0]) is type(m[0]) and torch.equal(c(x), m(x))
    with torch.no_grad():
        c[0].weight_codes.zero_()
    assert not torch.equal(c(x), m(x))


@every
def test_a_state_dict_goes_into_another_layer_of_the_scheme(scheme):
    m = one(scheme)
    other = lorakit.quantize(nn.Sequential(nn.Linear(192, 128)), scheme, target_modules="0")
    x = torch.randn(2, 192)
    assert not torch.equal(other(x), m(x))
    assert "0.weight" not in m.state_dict()
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), m(x))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_changes_what_is_computed_in_and_no_constant(scheme, dtype):
    m = one(scheme)
    before, W = {k: v.clone() for k, v in m[0].named_buffers()}, m[0].weight
    m.to(dtype)
    after = dict(m[0].named_buffers())
    assert all(same(before[k], after[k]) for k in before) and len(before) > 1
    assert m[0].weight.dtype == dtype and m(torch.randn(2, 192, dtype=dtype)).dtype == dtype
    assert torch.equal(m[0].weight, whole_of(m, dtype))
    m.to(torch.float32)
    assert torch.equal(m[0].weight, W), "nothing is lost on the way"


def whole_of(m: nn.Module, dtype) -> torch.Tensor:
    layer = m[0]
    parts = {k.removeprefix(PREFIX): v for k, v in layer.named_buffers() if k.startswith(PREFIX)}
    return layer.scheme.matrix(parts, *layer.shape, dtype)


def test_one_graph_compiles_with_an_adapter():
    m = lorakit.adapt(one("nf4"), "lora", r=4, target_modules="0")
    [B] = [p for n, p in m.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        B.fill_(0.01)
    x = torch.randn(4, 192, requires_grad=True)
    want = m(x)
    grads = torch.autograd.grad(want.sum(), (x, B))
    torch._dynamo.reset()
    y = torch.compile(m, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(y, want, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(torch.autograd.grad(y.sum(), (x, B)), grads, strict=True))


@pytest.mark.parametrize("scheme", ["nf4", "nf3", "nf2", "int8", "int4", "int3", {"name": "nf4", "double_quant": False}], ids=str)
@pytest.mark.parametrize("width", [64, 96])
def test_an_embedding_looks_up_rows(scheme, width):
    if width == 96 and scheme in ("int4",):
        scheme = {"name": "int4", "group": 32}
    m = one(scheme, nn.Embedding(50, width))
    ids = torch.tensor([[3, 0, 49], [3, 3, 7]])
    assert m[0].weight.shape == (50, width)
    assert same(m(ids), F.embedding(ids, m[0].weight))


def test_the_weight_reads_in_the_layers_own_layout():
    for layer, shape in ((nn.Linear(192, 128), (128, 192)), (Conv1D(128, 192), (192, 128)), (nn.Conv2d(16, 24, 3), (24, 16, 3, 3)),
                         (nn.Embedding(50, 64), (50, 64))):
        W = layer.weight.detach().clone()
        m = one("int8", layer)
        assert m[0].weight.shape == shape and isinstance(m[0], type(layer)) and not m[0].weight.requires_grad
        assert float((m[0].weight - W).norm() / W.norm()) < 0.02
    assert "int8" in repr(one("int8")[0])


# What is refused


def refused(scheme, match, layer=None, **more):
    m = nn.Sequential(layer or nn.Linear(192, 128))
    cls, W = type(m[0]), m[0].weight
    with pytest.raises(LorakitError, match=match):
        lorakit.quantize(m, scheme, target_modules="0", **more)
    assert type(m[0]) is cls and m[0].weight is W and not list(m.buffers()), "the layer is as it was"


def test_what_cannot_be_is_refused_and_nothing_changes():
    refused("nf5", r"unknown scheme `nf5`.*nf[234]")
    refused("int-4", r"unknown scheme `int-4`.*int4")
    refused({"name": "nf4", "blok": 64}, r"no option `blok`.*block")
    refused({"name": "nf4", "bits": 5}, "bits must be 2, 3 or 4, not 5")
    refused({"name": "int4", "bits": 9}, "bits must be one of .* 8, not 9")
    refused({"name": "nf4", "block": 12}, "block must be a multiple of 8, not 12")
    refused({"name": "int4", "group": 12}, "group must be a multiple of 8")
    refused("int4", r"0: rows of 200 numbers are no whole groups of 64; mend: group: 8", nn.Linear(200, 128))
    spoiled = nn.Linear(192, 128)
    with torch.no_grad():
        spoiled.weight[5, 7] = math.nan
    refused("nf4", r"0: the weight holds NaN", spoiled)
    refused("int8", "0: a matrix of 0 x 8 has nothing to quantise", nn.Linear(8, 0))


def test_a_later_layer_that_does_not_fit_leaves_the_earlier_ones_alone():
    m = nn.Sequential(nn.Linear(64, 200), nn.Linear(200, 64))
    with pytest.raises(LorakitError, match="1: rows of 200"):
        lorakit.quantize(m, "int4", target_modules=["0", "1"])
    assert type(m[0]) is nn.Linear and type(m[1]) is nn.Linear


def test_twice_and_under_adapters_is_refused():
    m = one("nf4")
    with pytest.raises(LorakitError):
        lorakit.quantize(m, "int8", target_modules="0")
    assert m[0].scheme.name == "nf4"
    a = lorakit.adapt(nn.Sequential(nn.Linear(64, 64)), "lora", r=2, target_modules="0")
    with pytest.raises(LorakitError, match="has adapters already; mend: lorakit.quantize"):
        lorakit.quantize(a, "nf4", target_modules="0")


def test_tied_weights_are_left_alone(tied_llama):
    head = tied_llama.lm_head.weight
    lorakit.quantize(tied_llama, {"name": "int8"}, target_modules=["lm_head", "q_proj"])
    assert tied_llama.lm_head.weight is head is tied_llama.model.embed_tokens.weight
    assert set(packed(tied_llama)) == {f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)}


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    tiny.llama().save_pretrained(at)
    return at


MIXED = [{"scheme": "int8", "layers": [f"model.layers.{k}.mlp.up_proj" for k in (0, 1)]}, {"scheme": "nf2", "layers": ["model.layers.0.self_attn.q_proj"]},
         {"scheme": {"name": "int3", "group": 8}, "layers": ["model.layers.1.mlp.down_proj"]}]


@pytest.mark.parametrize("scheme", ["nf4", {"name": "int4", "group": 8}, MIXED], ids=["nf4", "int4", "mixed"])
def test_saved_and_loaded_it_is_the_same_model(scheme, tmp_path):
    m = lorakit.quantize(tiny.llama(), scheme)
    m.save_pretrained(tmp_path)
    again = load_base(tmp_path)
    assert described(again) == described(m) and len(packed(m)) > 3
    assert torch.equal(tiny.logits(again), tiny.logits(m))
    assert all(isinstance(layer, PackedLayer) for layer in packed(again).values())
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])


@pytest.mark.parametrize("scheme", ["nf4", "nf3", {"name": "int4", "group": 8}, MIXED], ids=["nf4", "nf3", "int4", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_while_loading_is_packing_in_memory_to_the_bit(scheme, dtype, folder):
    want = lorakit.quantize(load_base(folder, dtype=dtype), scheme)
    got = load_base(folder, dtype=dtype, quantize=scheme)
    a, b = want.state_dict(), got.state_dict()
    assert a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    assert torch.equal(tiny.logits(got), tiny.logits(want)) and described(got) == described(want)


def test_every_scheme_has_its_slow_formula():
    assert set(SLOW) == set(SCHEMES)
