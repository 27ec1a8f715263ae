"""Who makes the numbers of packed weights: the definition and bitsandbytes' operator agree to the bit, and products with either are the dense ones."""

import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit
from lorakit.kernels import decode
from lorakit.kernels.codes import pack
from lorakit.stores import scheme as schemes
from lorakit.stores.normal_float import CODES, NF4
from lorakit.stores.product import back, times
from lorakit.stores.scheme import scheme_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def library():
    """bitsandbytes imported, on a CPU for which it has its own code."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("bitsandbytes' operator is taken on a CPU with AVX-512 only")
    import bitsandbytes  # noqa: F401

    forget()
    yield
    forget()


def forget() -> None:
    decode._kinds.cache_clear()
    decode._agreed.cache_clear()


def drawn(n: int, block: int, seed: int = 0):
    """Packed codes of n numbers, and the constants of their blocks."""
    g = torch.Generator().manual_seed(seed)
    return pack(torch.randint(0, 16, (n,), generator=g, dtype=torch.uint8), 4), torch.rand(-(-n // block), generator=g)


def one(scheme, dtype=torch.float32, bias=True) -> nn.Module:
    torch.manual_seed(3)
    return lorakit.quantize(nn.Sequential(nn.Linear(192, 128, bias=bias)).to(dtype), scheme, target_modules="0")[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", decode.BLOCKS)
@pytest.mark.parametrize("blocks", [1, 2, 7, 300])
def test_the_operator_makes_the_definitions_numbers_to_the_bit(library, dtype, block, blocks):
    n = block * blocks
    codes, c = drawn(n, block)
    assert decode.operator(codes, NF4, 4, block, n, dtype) == "nf4"
    for a in {0, block * (blocks // 2)}:
        got = decode.blocks(codes, NF4, 4, c[a // block :], block, a, n, dtype)
        want = decode.blocks_slow(codes, NF4, 4, c[a // block :], block, a, n, dtype)
        assert got.dtype == dtype and got.shape == (n - a,) and torch.equal(got, want)


def test_a_matrix_of_odd_shape_is_the_same_with_and_without_it(library, monkeypatch):
    for shape in ((3, 5), (1, 64), (7, 33), (128, 96), (100, 52), (65, 128), (300, 256)):
        for given in ("nf4", {"name": "nf4", "double_quant": False}, {"name": "nf4", "block": 32}, {"name": "nf4", "block": 4096}):
            s = scheme_of(given)
            parts = s.parts(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
            for dtype in (*DTYPES, torch.float64):
                fast = s.matrix(parts, *shape, dtype)
                with monkeypatch.context() as m:
                    m.setattr(decode, "operator", lambda *a: None)
                    assert torch.equal(fast, s.matrix(parts, *shape, dtype)), (shape, given, dtype)


def test_it_is_taken_only_for_what_it_can_do(library):
    codes, _ = drawn(4096, 64)
    f32 = torch.float32
    assert decode.operator(codes, NF4, 4, 64, 4096, f32) == "nf4"
    assert decode.operator(nn.Parameter(codes, requires_grad=False), NF4, 4, 64, 4096, f32) == "nf4"
    reversed_ = tuple(reversed(NF4))
    for args in ((CODES[3], 3, 64, 4096, f32), (reversed_, 4, 64, 4096, f32), (NF4, 4, 8, 4096, f32), (NF4, 4, 2048, 4096, f32), (NF4, 4, 64, 4090, f32),
                 (NF4, 4, 64, 0, f32), (NF4, 4, 64, 4096, torch.float64)):
        assert decode.operator(codes, *args) is None, args[1:]
    assert decode.operator(codes.to("meta"), NF4, 4, 64, 4096, f32) is None
    empty = decode.blocks(codes[:0], NF4, 4, torch.empty(0), 64, 0, 0, f32)
    assert empty.shape == (0,) and empty.dtype == f32


def test_an_operator_that_is_wrong_is_left_alone_with_one_warning(library, monkeypatch):
    true = decode._operator
    monkeypatch.setattr(decode, "_operator", lambda *a: true(*a).mul_(1 + 2**-7))
    codes, c = drawn(640, 64)
    want = decode.blocks_slow(codes, NF4, 4, c, 64, 0, 640, torch.float32)
    with pytest.warns(UserWarning, match="bitsandbytes does not make the numbers of nf4 in blocks of 64 as torch.float32"):
        assert torch.equal(decode.blocks(codes, NF4, 4, c, 64, 0, 640, torch.float32), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode.blocks(codes, NF4, 4, c, 64, 0, 640, torch.float32), want)


def test_an_operator_of_another_form_is_left_alone_too(library, monkeypatch):
    def other(*a):
        raise TypeError("unexpected argument")

    monkeypatch.setattr(decode, "_operator", other)
    codes, c = drawn(640, 64)
    with pytest.warns(UserWarning, match="made by PyTorch alone"):
        got = decode.blocks(codes, NF4, 4, c, 64, 0, 640, torch.float32)
    assert torch.equal(got, decode.blocks_slow(codes, NF4, 4, c, 64, 0, 640, torch.float32))


def test_without_the_library_or_its_code_for_this_cpu_pytorch_does_it(library, monkeypatch):
    codes, _ = drawn(640, 64)
    with monkeypatch.context() as m:
        m.setattr(decode, "find_spec", lambda name: None)
        assert decode.operator(codes, NF4, 4, 64, 640, torch.float32) is None
    forget()
    with monkeypatch.context() as m:
        m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert decode.operator(codes, NF4, 4, 64, 640, torch.float32) is None


def test_the_library_is_imported_only_when_it_pays(library):
    code = """
