"""Products with packed weights in one kernel: what it is told of each scheme, where it is taken, that it compiles for GPUs and is right (interpreted)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels import fused
from lorakit.stores.product import back, times
from lorakit.stores.scheme import SCHEMES, scheme_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GIVEN = [*SCHEMES, {"name": "nf4", "double_quant": False}, {"name": "nf2", "block": 8}, {"name": "int4", "symmetric": True}, {"name": "int3", "group": 0},
         {"name": "int8", "group": 32, "symmetric": False}]
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")


@pytest.fixture
def interpreter(monkeypatch):
    """As with TRITON_INTERPRET=1 and Triton installed, whether it is or not."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    fused._runs.cache_clear()
    yield
    fused._runs.cache_clear()
    fused._agrees.clear()


def drawn(given, n=40, m=320):
    s = scheme_of(given)
    return s, s.parts(torch.randn(n, m, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_kernel_is_told_how_numbers_are_made(given, dtype):
    s, parts = drawn(given)
    coded = s.coded(parts, (40, 320))
    assert torch.equal(fused.matrix_slow(coded, (40, 320), dtype), s.matrix(parts, 40, 320, dtype))


def test_on_a_cpu_pytorch_makes_the_product():
    s, parts = drawn("nf4")
    x, g = torch.randn(3, 320), torch.randn(3, 40)
    assert not fused.wanted(x)
    M = s.matrix(parts, 40, 320, x.dtype)
    assert torch.equal(times(x, None, s, (40, 320), parts), F.linear(x, M)) and torch.equal(back(g, s, (40, 320), parts), g @ M)


def test_it_is_wanted_for_few_ordinary_tokens_only(interpreter):
    for dtype in DTYPES:
        assert fused.wanted(torch.zeros(1, 8, dtype=dtype)) and fused.wanted(torch.zeros(4, 16, 8, dtype=dtype)) and fused.wanted(torch.zeros(8))
    for x in (torch.zeros(65, 8), torch.zeros(0, 8), torch.zeros(1, 8).double(), torch.zeros(1, 8).long(), torch.zeros(1, 8, device="meta"),
              torch.zeros(1, 8, requires_grad=True)):
        assert not fused.wanted(x)
    with torch.no_grad():
        assert fused.wanted(torch.zeros(1, 8, requires_grad=True))
    seen = []
    torch.func.vmap(lambda v: (seen.append(fused.wanted(v)), v)[1])(torch.zeros(2, 8))
    assert seen == [False]


def test_without_triton_pytorch_makes_the_product(interpreter, monkeypatch):
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not fused.wanted(torch.zeros(1, 8))


def test_a_triton_that_cannot_be_imported_is_left_alone_with_one_warning(interpreter, monkeypatch):
    monkeypatch.setitem(sys.modules, "lorakit.kernels.fused_triton", None)
    s, parts = drawn("int4")
    x = torch.randn(2, 320)
    with pytest.warns(UserWarning, match="PyTorch makes them, more slowly") as said:
        y = [times(x, None, s, (40, 320), parts) for _ in range(2)]
    assert len(said) == 1 and all(torch.equal(v, F.linear(x, s.matrix(parts, 40, 320, x.dtype))) for v in y)


def test_the_kernel_is_not_imported_where_it_does_not_run():
    code = """
import sys
import torch, lorakit
layer = lorakit.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4", target_modules="0")
x = torch.randn(4, 64, requires_grad=True)
layer(x).sum().backward()
assert "lorakit.kernels.fused" in sys.modules and "lorakit.kernels.fused_triton" not in sys.modules
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


@triton
@pytest.mark.parametrize("given, dtype, tokens, turned, arch", [
    ("nf4", torch.bfloat16, 1, False, 90), ("int7", torch.float16, 64, True, 80), ("int8", torch.float32, 64, False, 80)], ids=str)
def test_the_kernel_compiles_for_a_gpu(given, dtype, tokens, turned, arch, monkeypatch, tmp_path):
    """From Python to machine code, with the very arguments of a launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorakit.kernels import fused_triton

    source_of, made = fused_triton._product, []

    class Compiled:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, enable_fp_fusion, **const):
            short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
            every = dict(zip(source_of.arg_names, args, strict=False)) | const
            const |= {k: v for k, v in every.items() if v is None or (type(v) is int and v == 1)}  # as Triton does
            kinds = {k: "constexpr" if k in const else "*" + short[v.dtype] if isinstance(v, torch.Tensor) else "fp32" if isinstance(v, float) else "i32"
                     for k, v in every.items()}
            source, options = ASTSource(source_of, kinds, constexprs=const), {"enable_fp_fusion": enable_fp_fusion}
            made.append(compile(source, target=GPUTarget("cuda", arch, 32), options=options))

    monkeypatch.setattr(fused_triton, "_product", Compiled())
    s, parts = drawn(given, 64, 256)
    coded = s.coded(parts, (64, 256))
    x, b = torch.zeros(tokens, 64 if turned else 256, dtype=dtype), None if turned else torch.zeros(64, dtype=dtype)
    monkeypatch.setattr(fused, "_trial", lambda form: True)
    fused.product(x, b, coded, (64, 256), turned)
    fused._agrees.clear()
    [kernel] = made
    assert kernel.asm["cubin"] and kernel.metadata.shared < 99 << 10  # what the smallest of these GPUs have
    assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32)  # tensor cores, but never with float32 cut off


@triton
def test_the_kernel_is_right():
    """In Triton's interpreter, in a process that imports Triton for it."""
    cases = Path(__file__).with_name("fused_interpreted.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", str(cases)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
