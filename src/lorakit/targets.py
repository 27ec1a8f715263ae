"""Which modules get an adapter: names, regular expressions, keywords, layer ranges. Linear in the number of modules.

    "all-linear"          every linear layer except the output head (the default)
    "attention", "mlp"    linear layers inside, or beside, attention blocks; told by the names of modules and classes
    "model", "attention-blocks"   the whole model, or every attention: for methods that go around a module's call
    "attention-out", "mlp-out", "block-outputs"   the last linear layer of each block's attention, of its feed-forward part, both
    ["q_proj", "v_proj"]  modules whose path ends with one of the names ("q_proj,v_proj" is the same); an nn.MultiheadAttention
                          stands for its in-projection and its out-projection
    r".*\\.layers\\.[01]\\..*_proj"   a regular expression for the whole path

Parameters that no layer call stands for are named by `select_parameters`: ["experts.gate_up_proj"], or "experts" for all that
hold the matrices of fused experts, "norms" for the gains and biases of all normalisation layers. Every name must match something; an error lists
the nearest names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lorakit.errors import LorakitError, near
from lorakit.host import walk
from lorakit.sites import adaptable, fused, linear_like, plain, reads, whole_site

OUTPUTS = {"attention-out": (True,), "mlp-out": (False,), "block-outputs": (True, False)}  # word -> in attention or not
AROUND = {"model": "model", "attention-blocks": "attention"}  # word -> the whole modules it means
KEYWORDS = ("all-linear", "attention", "mlp", *OUTPUTS, *AROUND)
_OUT = re.compile(r"(?:^|\.)(?:o|o_proj|out_proj|c_proj|down_proj|fc2|wo|w2|lin2|out_lin|dense_4h_to_h|(?:output|attention|self_attention)\.dense)$")
_ATTENTION = re.compile(r"attn|attention", re.I)
_NORM = re.compile(r"norm(?!al)", re.I)
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def heads(model: nn.Module) -> set[int]:
    """ids of the modules that turn hidden states into outputs: the language-model head and classification heads."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    out = set() if head is None else {id(head)}
    for name, child in model.named_children():  # heads sit at the top of a model, beside its body
        if isinstance(child, nn.Linear) and name in ("score", "classifier", "lm_head", "qa_outputs", "head", "proj_out", "cls"):
            out.add(id(child))
    return out


def classifier(model: nn.Module) -> list[str]:
    """Names of the freshly made head of a classification model, which has to be trained and saved whole."""
    kinds = ("Classification", "QuestionAnswering")
    if not any(k in type(model).__name__ for k in kinds):
        return []
    return [n for n, c in model.named_children() if n in ("score", "classifier", "qa_outputs") and next(c.parameters(), None) is not None]


def _keyword(model: nn.Module, word: str, every: dict[str, nn.Module]) -> list[str]:
    if word in AROUND:
        return _around(model, AROUND[word], every)
    skip = heads(model)
    linear = list(dict.fromkeys(p for n, m in every.items() if (linear_like(m) and id(m) not in skip) or reads(m) for p in _stands_for(n, m)))
    if word == "all-linear":
        return linear
    inside = {n: any(_ATTENTION.search(part) for part in n.split(".")) or _in_attention_class(n, every) for n in linear}
    numbered = [n for n in linear if _NUMBER.search(n)]  # inside a repeated block; poolers and projections are neither
    if word not in OUTPUTS:
        return [n for n in numbered if inside[n] == (word == "attention")]
    out = [n for n in numbered if _OUT.search(n) and inside[n] in OUTPUTS[word]]
    if not out:
        raise LorakitError(f"target_modules: `{word}` knows the last layers of blocks by common names, and none of {', '.join(linear[:6])} … is one; "
                           "mend: name them")
    return out