import sys, warnings
import torch, lorakit
from lorakit.kernels import decode
from lorakit.stores.normal_float import NF4
warnings.simplefilter("error")
layer = lorakit.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4", target_modules="0")
x = torch.randn(4, 64)
y = layer(x)
assert "bitsandbytes" not in sys.modules, "imported for a few numbers"
decode.WORTH = 4096 * 3
assert torch.equal(layer(x), y) and "bitsandbytes" not in sys.modules
with torch.inference_mode():
    assert torch.equal(layer(x), y) and "bitsandbytes" in sys.modules
assert torch.equal(layer(x), y)
assert decode.operator(layer[0].weight_codes, NF4, 4, 64, 4096, torch.float32) == "nf4"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


# Products


@pytest.mark.parametrize("given", ["nf4", "int8", "int4", {"name": "nf4", "double_quant": False}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_product_in_pieces_makes_no_whole_matrix(given, bias, monkeypatch):
    """Nor any other tensor as large, and is the product with the dense one."""
    monkeypatch.setattr(schemes, "CHUNK", 192 * 40)
    layer = one(given, bias=bias)
    W, b = layer.weight, layer.bias
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not any(out.untyped_storage()._cdata == p.untyped_storage()._cdata for p in layer._buffers.values()):
                largest[0] = max(largest[0], out.numel())
            return out

    x, g = torch.randn(2, 3, 192, requires_grad=True), torch.randn(2, 3, 128)
    with Watch():
        y = layer(x)
        [got] = torch.autograd.grad(y, x, g)
    assert 192 * 32 <= largest[0] <= 192 * 40 < W.numel()
    assert torch.allclose(y, F.linear(x, W, b), atol=1e-5) and torch.allclose(got, g @ W, atol=1e-5)


@pytest.mark.parametrize("given", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_product_in_pieces_compiles(given, bias, monkeypatch):
    monkeypatch.setattr(schemes, "CHUNK", 192 * 40)
    layer = one(given, bias=bias).requires_grad_(False)
    x = torch.randn(4, 192, requires_grad=True)
    want = layer(x)
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(y, want, atol=1e-6)
    assert torch.allclose(*[torch.autograd.grad(z.sum(), x)[0] for z in (y, want)], atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 192), (7, 320), (600, 8192)], ids=str)
def test_constants_made_at_once_are_those_of_the_pieces(shape):
    s = scheme_of("nf4")
    parts = s.parts(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    all_ = s.opened(parts)
    k = len(parts["absmax"])
    for a, b in ((0, k), (0, 1), (1, k), (k // 2, k), (256, 512), (255, 513)):
        if a < b <= k:
            assert torch.equal(s.constants(parts, a, b), s.constants(all_, a, b)), (a, b)
    assert torch.equal(s.numbers(parts, 0, 64, shape, torch.float32), s.numbers(all_, 0, 64, shape, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_a_scale_each_are_multiplied_by_it_last(dtype):
    """No further from the exact product than the product with the rounded matrix is."""
    s, (n, m) = scheme_of("int8"), (96, 320)
    M = torch.randn(n, m) * torch.logspace(-3, 3, n)[:, None]
    parts = s.parts(M)
    scale, whole = s.by_rows(parts, dtype)
    exact = s.matrix(parts, n, m, torch.float64)
    Q = s.numbers(whole, 0, n * m, (n, m), dtype).view(n, m)
    assert torch.equal(Q.double(), Q.double().round()) and Q.abs().max() <= 127
    assert torch.allclose(Q.double() * scale.double()[:, None], exact, rtol=1e-6)
    x, g, b = torch.randn(5, m).to(dtype), (torch.randn(5, n) / torch.logspace(-3, 3, n)).to(dtype), torch.randn(n).to(dtype)
    W = s.matrix(parts, n, m, dtype)
    for got, dense, true in ((times(x, b, s, (n, m), parts), F.linear(x, W, b), F.linear(x.double(), exact, b.double())),
                             (back(g, s, (n, m), parts), g @ W, g.double() @ exact)):
        assert got.dtype == dtype
        assert float((got - true).norm()) <= 1.5 * float((dense - true).norm())


@pytest.mark.parametrize("given", ["int8", "nf4"])
def test_half_precision_keeps_its_range(given):
    """Whole numbers times their scale afterwards would overflow float16."""
    s, (n, m) = scheme_of(given), (16, 1024)
    parts = s.parts(torch.full((n, m), 0.01))
    y = times(torch.full((2, m), 8.0).half(), None, s, (n, m), parts)
    assert torch.isfinite(y).all() and torch.allclose(y.float(), torch.full((2, n), 8 * 0.01 * m), rtol=0.01)
