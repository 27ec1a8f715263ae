"""What a merge rule is: (task vectors, weights, options) -> task vector, for one target at a time.

A task vector ΔW (o, i) is what an adapter adds to a weight. It is kept as its factors B A where it has some: products,
norms and sums of such vectors need no matrix of the layer's size.

    Rule         any of them: `merge`
    Spanning     Σ c_t ΔW_t, its coefficients found from the inner products <ΔW_s, ΔW_t>; exact, in the factors
    Elementwise  a pipeline over numbers, sparsify → elect → combine, in a space: the matrices ("dense") or the KnOTS basis
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.errors import LorakitError, near
from lorakit.kernels.svd import fast_svd, lower_rank
from lorakit.merges.select import Cuts, largest
from lorakit.merges.spaces import SPACES
from lorakit.method import checked, choice

RULES: dict[str, type[Rule]] = {}
SCOPES = ("tensor", "global")  # of a threshold or an angle: one for each target, or one for all targets of an adapter
BLOCK = 1 << 18  # numbers of a matrix that are worked on at a time: what a rule makes on its way stays in the processor's cache, and needs no memory


@dataclass(frozen=True)
class Vector:
    """A task vector of one target: its factors (B (…, o, r), A (…, r, i)), or a matrix (…, o, i)."""

    factors: tuple[Tensor, Tensor] | None = None
    matrix: Tensor | None = None
    scale: float = 1.0  # what of B is the adapter's own factor (alpha / r): PEFT's rules ask

    @classmethod
    def zero(cls, shape: Sequence[int]) -> Vector:
        """Nothing, of rank 0."""
        *stack, o, i = shape
        return cls((torch.zeros(*stack, o, 0), torch.zeros(*stack, 0, i)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape) if self.factors is None else (*self.factors[0].shape[:-1], self.factors[1].shape[-1])

    @property
    def rank(self) -> int | None:
        """Of the factors; None for a matrix."""
        return None if self.factors is None else self.factors[1].shape[-2]

    def dense(self) -> Tensor:
        return self.matrix.float() if self.factors is None else self.factors[0].float() @ self.factors[1].float()

    def rows(self, at: Tensor) -> Tensor:
        """Some rows of the matrix, in float32; those of every matrix of a stack."""
        return self.matrix[..., at, :].float() if self.factors is None else self.factors[0][..., at, :].float() @ self.factors[1].float()

    def dot(self, other: Vector) -> float:
        """<ΔW, ΔW'> = Σ (Bᵀ B') ⊙ (A A'ᵀ), the sum of products of their entries."""
        if self.factors is None and other.factors is not None:
            return other.dot(self)
        if self.factors is None:
            return sum(float((a.double() * b.double()).sum()) for a, b in blocks(self.matrix, other.matrix))
        B, A = (t.double() for t in self.factors)
        if other.factors is None:
            return float((sum(b.mT @ m.double() for b, m in blocks(B, other.matrix)) * A).sum())
        B2, A2 = (t.double() for t in other.factors)
        return float(((B.mT @ B2) * (A @ A2.mT)).sum())

    def norm(self) -> float:
        return math.sqrt(max(self.dot(self), 0.0))


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each of several matrices (…, o, ·), all rows in the end."""
    rows = max(1, BLOCK * tensors[0].shape[-2] // max(max(t.numel() for t in tensors), 1))
    return zip(*(t.split(rows, -2) for t in tensors), strict=True)


def total(vectors: Sequence[Vector], coefficients: Sequence[float]) -> Vector:
    """Σ c_t ΔW_t: [c_1 B_1 … c_n B_n] [A_1; …; A_n] where all have factors, else a matrix."""
    if all(v.factors is not None for v in vectors):
        some = [(v.factors, c) for v, c in zip(vectors, coefficients, strict=True) if c and v.rank]
        if not some:
            return Vector.zero(vectors[0].shape)
        dtype = functools.reduce(torch.promote_types, (t.dtype for f, _ in some for t in f))
        return Vector((torch.cat([f[0].to(dtype) * c for f, c in some], -1), torch.cat([f[1].to(dtype) for f, _ in some], -2)))
    out = torch.zeros(vectors[0].shape)
    for v, c in zip(vectors, coefficients, strict=True):
        out += v.dense() * c
    return Vector(matrix=out)


def gram(vectors: Sequence[Vector]) -> Tensor:
    """(n, n): the inner products of task vectors, in float64."""
    G = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for s, a in enumerate(vectors):
        for t, b in enumerate(vectors[: s + 1]):
            G[s, t] = G[t, s] = a.dot(b)
    return G


def cosines(G: Tensor) -> Tensor:
    """(n, n): cosines of the angles between task vectors, from their inner products; 0 beside a vector that is zero."""
    size = G.diagonal().clamp_min(0).sqrt()
    scale = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    return (G * scale * scale[:, None]).clamp(-1, 1)


@dataclass(frozen=True)
class At:
    """What a rule may know beside the task vectors of one target."""

    path: str = ""
    gen: torch.Generator | None = None  # for what is drawn; None: torch's own
    whole: Any = None  # what `Rule.survey` found in all targets
    stats: Sequence[Tensor | None] = field(default=())  # a statistic of each source here


Stream = Callable[[], Iterable[tuple[str, list[Vector]]]]  # the task vectors of every target, read anew at each call


class Rule(ABC):
    """A way to make one task vector of several. Its fields are its options."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]
    needs: ClassVar[str] = ""  # a statistic of each source and target: "gram", "fisher"
    full: ClassVar[bool] = False  # the result may be a matrix of full rank: where no rank is given, it is brought to that of the largest source
    lowers: ClassVar[bool] = False  # and so is one that has factors
    weighs: ClassVar[bool] = True  # weights mean something

    def check(self, weights: Sequence[float]) -> None:
        """LorakitError where a rule cannot do with these weights."""

    def without_base(self, weights: Sequence[float]) -> None:
        """LorakitError unless whole weights can be mixed as updates are: what the rule makes of equal ones is the same again."""
        raise LorakitError(f"{self.name} works on what was added to a base; mend: base=, or --base")

    def survey(self, stream: Stream, n: int) -> Any:
        """What must be known of all targets before the first is merged; None where nothing must."""

    @abstractmethod
    def merge(self, vectors: Sequence[Vector], weights: Sequence[float], at: At) -> Vector: ...

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The options with their default values."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def rule(name: str, title: str, formula: str, paper: str = "") -> Callable[[type], type]:
    """Class decorator: makes a frozen dataclass of it and registers it."""

    def add(cls: type) -> type:
        cls = dataclass(frozen=True)(checked(cls, name))
        cls.name, cls.title, cls.formula, cls.paper, RULES[name] = name, title, formula, paper, cls
        return cls

    return add


def share(name: str, value: float, low: float = 0.0) -> None:
    """LorakitError unless it is a share of all: above `low`, at most 1."""
    if not isinstance(value, int | float) or not low < value <= 1:
        raise LorakitError(f"{name} must be above {low:g} and at most 1, not {value}")


class Spanning(Rule):
    """Σ c_t ΔW_t. scope: the coefficients come from each target's inner products, or from those of all targets together."""

    @abstractmethod
    def coefficients(self, G: Tensor, weights: Sequence[float]) -> Sequence[float]:  # G (n, n): inner products
        ...

    def survey(self, stream, n):
        if getattr(self, "scope", "tensor") == "global":
            return sum((gram(v) for _, v in stream()), torch.zeros(n, n, dtype=torch.float64))
        return None

    def merge(self, vectors, weights, at):
        return total(vectors, self.coefficients(gram(vectors) if at.whole is None else at.whole, weights))


class Elementwise(Rule):
    """sparsify → elect → combine over the numbers of the task vectors, in the space of its field `space`."""

    full = True

    @property
    def kept(self) -> tuple[float, ...]:
        """Shares of the largest magnitudes whose smallest member the rule must know: its thresholds."""
        return ()

    @abstractmethod
    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float], cuts: Sequence[Sequence[float]], gen: torch.Generator | None) -> Tensor:
        """One tensor of several of one shape. cuts: for each of them, the thresholds that `kept` asks for."""
        ...

    def survey(self, stream, n):
        if getattr(self, "scope", "tensor") != "global":
            return None

        def read() -> Iterator[Sequence[Tensor]]:
            return (SPACES[self.space](v)[0] for _, v in stream())

        return [c.found for c in Cuts.of(read, n, self.kept)]

    def merge(self, vectors, weights, at):
        tensors, back = SPACES[self.space](vectors)
        cuts = at.whole or [largest(t, self.kept, BLOCK) for t in tensors]
        out = torch.empty_like(tensors[0])
        for to, *some in blocks(out, *tensors):
            to.copy_(self.combine(some, weights, cuts, at.gen))
        return Vector(**back(out))