def _around(model: nn.Module, kind: str, every: dict[str, nn.Module]) -> list[str]:
    """Modules that a method goes around: the model itself, or every attention."""
    where = {"": model} if kind == "model" else every
    out = [n for n, m in where.items() if (site := whole_site(m)) and site.whole == kind]
    if not out:
        what = "input embeddings" if kind == "model" else "attention with the layers q_proj, k_proj, v_proj and o_proj"
        raise LorakitError(f"this {type(model).__name__} has no {what}, which this method needs")
    return out


def _in_attention_class(path: str, every: dict[str, nn.Module]) -> bool:
    parent = path.rpartition(".")[0]
    return bool(parent) and bool(_ATTENTION.search(type(every[parent]).__name__))


def _stands_for(path: str, module: nn.Module) -> list[str]:
    """The targets that a module's name means: itself, or what it reads without calling it."""
    return [f"{path}.{k}" for k in reads(module)] or [path]


def _carries(module: nn.Module) -> bool:
    return adaptable(module) or bool(reads(module))


def norms(module: nn.Module) -> list[str]:
    """Names of a normalisation layer's parameters; nothing for any other module."""
    if not _NORM.search(type(module).__name__) or next(module.children(), None) is not None:
        return []
    return [n for n, p in module._parameters.items() if p is not None]


WORDS = {"experts": (fused, "fused experts"), "norms": (norms, "normalisation layers")}  # for parameters -> what they stand for in a module


def suffixes(path: str) -> Iterable[str]:
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _regex(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise LorakitError(f"target_modules: {pattern!r} is not a regular expression: {e}") from None


def _named(names: Sequence[str], every: dict[str, nn.Module], what: str) -> list[str]:
    wanted, hit = set(names), dict.fromkeys(names, False)
    out = []
    for path, module in every.items():
        found = [s for s in suffixes(path) if s in wanted]
        if found and _carries(module):
            out += _stands_for(path, module)
        for s in found:
            hit[s] = hit[s] or _carries(module)
    for name, ok in hit.items():
        if not ok:
            raise LorakitError(_unmatched(name, every, what))
    return list(dict.fromkeys(out))


def _unmatched(name: str, every: dict[str, nn.Module], what: str) -> str:
    bad = next((m for p, m in every.items() if p == name or p.endswith("." + name)), None)
    if bad is not None:
        inside = sorted({p.rsplit(".", 1)[1] for p, m in every.items() if f"{name}." in p and adaptable(m)})
        hint = f"; mend: name the layers inside it: {', '.join(inside)}" if inside else ""
        own = [n for n, p in bad._parameters.items() if p is not None]
        hint = hint or (f"; mend: name a parameter of it instead, target_parameters: [{name}.{own[0]}]" if own else "")
        return f"{what}: `{name}` is a {type(bad).__name__}, which no adapter can be put on{hint}"
    leaves = {p.rsplit(".", 1)[-1] for p, m in every.items() if adaptable(m)}
    return f"{what}: no module is called `{name}`{near(name, sorted(leaves)) or '; adaptable are ' + ', '.join(sorted(leaves)[:12])}"


def layer_index(path: str, pattern: str | None = None) -> int | None:
    """The number of the repeated block a module is in: the first number in its path, or the one after `pattern`."""
    found = re.search(rf"(?:^|\.){pattern}\.(\d+)(?=\.|$)", path) if pattern else _NUMBER.search(path)
    return int(found.group(1)) if found else None


def layer_numbers(layers: str | int | Sequence[int]) -> set[int]:
    """{0, 1, 2, 5} from [0, 1, 2, 5], 5, or "0-2,5"."""
    if isinstance(layers, int):
        return {layers}
    if not isinstance(layers, str):
        return {int(n) for n in layers}
    out: set[int] = set()
    for part in layers.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise LorakitError(f"layers: {layers!r} is not a list of numbers and ranges like 0-3,7")
        out |= set(range(int(low), int(high or low) + 1))
    return out


def select(model: nn.Module, targets: str | Sequence[str] = "all-linear", exclude: str | Sequence[str] = (),
           layers: str | int | Sequence[int] | None = None, layers_pattern: str | None = None) -> list[str]:
    """Paths of the target modules, in model order. Raises LorakitError where nothing, or one of several names, matches."""
    every = _modules(model)
    out = _by(model, targets, every, "target_modules")
    if exclude:
        gone = set(_by(model, exclude, every, "exclude_modules"))
        out = [n for n in out if n not in gone]
    if layers is not None:
        there = {layer_index(n, layers_pattern) for n in out}
        last = re.fullmatch(r"last-(\d+)", layers) if isinstance(layers, str) else None
        keep = set(sorted(t for t in there if t is not None)[-int(last[1]) :]) if last else layer_numbers(layers)
        if last and len(keep) < int(last[1]):
            raise LorakitError(f"layers: {layers} of {len(keep)} layers with a target")
        if missing := sorted(keep - there):
            raise LorakitError(f"layers_to_transform: no target in layer {missing[0]}; there are layers "
                               f"{min((t for t in there if t is not None), default='none')} to {max((t for t in there if t is not None), default='none')}")
        out = [n for n in out if layer_index(n, layers_pattern) in keep]
    if not out:
        kinds = sorted({n.rsplit(".", 1)[-1] for n, m in every.items() if adaptable(m)})
        raise LorakitError(f"target_modules {targets!r} leaves nothing to adapt; adaptable modules are called {', '.join(kinds[:12]) or '(none)'}")
    return out


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in walk(model) if n}


