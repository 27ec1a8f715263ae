"""A mix as a run: its configuration, the statistics that a rule needs, each adapter's metrics before and after, a search over weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor, nn

import lorakit
from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.formats.files import read_json, write_json
from lorakit.formats.folder import Folder, beside
from lorakit.merges import ROWS
from lorakit.merges.base import build
from lorakit.merges.checkpoints import MixedCheckpoint, whole
from lorakit.merges.mix import MIX, Mixed
from lorakit.merges.search import SEARCHES, Found
from lorakit.merges.stats import COLLECT
from lorakit.models import EMBEDDED
from lorakit.proof import load_base_for
from lorakit.training import config as c
from lorakit.training import data as d
from lorakit.training.measure import evaluate
from lorakit.training.prepare import Prepared, prepare


class Mix(c.Part):
    """The keys of `lorakit mix`."""

    adapters: list[str] = Field(..., description="adapter folders; for a checkpoint, whole models, too")
    output: str | None = Field(None, description="folder to write")
    rule: str = Field("linear", description="a rule of `lorakit mix --rules`")
    weights: list[float] | None = Field(None, description="one for each adapter; default 1")
    to: Literal["adapter", "checkpoint"] | None = Field(None, description="what to write; default: an adapter, where no source is a whole model")
    rank: int | None = Field(None, description="of the result, an adapter")
    niter: int = Field(0, description="rounds of subspace iteration that bring a matrix to its rank, nearly; 0: exactly")
    base: str | None = Field(None, description="the base model; default: the one the first adapter names, where it is on this machine")
    options: dict[str, Any] = Field({}, description="the rule's own options")
    seed: int = Field(0, description="of what a rule draws")
    check_base: bool = Field(True, description="refuse adapters of different bases")
    search: str | None = Field(None, description="find the weights on the (few) rows of `data`: lorahub, or scan for one adapter")
    search_options: dict[str, Any] = Field({}, description="lorahub: budget, bound, penalty, seed; scan: grid")
    data: list[str | dict[str, Any]] = Field([], description="data for each adapter, in their order, or one for all: a file, or the keys of `data` in train")


def read(raw: Mapping[str, Any], where: str = "mix") -> Mix:
    """A checked configuration. LorakitError naming a wrong key with the nearest right one."""
    for k in raw:
        if k not in Mix.model_fields:
            raise LorakitError(f"{where}: unknown key `{k}`{near(k, Mix.model_fields)}")
    try:
        return Mix.model_validate(raw)
    except ValidationError as e:
        lines = [f"`{'.'.join(map(str, err['loc']))}`: {err['msg'][0].lower()}{err['msg'][1:]}" for err in e.errors()]
        raise LorakitError(f"{where}: {'; '.join(lines)}") from None


def sorted_out(words: Sequence[str], weights: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Adapters and weights from the command line: `--weights 0.6,0.4`, `-w 0.6 -w 0.4`, or `--weights 0.6 0.4`, whose second comes as an argument."""
    loose = [w for w in words if weights and _number(w) is not None and not Path(w).exists()]
    out = []
    for word in [w for many in weights for w in many.split(",")] + loose:
        if (x := _number(word)) is None:
            raise LorakitError(f"--weights: `{word}` is no number; mend: --weights 0.6,0.4")
        out.append(x)
    return [w for w in words if w not in loose], out or None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def at_hand(adapters: Sequence[str], base: str | None) -> str | None:
    """The base to use: the one that was named, or the adapters' own where it lies on this machine."""
    told = base or Folder(adapters[0]).base
    here = told and (told == "embedded" or Path(told) == EMBEDDED or Path(told).is_dir())
    return told if base or here else None


