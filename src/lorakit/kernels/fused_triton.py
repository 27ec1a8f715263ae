"""The Triton kernel of `fused`: tiles of a packed matrix are made in registers and multiplied with at once. Imported by `fused` alone, where it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.kernels.codes import WORDS
from lorakit.kernels.fused import Coded, Form

PROGRAMS = 512  # to keep a GPU busy: where there are fewer tiles of outputs, a sum is made in parts


@triton.jit
def _spread(v, R: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr):
    """(R, BLOCKS) -> (R, C), each for its block of columns."""
    return tl.reshape(tl.broadcast_to(v[:, :, None], (R, BLOCKS, C // BLOCKS)), (R, C))


@triton.jit
def _tile(row, column, codes, values, scale, shift, number, n, in_row, words, blocks, block, R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
          PER: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, SHIFTS: tl.constexpr):
    """M[row : row + R, column : column + C] in float32, zero beyond its edges."""
    rows = row + tl.arange(0, R)
    w = column // PER + tl.arange(0, C // PER)
    inside = (rows < n)[:, None] & (w < in_row)[None, :]
    at = rows.to(tl.int64)[:, None] * in_row + w[None, :]
    word = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    if WIDE & 4:
        high = tl.load(codes + words + at // 2, mask=inside, other=0).to(tl.int32)
        word |= (high >> (4 - at % 2 * 4).to(tl.int32) & 15) << 8
    if WIDE & 2:
        high = tl.load(codes + words + words // 2 * (WIDE // 4 % 2) + at // 4, mask=inside, other=0).to(tl.int32)
        word |= (high >> (6 - at % 4 * 2).to(tl.int32) & 3) << (8 + (WIDE & 4))
    turn = (PER - 1 - tl.arange(0, PER)) * BITS
    code = tl.reshape(word[:, :, None] >> turn[None, None, :] & (1 << BITS) - 1, (R, C))
    if VALUES:
        q = tl.load(values + code)
    else:
        q = code.to(tl.float32)
    k = column // block + tl.arange(0, BLOCKS)
    inside = (rows < n)[:, None] & (k < blocks)[None, :]
    at = rows.to(tl.int64)[:, None] * blocks + k[None, :]
    if SHIFTS:
        q -= _spread(tl.load(shift + at, mask=inside, other=0), R, BLOCKS, C)
    else:
        q -= number
    return q * _spread(tl.load(scale + at, mask=inside, other=0), R, BLOCKS, C)


@triton.jit
def _product(y, x, bias, codes, values, scale, shift, number, t, n, m, in_row, words, blocks, block, steps, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
             BITS: tl.constexpr, PER: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, SHIFTS: tl.constexpr, BIAS: tl.constexpr,
             BACK: tl.constexpr):
    """A tile of outputs for all tokens, over so many steps of the sum: (t, n) = x Mᵀ + b, or with BACK (t, m) = x M; y has a layer for each part of the sum."""
    OUT: tl.constexpr = C if BACK else R
    IN: tl.constexpr = R if BACK else C
    outs = m if BACK else n
    ins = n if BACK else m
    part = tl.program_id(1)
    token, out = tl.arange(0, T), tl.program_id(0) * OUT + tl.arange(0, OUT)
    acc = tl.zeros((T, OUT), tl.float32)
    for a in range(part * steps * IN, min((part + 1) * steps * IN, ins), IN):
        i = a + tl.arange(0, IN)
        some = tl.load(x + token[:, None] * ins + i[None, :], mask=(token < t)[:, None] & (i < ins)[None, :], other=0)
        row, column = (a, tl.program_id(0) * OUT) if BACK else (tl.program_id(0) * OUT, a)
        M = _tile(row, column, codes, values, scale, shift, number, n, in_row, words, blocks, block, R, C, BITS, PER, WIDE, BLOCKS, VALUES, SHIFTS)
        M = M.to(some.dtype)
        acc = tl.dot(some, M if BACK else tl.trans(M), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + out, mask=out < tl.where(part == 0, outs, 0), other=0).to(tl.float32)[None, :]
    inside = (token < t)[:, None] & (out < outs)[None, :]
    tl.store(y + (part * t + token)[:, None] * outs + out[None, :], acc.to(y.dtype.element_ty), mask=inside)


def launch(x: Tensor, bias: Tensor | None, coded: Coded, values: Tensor | None, shape: tuple[int, int], form: Form) -> Tensor:
    """(t, m) -> (t, n), or with `form.back` (t, n) -> (t, m); t at most `form.tokens`."""
    (n, m), (R, C), (per, wide) = shape, form.tile, WORDS[coded.bits]
    size, out, steps = (m, C, triton.cdiv(n, R)) if form.back else (n, R, triton.cdiv(m, C))
    tiles = triton.cdiv(size, out)
    each = triton.cdiv(steps, max(1, min(PROGRAMS // tiles, steps // 4)))
    parts = triton.cdiv(steps, each)
    y = torch.empty(parts, len(x), size, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    shift, number = (coded.shift, 0.0) if form.shifts else (None, coded.shift)
    read = (None if v is None else v.contiguous() for v in (x, bias, coded.codes, values, coded.scale, shift))
    _product[tiles, parts](y, *read, number, len(x), n, m, m // per, len(coded.codes) * 8 // wide, m // coded.block, coded.block, each,
                           T=form.tokens, R=R, C=C, BITS=coded.bits, PER=per, WIDE=wide, BLOCKS=C // form.block, VALUES=values is not None,
                           SHIFTS=form.shifts, BIAS=form.bias, BACK=form.back, enable_fp_fusion=True)
    return y[0] if parts == 1 else y.sum(0).to(x.dtype)