def select_parameters(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """Paths of parameters by the end of their path, in model order; "experts" and "norms" mean all of them. A plain layer's weight is the layer."""
    every = {"": model} | _modules(model)
    names = [names] if isinstance(names, str) else list(names)
    wanted, hit = set(names) - {*WORDS}, dict.fromkeys(names, False)
    own = {f"{n}.{k}" if n else k: (n, k) for n, m in every.items() for k, p in m._parameters.items() if p is not None}
    out = []
    for path, (module, name) in own.items():
        found = [s for s in suffixes(path) if s in wanted]
        found += [w for w, (of, _) in WORDS.items() if w in hit and name in of(every[module])]
        if found:
            out.append(module if name == "weight" and plain(every[module]) else path)
        hit |= dict.fromkeys(found, True)
    for name, ok in hit.items():
        if not ok and name in WORDS:
            raise LorakitError(f"target_parameters: this {type(model).__name__} has no {WORDS[name][1]}")
        if not ok:
            ends = {".".join(p.split(".")[-2:]) for p in own}
            raise LorakitError(f"target_parameters: no parameter is called `{name}`{near(name, sorted(ends))}")
    return out


def _by(model, targets, every, what) -> list[str]:
    if isinstance(targets, str):
        if targets in KEYWORDS:
            return _keyword(model, targets, every)
        if re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*", targets):
            return _named([t.strip() for t in targets.split(",")], every, what)
        regex = _regex(targets)
        hit = [n for n, m in every.items() if regex.fullmatch(n) and _carries(m)]
        if not hit:
            kinds = sorted({n for n, m in every.items() if adaptable(m)})
            raise LorakitError(f"{what}: the regular expression {targets!r} matches no adaptable module's whole path; one path is `{(kinds or ['none'])[0]}`")
        return list(dict.fromkeys(p for n in hit for p in _stands_for(n, every[n])))
    return _named(list(targets), every, what)


def weight_in(path: str, names: Iterable[str]) -> str:
    """The name that a checkpoint has for a module's weight, with or without the model's prefix. LorakitError where none, or several, fit."""
    want, every = f"{path}.weight", list(names)
    found = [n for n in every if n == want or n.endswith(f".{want}") or want.endswith(f".{n}")]
    if want in found or len(found) == 1:
        return want if want in found else found[0]
    raise LorakitError(f"the base holds no tensor for `{want}`{near(want, every)}")
