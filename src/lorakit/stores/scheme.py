"""How a matrix is kept in fewer bits: the contract, and the names people know.

A scheme is frozen hyper-parameters. It makes a dict of tensors, the parts, of a matrix M (n, m), and numbers of them again; blocks lie
along the rows of M, one row after another.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorakit.errors import LorakitError, near
from lorakit.kernels.fused import Coded

Parts = dict[str, Tensor]
CHUNK = 1 << 20  # numbers made at a time on a CPU: 4 MiB of float32
FEW = 64  # tokens up to which making the numbers costs more than the product
SCHEMES: dict[str, Callable[..., Scheme]] = {}
KINDS: dict[str, type[Scheme]] = {}


class Scheme(ABC):
    """Quantises matrices. `numbers(parts, …)` of `parts(M)` is M up to rounding."""

    kind: ClassVar[str]
    title: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    bits: int  # of a code

    @property
    def eps(self) -> float:
        """About the relative error of a Gaussian matrix."""
        return 2.0 * 2**-self.bits

    @abstractmethod
    def parts(self, M: Tensor) -> Parts:
        """(n, m) floating point -> the tensors that stand for it."""

    @abstractmethod
    def numbers(self, parts: Parts, start: int, stop: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The numbers start … stop - 1 of the matrix, row after row, (stop - start,)."""

    @abstractmethod
    def layout(self, n: int, m: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part of an (n, m) matrix."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Ranges of numbers begin at multiples of this."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The word for it: nf4, int8, …"""

    def fits(self, n: int, m: int) -> None:
        """LorakitError for a matrix that this scheme cannot hold."""
        if not n * m:
            raise LorakitError(f"a matrix of {n} x {m} has nothing to quantise")

    def bytes(self, n: int, m: int) -> int:
        """What an (n, m) matrix takes."""
        return sum(_size(s) * d.itemsize for s, d in self.layout(n, m).values())

    def opened(self, parts: Parts) -> Parts:
        """Parts for `numbers` of all pieces, with what is quicker made at once."""
        return parts

    def by_rows(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Parts] | None:
        """M = s ∘ M' with a number s for every row, (n,), and the parts of M', which is exact in this dtype and quicker to make; None: no such."""
        return None

    def coded(self, parts: Parts, shape: tuple[int, int]) -> Coded | None:
        """What `numbers` makes its numbers of, for a kernel that makes them itself; None: nothing so simple."""
        return None

    def matrix(self, parts: Parts, n: int, m: int, dtype: torch.dtype) -> Tensor:
        """The whole matrix (n, m), a piece at a time."""
        size = n * m
        chunk = self.chunk(m, parts, dtype)
        if size <= chunk:
            return self.numbers(parts, 0, size, (n, m), dtype).view(n, m)
        out = torch.empty(size, dtype=dtype, device=next(iter(parts.values())).device)
        parts = self.opened(parts)
        for a in range(0, size, chunk):
            b = min(a + chunk, size)
            out[a:b] = self.numbers(parts, a, b, (n, m), dtype)
        return out.view(n, m)

    def shifted(self, parts: Parts, delta: Tensor, shape: tuple[int, int], slack: float) -> Parts:
        """The parts of M + delta, but for rounding (`slack`, a norm). LorakitError where this scheme cannot say it."""
        raise LorakitError(f"{self.name} has no zero points, so an update cannot go into them; mend: a base of whole numbers (int4, …), or another route")

    def rows(self, parts: Parts, at: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The rows `at` of the matrix, or None where they are no whole bytes and blocks."""
        return None

    def chunk(self, m: int, parts: Parts, dtype: torch.dtype, tokens: int = 0) -> int:
        """How many numbers to make at a time: whole rows where they are whole blocks, else whole blocks; on a GPU all of them.

        In 16 bits, where a product costs more to begin, twice as many, and eight times for many tokens, unless larger numbers are made on the way.
        """
        if next(iter(parts.values())).device.type != "cpu":
            return 1 << 62
        unit = m if m % self.step == 0 else self.step
        some = CHUNK * ((2 if tokens <= FEW else 8) if dtype.itemsize == 2 and self.direct(parts, dtype) else 1)
        return max(1, some // unit) * unit

    def direct(self, parts: Parts, dtype: torch.dtype) -> bool:
        """Whether `numbers` makes numbers of this dtype from codes at once."""
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | dataclasses.asdict(self)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def scheme(kind: str, **names: Mapping[str, Any]) -> Callable[[type], type]:
    """Class decorator: makes a frozen dataclass of it and registers it, and a name for each of its usual settings."""

    def add(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True)(cls)
        cls.kind, KINDS[kind] = kind, cls
        for name, fields in names.items():
            SCHEMES[name] = lambda fields=fields, **more: cls(**fields | more)
        return cls

    return add


def scheme_of(given: str | Mapping[str, Any] | Scheme) -> Scheme:
    """A scheme from its name, or {name: nf4, double_quant: true}, or what `to_dict` gave. LorakitError with the nearest name or option."""
    if isinstance(given, Scheme):
        return given
    options = {"name": given} if isinstance(given, str) else dict(given)
    kind, name = options.pop("kind", None), options.pop("name", None)
    if kind is not None and kind not in KINDS:
        raise LorakitError(f"quantize: unknown kind `{kind}`{near(str(kind), KINDS)}")
    if kind is None and name not in SCHEMES:
        raise LorakitError(f"quantize: unknown scheme `{name}`{near(str(name), SCHEMES)}")
    cls = KINDS[kind] if kind is not None else type(SCHEMES[name]())
    known = [f.name for f in dataclasses.fields(cls)]
    for k in options:
        if k not in known:
            raise LorakitError(f"quantize: {name or kind} has no option `{k}`{near(k, known)}")
    return cls(**options) if kind is not None else SCHEMES[name](**options)


def has_values(t: Tensor) -> bool:
    """Whether a tensor is more than a shape: not on the meta device, and none that stands for another while a plan is made."""
    return t.device.type != "meta" and not isinstance(t, FakeTensor)


def checked(M: Tensor, what: str) -> Tensor:
    """The matrix as contiguous float32. LorakitError for NaN or infinity, which would spoil a whole block silently."""
    if not torch.compiler.is_compiling() and not torch.isfinite(M).all():
        raise LorakitError(f"{what}: the weight holds NaN or infinity, which cannot be quantised")
    return M.detach().float().contiguous()
