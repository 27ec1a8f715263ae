"""Packed weights: their numbers against bitsandbytes and literal formulas, what is kept for the backward pass, moving, files, errors."""

import copy
import math
import pickle

import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit.errors import LorakitError
from lorakit.kernels import codes
from lorakit.models import load_base
from lorakit.planning.memory import Live, counting_saved
from lorakit.quantized import described, packed, quantize
from lorakit.stores import scheme as schemes
from lorakit.stores.normal_float import CODES, DYNAMIC, NormalFloat, normal_codes
from lorakit.stores.scheme import SCHEMES, scheme_of

SHAPES = [(512, 256), (100, 52), (3, 7), (64, 64)]


def gauss(n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) * 0.05


def numbers(s, W: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return s.matrix(s.parts(W), *W.shape, dtype)


def error(s, W: torch.Tensor) -> float:
    return float((numbers(s, W) - W).norm() / W.norm())


# Numbers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_bitsandbytes_to_the_bit(shape, double):
    F = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    W = gauss(*shape)
    s = NormalFloat(4, 64, double)
    mine, (theirs, state) = s.parts(W), F.quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=double)
    assert torch.equal(mine["codes"], theirs.view(-1)) and torch.equal(torch.tensor(CODES[4]), state.code)
    if not double:
        assert torch.equal(mine["absmax"], state.absmax) and torch.equal(numbers(s, W), F.dequantize_4bit(theirs, state))
        return
    assert torch.equal(torch.tensor(DYNAMIC), state.state2.code)
    assert torch.equal(mine["nested_absmax"], state.state2.absmax) and float(mine["offset"]) == float(state.offset)
    absmax = NormalFloat(4, 64, False).parts(W)["absmax"] - mine["offset"]
    scaled = absmax / mine["nested_absmax"].clamp_min(1e-30).repeat_interleave(256)[: len(absmax)]
    gap = (torch.tensor(DYNAMIC)[torch.stack([mine["absmax"], state.absmax.view(-1)]).long()] - scaled).abs()
    assert (gap[0] <= gap[1] + 1e-7).all(), "where the two differ, ours is nearer: bitsandbytes' search on a CPU is not exact"
    given = mine | {"absmax": state.absmax.view(-1)}
    assert (s.matrix(given, *shape, torch.float32) - F.dequantize_4bit(theirs, state)).abs().max() < 1e-7


@pytest.mark.parametrize(("bits", "want"), [(2, [-1, 0, 0.337915, 1]), (3, [-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1])])
def test_the_codes_of_fewer_bits_come_from_the_same_quantiles(bits, want):
    assert torch.allclose(torch.tensor(normal_codes(bits)), torch.tensor(want), atol=1e-6)


def slow(s, W: torch.Tensor) -> torch.Tensor:
    """Number by number, as the formulas say."""
    out = torch.empty_like(W)
    g = s.width(W.shape[1])
    for n, row in enumerate(W):
        for a in range(0, W.shape[1], g):
            w = row[a : a + g].tolist()
            if s.symmetric:
                half = 2 ** (s.bits - 1)
                scale, zero = max(map(abs, w)) / (half - 1), half
            else:
                scale = (max(0.0, *w) - min(0.0, *w)) / (2**s.bits - 1)
                zero = -min(0.0, *w) / scale
            for k, v in enumerate(w):
                out[n, a + k] = scale * (min(max(round(v / scale + zero), 0), 2**s.bits - 1) - zero)
    return out


@pytest.mark.parametrize("name", [n for n in SCHEMES if n.startswith("int")])
def test_whole_numbers_are_their_formula(name):
    W, s = gauss(6, 64), scheme_of(name)
    assert torch.allclose(numbers(s, W), slow(s, W), atol=1e-6)


def test_normal_float_is_its_formula():
    W, s = gauss(5, 48), NormalFloat(3, 16, False)
    q = torch.tensor(CODES[3])
    blocks = W.view(-1, 16)
    c = blocks.abs().amax(1, keepdim=True)
    want = q[((blocks / c)[..., None] - q).abs().argmin(-1)] * c
    assert torch.allclose(numbers(s, W), want.view(5, 48), atol=1e-7)