def run(m: Mix) -> Mixed | MixedCheckpoint:
    """Mixes and, with data, measures. Everything that can be wrong is said before a model is loaded."""
    if not m.adapters:
        raise LorakitError("mix: there is no adapter to mix; mend: name their folders, or a YAML file")
    if not m.output:
        raise LorakitError("mix: say where to write; mend: --output FOLDER, or `output` in the YAML file")
    models = [a for a in m.adapters if whole(a)]
    if models and m.to == "adapter":
        raise LorakitError(f"mix: {models[0]} is a whole model, which no adapter holds; mend: to checkpoint, or adapters alone")
    if models or m.to == "checkpoint":
        return _checkpoint(m)
    rule = build(m.rule, ROWS, m.options)
    if m.data and len(m.data) not in (1, len(m.adapters)):
        raise LorakitError(f"mix: {len(m.adapters)} adapters but data of {len(m.data)}; mend: one for each adapter, in their order, or one for all")
    name = at_hand(m.adapters, m.base)
    if m.data and name is None:
        raise LorakitError("mix: data is measured on the base, which is not at hand; mend: --base")
    model = None if name is None else load_base_for(Folder(m.adapters[0]), name)
    sets = [prepared(name, told) for told in m.data]
    found = _search(model, m, sets) if m.search else None
    stats = None
    if rule.needs and sets:
        stats = [collect(model, a, sets[n % len(sets)], rule.needs, m.check_base) for n, a in enumerate(m.adapters)]
    weights = found.weights if found else m.weights
    done = lorakit.mix(m.adapters, m.output, m.rule, weights=weights, rank=m.rank, base=model, stats=stats, seed=m.seed, check_base=m.check_base,
                       niter=m.niter, **m.options)
    more = {"metrics": measured(model, m, sets)} if sets else {}
    more |= {"search": found.to_dict()} if found else {}
    if more:
        write_json(Path(m.output) / MIX, read_json(Path(m.output) / MIX) | more)
    return done


def _checkpoint(m: Mix) -> MixedCheckpoint:
    """The mix as a whole model, without one in memory."""
    if bad := next((k for k in ("rank", "niter", "search", "data") if getattr(m, k)), None):
        raise LorakitError(f"mix: `{bad}` is for a mix that is an adapter, not for a checkpoint; mend: leave it out")
    return lorakit.mix_checkpoints(m.adapters, m.output, m.rule, weights=m.weights, base=m.base, seed=m.seed, check_base=m.check_base, **m.options)


def _search(model: nn.Module, m: Mix, sets: Sequence[Prepared]) -> Found:
    """Weights that make the loss on the data small."""
    if m.search not in SEARCHES:
        raise LorakitError(f"mix: unknown search `{m.search}`{near(m.search, SEARCHES)}")
    if m.weights is not None or len(sets) != 1:
        raise LorakitError(f"mix: search {m.search} finds the weights, on one data; mend: leave `weights` out, and give one `data`")
    known = inspect.signature(SEARCHES[m.search]).parameters
    for k in m.search_options:
        if k not in list(known)[3:]:
            raise LorakitError(f"mix: search {m.search} has no option `{k}`{near(k, list(known)[3:])}")
    names = [f"searched{n}_" for n in range(len(m.adapters))]
    with ExitStack() as stack:
        for name, adapter in zip(names, m.adapters, strict=True):
            lorakit.load(model, adapter, name, check_base=m.check_base)
            stack.callback(host.delete, model, name)
        found = SEARCHES[m.search](model, names, lambda model: evaluate(model, sets[0])["eval_loss"], **m.search_options)
    if not any(found.weights):
        raise LorakitError(f"mix: the search found nothing better than no adapter at all (loss {found.before:.4g}); mend: other adapters, or a larger budget")
    return found


def prepared(base: str, told: str | Mapping[str, Any]) -> Prepared:
    """Data as rows to measure on, all of it."""
    keys = {"train": told} if isinstance(told, str) else dict(told)
    return prepare(c.parse({"base": {"path": base}, "data": keys | {"eval": keys["train"]}}, "mix: data"))


def batches(p: Prepared, size: int = 8) -> Iterator[dict[str, Tensor]]:
    collate = d.Collator(p.tokenizer.pad_token_id)
    for n in range(0, len(p.heldout.rows), size):
        yield collate(p.heldout.rows[n : n + size])


def collect(model: nn.Module, adapter: str, p: Prepared, what: str, check_base: bool = True) -> dict[str, Tensor]:
    """The statistics of one adapter on its data."""
    with beside(model, Folder(adapter), check_base) as name:
        return COLLECT[what](model, name, batches(p))


def measured(model: nn.Module, m: Mix, sets: Sequence[Prepared]) -> list[dict[str, Any]]:
    """For each data: the metrics of the base, of every adapter alone, and of the mix."""
    folders = [Folder(a) for a in [*m.adapters, m.output]]
    out = []
    for p, told in zip(sets, m.data, strict=True):
        row: dict[str, Any] = {"data": told, "base": evaluate(model, p)}
        for f in folders:
            with beside(model, f, m.check_base) as name:
                host.state_of(model).active = {name: 1.0}
                row["mix" if f is folders[-1] else str(f.path)] = evaluate(model, p)
        out.append(row)
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The metrics in lines."""
    for row in rows:
        yield f"{row['data']}:"
        for who in (k for k in row if k != "data"):
            yield f"  {who}: " + ", ".join(f"{k} {v:.4g}" for k, v in row[who].items())
