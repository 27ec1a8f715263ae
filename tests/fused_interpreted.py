"""The fused kernel in Triton's interpreter: run by test_fused.py in a process of its own, as Triton must be imported with TRITON_INTERPRET=1."""

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import lorakit
from lorakit.kernels import fused, fused_triton
from lorakit.stores.product import back, times
from lorakit.stores.scheme import scheme_of

SCHEMES = ["nf4", "nf3", "nf2", "int8", "int7", "int6", "int5", "int4", "int3", "int2", {"name": "nf4", "double_quant": False},
           {"name": "nf4", "block": 256}, {"name": "nf2", "block": 8}, {"name": "int8", "group": 32, "symmetric": False}, {"name": "int4", "symmetric": True},
           {"name": "int4", "group": 0}, {"name": "int2", "group": 128}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one rounding


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """The interpreter cuts float32 off to bfloat16 instead of rounding it, and multiplies bfloat16's bits as whole numbers."""
    cast, dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot

    def rounding(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def wide(self, a, b, *more):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, v, tl.float32) for v in (a, b))
        return dot(self, a, b, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", wide)
    yield
    fused._agrees.clear()


@pytest.fixture
def trusted(monkeypatch):
    """No trials, which take a second each here."""
    monkeypatch.setattr(fused, "_trial", lambda form: True)


@pytest.fixture
def launches(monkeypatch):
    """The form of every product that the kernel makes."""
    out, launch = [], fused_triton.launch
    monkeypatch.setattr(fused_triton, "launch", lambda *a: (out.append(a[-1]), launch(*a))[1])
    return out


def drawn(given, n, m, seed=0):
    torch.manual_seed(seed)
    s = scheme_of(given)
    return s, s.parts(torch.randn(n, m) * torch.logspace(-2, 1, n)[:, None])


def check(got, x, M, b=None):
    """Rounded once from the exact product with the matrix of the dtype, but for the order of a float32 sum."""
    want, size = x.double() @ M.double(), x.double().abs() @ M.double().abs()
    want = want if b is None else want + b.double()
    assert got.dtype == x.dtype and got.shape == want.shape
    assert ((got.double() - want).abs() <= EPS[x.dtype] * want.abs() + 2**-20 * (size + want.abs()) + (2**-24 if x.dtype == torch.float16 else 0)).all()


@pytest.mark.parametrize("given, dtype", [(s, d) for s in SCHEMES for d in (DTYPES if s in SCHEMES[:1] else DTYPES[1:2])], ids=str)
def test_products_are_those_with_the_matrix(given, dtype, trusted, launches, monkeypatch):
    for (n, m), lead in (((20, 256), (5,)), ((7, 512), (3, 1, 6))):
        s, parts = drawn(given, n, m)
        M, b = s.matrix(parts, n, m, dtype), torch.randn(n).to(dtype)
        x, g = torch.randn(*lead, m).to(dtype), torch.randn(*lead, n).to(dtype)
        before = len(launches)
        y, gx = times(x, b, s, (n, m), parts), back(g, s, (n, m), parts)
        assert len(launches) == before + 2
        check(y, x, M.mT, b)
        check(gx, g, M)
        with monkeypatch.context() as c:
            c.delenv("TRITON_INTERPRET")
            slow, slow_back = times(x, b, s, (n, m), parts), back(g, s, (n, m), parts)
        tol = 1e-5 if dtype == torch.float32 else 2 * EPS[dtype]
        assert len(launches) == before + 2 and (y - slow).norm() <= tol * slow.norm() and (gx - slow_back).norm() <= tol * slow_back.norm()


@pytest.mark.parametrize("tokens, dtype", [(1, DTYPES[1]), (16, DTYPES[0]), (17, DTYPES[1]), (33, DTYPES[0]), (64, DTYPES[1])], ids=str)
def test_tokens_rows_and_columns_that_fill_no_tile(tokens, dtype, trusted, launches):
    for n, m in ((1, 64), (31, 320), (65, 64), (32, 128)):
        s, parts = drawn("nf4", n, m)
        M = s.matrix(parts, n, m, dtype)
        x, g = torch.randn(tokens, m).to(dtype), torch.randn(tokens, n).to(dtype)
        check(times(x, None, s, (n, m), parts), x, M.mT)
        check(back(g, s, (n, m), parts), g, M)
    assert len(launches) == 8 and {f.tokens for f in launches} == {16 if tokens <= 16 else 32 if tokens <= 32 else 64}


@pytest.mark.parametrize("m", [12, 100, 130, 300])
def test_whole_rows_of_any_even_length(m, trusted, launches):
    for given in ("int8", {"name": "int4", "group": 0}, {"name": "int2", "group": 0}):
        s, parts = drawn(given, 24, m)
        x = torch.randn(3, m)
        check(times(x, None, s, (24, m), parts), x, s.matrix(parts, 24, m, x.dtype).mT)
    assert len(launches) == 2 + (m % 4 == 0)  # a row of 2-bit codes that is no whole bytes is left to PyTorch


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["times", "back"])
def test_a_sum_in_parts_is_the_sum_and_the_same_every_time(dtype, turned, trusted, monkeypatch):
    n, m = (520, 64) if turned else (24, 1152)
    s, parts = drawn("nf4", n, m)
    x, b = torch.randn(2, n if turned else m).to(dtype), None if turned else torch.randn(n).to(dtype)
    grids, product = [], fused_triton._product

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return product[grid]

    monkeypatch.setattr(fused_triton, "_product", Watched())
    y = [back(x, s, (n, m), parts) if turned else times(x, b, s, (n, m), parts) for _ in range(2)]
    assert len(grids) == 2 and grids[0][1] > 1 and torch.equal(*y)
    M = s.matrix(parts, n, m, dtype)
    check(y[0], x, M if turned else M.mT, b)