@pytest.mark.parametrize(("name", "want"), [("nf4", 0.0920), ("nf3", 0.2015), ("nf2", 0.563), ("int8", 0.007), ("int4", 0.0895)])
def test_the_error_on_gaussian_weights(name, want):
    assert error(scheme_of(name), gauss(512, 256)) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_size_idempotence_pieces_and_rows(name, shape, monkeypatch):
    s, W = scheme_of(name), gauss(*shape)
    try:
        s.fits(*shape)
    except LorakitError as e:
        assert "whole groups" in str(e) and shape[1] % s.group
        return
    parts = s.parts(W)
    assert {k: (tuple(t.shape), t.dtype) for k, t in parts.items()} == s.layout(*shape)
    assert s.bytes(*shape) == sum(t.nbytes for t in parts.values())
    whole = s.matrix(parts, *shape, torch.float32)
    assert torch.equal(s.parts(whole)["codes"], parts["codes"]), "quantising what was quantised changes no code"
    at = torch.tensor([2, 0, 2])
    rows = s.rows(parts, at, shape, torch.float32)
    assert rows is None or torch.equal(rows, whole[at])
    monkeypatch.setattr(schemes, "CHUNK", 2 * s.step)
    assert torch.equal(s.matrix(parts, *shape, torch.float32), whole)


@pytest.mark.parametrize("bits", codes.WORDS)
@pytest.mark.parametrize("n", [8, 13, 64, 1001])
def test_codes_come_back_from_their_bytes(bits, n):
    c = torch.randint(0, 1 << bits, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    p = codes.pack(c, bits)
    assert p.numel() == codes.packed_bytes(n, bits) and torch.equal(codes.unpack(p, bits, 0, n), c)
    values = tuple(float(v) - 0.5 for v in range(1 << bits))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(codes.look_up(p, values, bits, 0, n, dtype), torch.tensor(values)[c.long()].to(dtype))
    if n > 16:
        assert torch.equal(codes.look_up(p, values, bits, 8, n - 1, torch.float32), torch.tensor(values)[c[8 : n - 1].long()])


# Layers


def layer(scheme="nf4", n=96, m=128) -> nn.Sequential:
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(m, n)), scheme, target_modules="0")


def twin(m: nn.Module) -> nn.Module:
    """The same with ordinary weights of the same numbers."""
    return lorakit.dequantize(copy.deepcopy(m))


@pytest.mark.parametrize("chunk", [1 << 19, 128 * 10])
@pytest.mark.parametrize("scheme", ["nf4", "nf3", "int8", {"name": "int4", "group": 16}])
def test_the_product_and_its_gradients_are_the_dense_ones(scheme, chunk, monkeypatch):
    monkeypatch.setattr(schemes, "CHUNK", chunk)
    m = layer(scheme).double()
    d = twin(m)
    d[0].weight.requires_grad_(False)
    x = torch.randn(3, 5, 128, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(3, 5, 96, dtype=torch.float64)
    out = [(k(x), *torch.autograd.grad((k(x) * probe).sum(), [x, k[0].bias])) for k in (m, d)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*out, strict=True))
    assert torch.autograd.gradcheck(m, (x[:1, :2],))
    assert torch.autograd.gradgradcheck(lambda x: m(x) ** 2, (x[:1, :1],))


@pytest.mark.parametrize("method", ["lora", "dora", "oft", "vera", "ia3"])
def test_nothing_dense_is_kept_for_the_backward_pass(method):
    def kept(quantised: bool) -> int:
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
        m = quantize(m, "nf4", target_modules=["0", "2"]) if quantised else m
        m = lorakit.adapt(m, method, target_modules=["2"])
        with counting_saved(m) as found:
            m(torch.randn(4, 256, requires_grad=True))
        return sum(found.values())

    assert kept(True) <= kept(False) + 4 * 4 * 256, "a matrix would be 256 KiB"


def test_the_same_holds_of_convolutions_and_their_gradient():
    torch.manual_seed(0)
    m = quantize(nn.Sequential(nn.Conv2d(32, 32, 3)), "nf4", target_modules="0")
    d, x = twin(m), torch.randn(1, 32, 6, 6, requires_grad=True)
    with counting_saved(m) as found:
        y = m(x)
    assert sum(found.values()) < 32 * 32 * 9
    d[0].weight.requires_grad_(False)
    assert torch.equal(y, d(x)) and torch.allclose(*(torch.autograd.grad(k(x).square().sum(), x)[0] for k in (m, d)), atol=1e-5)


