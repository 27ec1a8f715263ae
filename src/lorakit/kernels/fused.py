"""The product of a few tokens with a packed matrix in one kernel, which makes the numbers where it multiplies with them. The one place where it is chosen.

    M = scale_k (values[code] - shift_k), (n, m), k the number's block;   y = x Mᵀ + b, (t, m) -> (t, n),   or y = x M, (t, n) -> (t, m)

`matrix_slow` and a product with it are the definition, for every scheme, dtype and device. The kernel, `fused_triton`, reads the codes and nothing else
as large: for few tokens a product costs what reading the weight costs. For more than `TOKENS` it is cheaper to make the matrix once and leave the product
to the vendor's library. It is taken for CUDA tensors where Triton can be imported (`pip install triton`; CUDA builds of PyTorch bring it), or for CPU
tensors in Triton's interpreter (TRITON_INTERPRET=1), which is there to test it; never while a graph is traced or somebody looks on. Before the first use
of each form of the kernel on a device a trial must agree with the definition, so results do not depend on whether it is there beyond the order of sums.

Numbers are made in float32 and rounded to the dtype of x, as by `matrix_slow`; sums are float32, in an order that only the shapes tell.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lorakit.kernels.codes import WORDS, pack, unpack

LIBRARY = "triton"
TOKENS = 64
PLAIN = Tensor, Parameter  # no subclass with ideas of its own
SLACK = 2.0**-18  # of Σ |x| |M|, for sums in another order


class Coded(NamedTuple):
    """How any scheme's numbers are made of its codes: scale_k (values[code] - shift_k)."""

    codes: Tensor  # of all numbers, row after row, as `codes.pack` packs them
    bits: int
    values: tuple[float, ...] | None  # None: the code itself
    scale: Tensor  # float32, one for each block
    shift: Tensor | float  # likewise, or one for all
    block: int  # numbers in a block


class Form(NamedTuple):
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    tokens: int  # at most
    bits: int
    values: tuple[float, ...] | None
    shifts: bool
    block: int  # one that lies in tiles as the weight's
    bias: bool
    back: bool

    @property
    def tile(self) -> tuple[int, int]:
        return tile(self.dtype)


_agrees: dict[Form, bool] = {}


def tile(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of M that are made at a time; larger ones of float32, which tensor cores do not take, do not stay in registers."""
    return (16, 32) if dtype == torch.float32 else (32, 128)


def matrix_slow(coded: Coded, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """M (n, m)."""
    q = unpack(coded.codes, coded.bits, 0, shape[0] * shape[1])
    q = q.float() if coded.values is None else torch.tensor(coded.values, device=q.device)[q.int()]
    shift = coded.shift.view(-1, 1) if isinstance(coded.shift, Tensor) else coded.shift
    return ((q.view(-1, coded.block) - shift) * coded.scale.view(-1, 1)).view(shape).to(dtype)


def wanted(x: Tensor) -> bool:
    """Whether a product with x (…, features) may be made here: few ordinary tokens where Triton runs, and nobody looks on."""
    return (not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and (x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"))
            and type(x) in PLAIN and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and 0 < x.numel() <= TOKENS * x.shape[-1] and not (x.requires_grad and torch.is_grad_enabled())
            and not torch._C._are_functorch_transforms_active() and not torch._C._len_torch_dispatch_stack() and _runs(x.device))


@cache
def _runs(device: torch.device) -> bool:
    return find_spec(LIBRARY) is not None and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0))


def _fits(coded: Coded, m: int, wide: int) -> bool:
    """Whether rows of m are whole words and blocks, and a tile's columns are whole blocks or lie in one."""
    return m % coded.block == 0 and m % WORDS[coded.bits][0] == 0 and (wide % coded.block == 0 or coded.block % wide == 0 or coded.block == m)


def product(x: Tensor, bias: Tensor | None, coded: Coded | None, shape: tuple[int, int], back: bool = False) -> Tensor | None:
    """x Mᵀ + b, (…, m) -> (…, n), or x M, (…, n) -> (…, m), of an x that is `wanted`; None where the kernel cannot, or is not trusted."""
    wide = tile(x.dtype)[1]
    if coded is None or type(coded.codes) not in PLAIN or coded.codes.device != x.device or not _fits(coded, shape[1], wide):
        return None
    flat = x.reshape(-1, x.shape[-1])
    tokens = 16
    while tokens < len(flat):
        tokens *= 2
    form = Form(x.device, x.dtype, tokens, coded.bits, coded.values, isinstance(coded.shift, Tensor), coded.block if wide % coded.block == 0 else wide,
                bias is not None, back)
    if form not in _agrees:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        _agrees[form] = _trial(form)
    return _launch(flat, bias, coded, shape, form).view(*x.shape[:-1], -1) if _agrees[form] else None


def _launch(x: Tensor, bias: Tensor | None, coded: Coded, shape: tuple[int, int], form: Form) -> Tensor:
    from lorakit.kernels import fused_triton

    values = None if coded.values is None else _values(coded.values, x.device)
    with torch.cuda.device_of(x):
        return fused_triton.launch(x, bias, coded, values, shape, form)


@cache
def _values(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _trial(form: Form) -> bool:
    """Whether the kernel works and gives the definition's product, with some of every edge: half a tile, several sums of parts."""
    n, m = 8 * form.tile[0] + 8, 8 * form.tile[1] + form.block
    g = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device="cpu").to(form.device)

    with torch.inference_mode(False), torch.no_grad():
        codes = pack(torch.randint(0, 1 << form.bits, (n * m,), generator=g, dtype=torch.uint8, device="cpu"), form.bits).to(form.device)
        scale = drawn(n * m // form.block)
        coded = Coded(codes, form.bits, form.values, scale, drawn(len(scale)) if form.shifts else 0.5, form.block)
        x = drawn(form.tokens - 1, n if form.back else m).to(form.dtype)
        bias = drawn(n).to(form.dtype) if form.bias else None
        M = matrix_slow(coded, (n, m), form.dtype).double()
        M = M if form.back else M.mT
        want, slack = x.double() @ M + (0 if bias is None else bias.double()), x.double().abs() @ M.abs()
        try:
            y = _launch(x, bias, coded, (n, m), form)
            good = bool(((y - want).abs() <= torch.finfo(form.dtype).eps / 2 * want.abs() + SLACK * slack).all())
            why = "its products are wrong"
        except Exception as e:  # whatever a compiler or a driver raises
            good, why = False, f"{type(e).__name__}: {e}"
    if not good:
        warnings.warn(f"the Triton kernel for products with packed weights does not work on {form.device} with {form.dtype} and {form.bits} bits ({why}); "
                      "PyTorch makes them, more slowly", stacklevel=2)
    return good