def test_a_strided_input_is_read_as_it_stands(trusted, launches):
    s, parts = drawn("nf4", 48, 128)
    M = s.matrix(parts, 48, 128, torch.float32)
    b = torch.randn(48, 2)[:, 1]
    for x in (torch.randn(128, 6).mT, torch.randn(5, 256)[:, ::2], torch.randn(2, 3, 128).transpose(0, 1), torch.randn(1, 128).expand(4, 128),
              torch.randn(128)):
        check(times(x, b, s, (48, 128), parts), x, M.mT, b)
    assert len(launches) == 5


# Layers


@pytest.mark.parametrize("given", ["nf4", "int8", "int4"])
def test_a_layer_acts_and_learns_as_without_it(given, trusted, launches, monkeypatch):
    torch.manual_seed(0)
    model = lorakit.quantize(nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128, bias=False)), given, target_modules="all-linear")
    x, out = torch.randn(2, 5, 128, requires_grad=True), []
    for kept in (True, False):
        with monkeypatch.context() as c:
            if not kept:
                c.delenv("TRITON_INTERPRET")
            y = model(x)
            out.append((y, *torch.autograd.grad(y.square().sum(), (x, model[0].bias))))
    assert [f.back for f in launches] == [False, False, True, True]
    for got, want in zip(*out, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_autocast_chooses_the_dtype(trusted, launches):
    layer = lorakit.quantize(nn.Sequential(nn.Linear(128, 64)), "nf4", target_modules="0")
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and {f.dtype for f in launches} == {torch.bfloat16} and len(launches) == 2


# What it does not take


def test_what_is_left_to_pytorch(trusted, launches):
    s, parts = drawn("nf4", 40, 192)
    M = s.matrix(parts, 40, 192, torch.float64)
    some, many = torch.randn(64, 192), torch.randn(65, 192)
    assert fused.wanted(some) and fused.wanted(nn.Parameter(some, requires_grad=False)) and not fused.wanted(many)
    for x in (many, some.double(), some[:0], some.detach().requires_grad_()):
        assert torch.allclose(times(x, None, s, (40, 192), parts).double(), x.double() @ M.mT, rtol=1e-4, atol=1e-4)
    for given, m in (("nf4", 96), ({"name": "nf4", "block": 96}, 192), ({"name": "nf4", "block": 1024}, 512), ({"name": "int4", "group": 0}, 33)):
        s, parts = drawn(given, 16, m)
        x = torch.randn(2, m).bfloat16()
        assert fused.wanted(x) and fused.product(x, None, s.coded(parts, (16, m)), (16, m)) is None
        assert torch.allclose(times(x, None, s, (16, m), parts).float(), x.float() @ s.matrix(parts, 16, m, torch.float32).mT, rtol=0.1, atol=0.3)
    assert not launches


def test_the_gradient_of_a_gradient_goes_through(trusted, launches):
    layer = lorakit.quantize(nn.Sequential(nn.Linear(64, 24)), "nf4", target_modules="0")
    x = torch.randn(3, 64, requires_grad=True)
    v = torch.randn(3, 24, requires_grad=True)
    [g] = torch.autograd.grad(layer(x), x, v, create_graph=True)
    [gv] = torch.autograd.grad(g.square().sum(), v)
    W = layer[0].weight
    assert torch.allclose(gv, 2 * (v @ W) @ W.mT, rtol=1e-4, atol=1e-5)
    assert [f.back for f in launches] == [False]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_nobody_who_looks_on_misses_it(trusted, launches):
    layer = lorakit.quantize(nn.Sequential(nn.Linear(64, 24)), {"name": "int8", "group": 32}, target_modules="0").requires_grad_(False)
    x, seen = torch.randn(3, 64), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        layer(x)
    assert any("mm" in f for f in seen) and not launches
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert not launches
    assert torch.allclose(traced(x), y, atol=1e-5) and torch.allclose(layer(x), y, atol=1e-5) and launches


# The trial


@pytest.mark.parametrize("given, turned, dtype", zip(["nf4", "int4", "int8"], [False, True, False], DTYPES, strict=True), ids=str)
def test_a_trial_goes_before_the_first_use(given, turned, dtype, launches):
    s, parts = drawn(given, 40, 128)
    x = torch.randn(3, 40 if turned else 128).to(dtype)
    for k in (2, 3):
        assert fused.product(x, None, s.coded(parts, (40, 128)), (40, 128), turned) is not None and len(launches) == k
    assert len(set(launches)) == 1 and list(fused._agrees.values()) == [True]


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_kernel_that_does_not_work_is_left_alone_with_one_warning(how, monkeypatch, recwarn):
    launch = fused_triton.launch

    def broken(*a):
        if how == "raises":
            raise RuntimeError("out of resource: shared memory")
        y = launch(*a)
        y[-1, -1] *= 1.01
        return y

    monkeypatch.setattr(fused_triton, "launch", broken)
    s, parts = drawn("nf4", 40, 128)
    x = torch.randn(3, 128)
    for _ in range(2):
        y = times(x, None, s, (40, 128), parts)
        assert torch.allclose(y, x @ s.matrix(parts, 40, 128, x.dtype).mT, rtol=1e-4, atol=1e-4)
    said = [str(w.message) for w in recwarn if "Triton" in str(w.message)]
    assert len(said) == 1 and ("wrong" if how == "wrong" else "RuntimeError: out of resource") in said[0] and "cpu with torch.float32 and 4 bits" in said[0]