def test_a_large_layer_is_never_whole_in_memory(monkeypatch):
    monkeypatch.setattr(schemes, "CHUNK", 1 << 14)
    m = layer("nf4", 512, 512)
    x = torch.randn(2, 512, requires_grad=True)
    with Live(m) as live:
        m(x).sum().backward()
    assert live.peak < 512 * 512 * 4 / 3


def test_methods_that_read_the_weight_get_the_right_gradient():
    for method in ("dora", "oft", "fourierft", "lokr"):
        grads = []
        for k in (layer(), twin(layer())):
            lorakit.adapt(k, method, target_modules="0")
            torch.manual_seed(1)
            for p in k.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.1)
            x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
            grads.append(torch.autograd.grad(k(x).square().sum(), [p for p in k.parameters() if p.requires_grad]))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True)), method


def test_checkpointing_and_autocast_are_as_on_the_dense_twin():
    from torch.utils.checkpoint import checkpoint

    m = lorakit.adapt(layer(), "dora", r=4, target_modules="0")
    d = lorakit.adapt(twin(layer()), "dora", r=4, target_modules="0")
    x = torch.randn(4, 128, requires_grad=True)
    plain = torch.autograd.grad(m(x).sum(), x)[0]
    again = torch.autograd.grad(checkpoint(m, x, use_reentrant=False).sum(), x)[0]
    assert torch.allclose(plain, again, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = m(x), d(x)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.allclose(a, b, atol=0.05)


def test_moving_keeps_the_constants_and_changes_what_numbers_are_made_as():
    m = layer()
    was = {k: (t.dtype, t.clone()) for k, t in m[0].named_buffers()}
    m.to(torch.bfloat16)
    assert m[0].weight.dtype == m(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16 and m[0].bias.dtype == torch.bfloat16
    m.double().float()
    assert all(t.dtype == was[k][0] and torch.equal(t, was[k][1]) for k, t in m[0].named_buffers()) and m[0].weight.dtype == torch.float32


def test_copies_pickles_and_state_dicts_compute_the_same():
    m, x = layer("nf3"), torch.randn(2, 128)
    y, fresh = m(x), layer("nf3")
    other = layer("nf3")
    nn.init.normal_(other[0].bias)
    other[0].site.store.write(gauss(96, 128))
    other.load_state_dict(m.state_dict())
    for again in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), other):
        assert torch.equal(again(x), y) and again[0].site.module is again[0] and type(again[0]) is type(m[0])
    lorakit.adapt(fresh, "lora", r=2, target_modules="0")
    assert torch.equal(pickle.loads(pickle.dumps(fresh))(x), fresh(x))


def test_it_is_the_same_layer_with_another_class():
    plain = nn.Sequential(nn.Linear(64, 64))
    inner = plain[0]
    quantize(plain, "nf4", target_modules="0")
    assert plain[0] is inner and isinstance(inner, nn.Linear) and type(inner).__name__ == "PackedLinear" and "nf4" in repr(inner)
    assert "weight" not in dict(inner.named_parameters()) and inner.weight.shape == (64, 64) and inner.in_features == 64


def test_an_embedding_makes_only_the_rows_it_is_asked_for():
    torch.manual_seed(0)
    m = quantize(nn.Sequential(nn.Embedding(4096, 64)), "nf4", target_modules="0")
    with Live(m) as live:
        y = m(torch.tensor([[3, 3, 4000]]))
    assert torch.equal(y[0], m[0].weight[[3, 3, 4000]]) and live.peak < 4096 * 64


# Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    tiny.llama().save_pretrained(at)
    return at


def test_loading_packs_as_quantising_does_and_files_hold_it(folder, tmp_path):
    whole = quantize(load_base(folder), "nf4")
    loaded = load_base(folder, quantize="nf4")
    ids = torch.arange(10)[None]
    assert torch.equal(whole(ids).logits, loaded(ids).logits) and set(packed(whole)) == set(packed(loaded)) and "lm_head" not in packed(whole)
    loaded.save_pretrained(tmp_path / "q")
    again = load_base(tmp_path / "q")
    assert torch.equal(again(ids).logits, loaded(ids).logits) and described(again) == described(loaded)
    with pytest.raises(LorakitError, match="quantised already"):
        load_base(tmp_path / "q", quantize="int8")
    half = load_base(tmp_path / "q", dtype="bfloat16")
    assert half(ids).logits.dtype == torch.bfloat16 and next(iter(packed(half).values())).weight_nested_absmax.dtype == torch.float32