def space() -> Any:
    """The field of an elementwise rule that says where it works: on the matrices, or in the KnOTS basis (arXiv 2410.19735)."""
    return choice("dense", SPACES)


def scope() -> Any:
    return choice("tensor", SCOPES)


@torch.no_grad()
def project(v: Vector, rank: int | None, niter: int = 0, more: int = 0) -> tuple[Tensor, Tensor, float, float]:
    """B (…, o, q), A (…, q, i) of this rank nearest to a task vector (Eckart and Young); the norm of what is left out, and of the vector.

    rank None: its own, exactly. A matrix D with o ≤ i: D Dᵀ = U diag(σ²) Uᵀ in float64, B = U_q, A = U_qᵀ D; else the same of Dᵀ. niter above 0, of a
    matrix: nearly so, by that many rounds of subspace iteration on q + more directions (arXiv 0909.4061); what is left out is measured all the same.
    """
    *_, o, i = v.shape
    most = min(o, i)
    if v.factors is not None:
        B, A = v.factors
        if v.rank == 0:
            return torch.zeros(*B.shape[:-1], 1), torch.zeros(*A.shape[:-2], 1, A.shape[-1]), 0.0, 0.0
        if v.rank <= min(most, rank or most):
            return B, A, 0.0, v.norm()
        return lower_rank(B, A, min(most, rank or most))
    q, D = min(rank or most, most), v.matrix.float()
    if niter and q + more < most:
        U, S, V = fast_svd(D, q + more, niter, torch.Generator().manual_seed(0))
        B, A = U[..., :q] * S[..., None, :q], V[..., :q, :]
        return B, A, math.sqrt(sum(float((d - b @ A).double().square().sum()) for d, b in blocks(D, B))), v.norm()
    S = D if o <= i else D.mT
    G = torch.zeros(*S.shape[:-1], S.shape[-2], dtype=torch.float64)
    for part in S.split(1024, -1):  # no copy of the whole in float64
        G += part.double() @ part.double().mT
    values, U = torch.linalg.eigh(G)
    U = U[..., -q:].flip(-1)
    rest = (U.mT @ S.double()).float() if S.numel() < 1 << 22 else U.float().mT @ S
    left, whole = (float(x.clamp_min(0).sum().sqrt()) for x in (values[..., : most - q], values))
    B, A = (U.float(), rest) if o <= i else (rest.mT.contiguous(), U.float().mT.contiguous())
    return B, A, left, whole


def build(name: str, rows: dict[str, tuple[type[Rule], dict[str, Any]]], options: dict[str, Any]) -> Rule:
    """The rule of a name with its options. LorakitError with the nearest name of either."""
    word = name.lower().replace("_", "-").replace(" ", "-")
    if word not in rows:
        raise LorakitError(f"unknown rule `{name}`{near(word, rows) or '; known are ' + ', '.join(rows)}")
    cls, preset = rows[word]
    fields = [f.name for f in dataclasses.fields(cls)]
    for k in options:
        if k not in fields:
            raise LorakitError(f"{word} has no option `{k}`{near(k, fields)}{'' if fields else '; it has none'}")
    return cls(**preset | options)