def test_several_schemes_in_one_model(folder, tmp_path):
    m = load_base(folder)
    names = list(packed(quantize(copy.deepcopy(m), "nf4")))
    groups = [{"scheme": {"name": "nf2"}, "layers": names[:3]}, {"scheme": {"name": "int8"}, "layers": names[3:4]}]
    quantize(m, groups)
    assert [packed(m)[n].scheme.name for n in names[:4]] == ["nf2"] * 3 + ["int8"] and len(packed(m)) == 4
    m.save_pretrained(tmp_path / "m")
    ids = torch.arange(9)[None]
    assert torch.equal(load_base(tmp_path / "m")(ids).logits, m(ids).logits)
    assert torch.equal(load_base(folder, quantize=groups)(ids).logits, m(ids).logits)


def test_tied_weights_are_left_alone():
    m = tiny.llama(tied=True)
    quantize(m, "nf4", target_modules=["q_proj", "lm_head", "embed_tokens"])
    assert m.lm_head.weight is m.model.embed_tokens.weight and all(n.endswith("q_proj") for n in packed(m))


def test_an_adapter_on_another_base_says_what_is_quantised(folder, tmp_path):
    q = lorakit.adapt(load_base(folder, quantize="nf4"), "lora", r=2)
    lorakit.save(q, tmp_path / "a")
    assert lorakit.verify(tmp_path / "a").points[1].ok, "verify packs the base as the receipt says"
    with pytest.raises(LorakitError, match="quantised when saved, not here"):
        lorakit.load(load_base(folder), tmp_path / "a")
    with pytest.raises(LorakitError, match="values differ"):
        lorakit.load(load_base(folder, quantize={"name": "nf4", "double_quant": True, "block": 32}), tmp_path / "a", check_base=True)


# Errors


@pytest.mark.parametrize(("scheme", "why"), [
    ("nf5", "did you mean `nf4`"), ({"name": "nf4", "blok": 3}, "no option `blok`; did you mean `block`"),
    ({"kind": "normalfloat"}, "did you mean `normal_float`"), ({"name": "nf4", "block": 12}, "multiple of 8"),
    ({"name": "nf4", "bits": 5}, "bits must be 2, 3 or 4"), ({"name": "int4", "bits": 5}, "bits must be one of"),
    ({"name": "int4", "group": 12}, "multiple of 8")])
def test_a_scheme_that_is_none_is_refused(scheme, why):
    with pytest.raises(LorakitError, match=why):
        scheme_of(scheme)


def test_a_layer_that_cannot_be_quantised_is_named_and_left_as_it_was():
    m = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(48, 8))
    was = [(layer.weight, type(layer)) for layer in m]
    same = lambda: [(layer.weight is w, type(layer) is t) for layer, (w, t) in zip(m, was, strict=True)] == [(True, True)] * 3  # noqa: E731
    with pytest.raises(LorakitError, match=r"2: rows of 48 numbers are no whole groups of 64; mend: group: 16"):
        quantize(m, "int4", target_modules=["0", "1", "2"])
    assert same()
    with torch.no_grad():
        m[1].weight[0, 0] = math.nan
    with pytest.raises(LorakitError, match="1: the weight holds NaN"):
        quantize(m, "nf4", target_modules=["0", "1", "2"])
    assert same()
    with pytest.raises(LorakitError, match="nothing to quantise"):
        quantize(nn.Sequential(nn.Linear(0, 4)), "nf4", target_modules="0")
    with pytest.raises(LorakitError, match="no module `9`"):
        quantize(m, [{"scheme": {"name": "nf4"}, "layers": ["9"]}])


def test_twice_or_under_an_adapter_is_refused():
    m = layer()
    with pytest.raises(LorakitError, match="not quantised yet"):
        quantize(m, "nf4", target_modules="0")
    with pytest.raises(LorakitError, match="adapters already"):
        quantize(lorakit.adapt(nn.Sequential(nn.Linear(8, 8)), "lora", r=2, target_modules="0"), "nf4", target_modules="0")
    with pytest.raises(LorakitError, match="has adapters"):
        lorakit.dequantize(lorakit.adapt(m, "lora", r=2, target_modules="0"))
