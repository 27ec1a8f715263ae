"""Evidence: fingerprints of the base, the size of every update, logits on fixed probe inputs. What `verify` recomputes.

A fingerprint has two digests per tensor. `exact`: sha256 of its bytes. `values`: of up to 65,536 evenly spaced elements
rounded to bfloat16, which stays the same when a checkpoint is loaded in float32, bfloat16 or float16 kept in float32.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.host import find_state, slots, walk
from lorakit.maps import each
from lorakit.stores import guest
from lorakit.stores.dense import held
from lorakit.stores.layer import PREFIX
from lorakit.stores.shards import every, part, sharded, whole

SAMPLE = 65_536
PROBE_ROWS, PROBE_LENGTH, PROBE_KEEP = 3, 12, 8


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters and saved buffers, tied ones once, without what an adapter replaces whole."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    targets = slots(model)
    whole = {p for p, s in targets.items() if any(m.replaces for m in s.methods.values())}
    absorbed = {id(t): store.tensors(s.absorbed.kept)[k] for s in targets.values() if s.absorbed for store in [s.site.store]
                for k, t in store.tensors(store.take()).items()}
    for path, module in walk(model):
        if path in whole:
            continue
        names = {**module._parameters, **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}}
        if (store := guest(module)) is not None:
            names = {k: t for k, t in names.items() if k not in store.kept} | store.tensors(store.take())
        for k, t in names.items():
            t = absorbed.get(id(t), t)
            if isinstance(t, Tensor) and f"{path}.{k}" not in whole and id(t) not in seen:
                seen.add(id(t))
                t = held(module, k) if t.device.type == "meta" else t
                out[f"{path}.{k}" if path else k] = t
    return out


def _digests(t: Tensor) -> dict[str, Any]:
    flat = t.detach().to("cpu").contiguous().reshape(-1)
    return {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "exact": _sha(flat), "values": sample(t)}


def sample(t: Tensor) -> str:
    """The digest `values` of a tensor, whatever dtype it is kept in."""
    flat = t.detach().reshape(-1)
    few = flat[:: max(1, -(-flat.numel() // SAMPLE))].cpu()
    return _sha(few.to(torch.bfloat16) if t.is_floating_point() else few)


def _sha(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16] if t.numel() else "empty"


def fingerprint(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> digests of every base tensor. LorakitError while adapters are merged into it.

    On an adapted model the whole digests are kept until a tensor is replaced or its sampled values change, so that a
    checkpoint costs samples only.
    """
    state = find_state(model)
    if state and state.merged is not None:
        raise LorakitError("the base cannot be fingerprinted while adapters are merged into it; mend: lorakit.unmerge(model)")
    together = sharded(model)
    tensors = {n: t for n, t in base_tensors(model).items() if t.device.type != "meta"}
    taken_of = {n: (p.data_ptr(), p._version, sample(p)) for n, t in tensors.items() for p in [part(t)]} if state else None
    known = bool(state and state.prints and state.prints[0] == taken_of)
    if every(known) if together else known:
        return state.prints[1]
    if together or torch.get_num_threads() == 1:
        prints = {n: _digests(whole(t)) for n, t in tensors.items()}
    else:
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # hashing releases the interpreter lock
            prints = dict(zip(tensors, pool.map(_digests, tensors.values()), strict=True))
    if state:
        state.prints = (taken_of, prints)
    return prints


def compare_bases(was: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs between two fingerprints, one line each, most telling first; [] when it is the same base."""
    packed = {n.rpartition(PREFIX)[0] + "weight": how for some, other, how in ((was, now, "when saved, not here"), (now, was, "here, not when saved"))
              for n in some if n.endswith(f"{PREFIX}codes") and n.rpartition(PREFIX)[0] + "weight" in other}
    out = [f"{n}: quantised {how}" for n, how in packed.items()]
    told = (*packed, *(f"{n.removesuffix('weight')}{PREFIX}" for n in packed))
    out += [f"{n}: {how}" for some, other, how in ((was, now, "not in this base"), (now, was, "only in this base")) for n in some
            if n not in other and not n.startswith(told)]
    for n in was:
        if n in now and list(was[n]["shape"]) != list(now[n]["shape"]):
            out.append(f"{n}: shape {was[n]['shape']} when saved, {now[n]['shape']} here")
        elif n in now and (which := "exact" if was[n]["dtype"] == now[n]["dtype"] else "values") and was[n][which] != now[n][which]:
            out.append(f"{n}: values differ ({was[n][which]} when saved, {now[n][which]} here)")
    return out


def dtype_of(base: Mapping[str, Any]) -> str | None:
    """The dtype of a receipt's base: its first floating-point tensor's that is not a quantiser's constant."""
    every = base.get("tensors", {}).items()
    return next((t["dtype"] for n, t in every if "float" in t["dtype"] and not n.rpartition(".")[2].startswith(PREFIX)), None)


def digest(prints: Mapping[str, Mapping[str, Any]]) -> str:
    """One word for a whole fingerprint."""
    text = "\n".join(f"{n} {p['shape']} {p['values']}" for n, p in sorted(prints.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def modules_table(model: nn.Module, name: str) -> dict[str, dict[str, Any]]:
    """Path -> |dW| (with the bias's change), |W|, rank bound, trainable count of one adapter; |dW| of a product comes from its factors."""
    out = {}
    for path, slot in slots(model, name).items():
        method, p = slot.methods[name], slot.params(name)
        base = slot.map({})
        matrix = method.mergeable != "no"
        begun = slot.absorbed is not None and slot.absorbed.adapter == name  # its start left the base, so its product alone is not the update
        two = None if begun or not matrix or method.two(slot.first(name)) is None else each(slot.site, method, method.two, p)
        if not matrix:
            delta = float(method.size(p))
        elif two is None:
            delta = float((slot.map({name: 1.0}).weight() - base.weight()).double().norm())
        else:
            B, A = (t.double() for t in two)
            delta = float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())
        b0, b = slot.site.bias, slot.bias({name: 1.0})
        if b is not b0:
            delta = math.hypot(delta, float((b if b0 is None else b.double() - b0.double()).norm()))
        row = {"method": method.name, "delta_norm": delta, "base_norm": float(base.row_sq().double().sum().sqrt()),
               "trainable": sum(p[k].numel() for k, t in slot.parameters(name).items() if t.requires_grad), "parameters": sum(t.numel() for t in p.values())}
        out[path] = row | ({"rank": two[1].shape[-2]} if two is not None else {})
    return out


def probe_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Fixed token ids that any model with a vocabulary can read; None where we cannot know what to feed it."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    vocab = getattr(text, "vocab_size", None)
    if not isinstance(vocab, int) or vocab < 2 or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    n = torch.arange(PROBE_ROWS * PROBE_LENGTH, dtype=torch.int64)
    ids = ((n * 2_654_435_761 + 12_345) % (2**31) % vocab).view(PROBE_ROWS, PROBE_LENGTH)
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return feed | ({"decoder_input_ids": ids[:, :4]} if getattr(config, "is_encoder_decoder", False) else {})


@torch.no_grad()
def probe(model: nn.Module) -> Tensor | None:
    """Logits on the probe inputs, (rows, ...), float32 on the CPU; None where there is no probe for this model."""
    feed = probe_inputs(model)
    if feed is None:
        return None
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    was = {m: m.training for m in model.modules()}
    state = find_state(model)
    given = state.given if state else {}
    if state:  # what methods ask of the batch is zero, for every row
        asked = {a for s in slots(model).values() for m in s.methods.values() for a in m.asks}
        state.given = {a: torch.zeros(PROBE_ROWS, dtype=torch.int64) for a in asked}
    model.eval()
    try:
        out = model(**{k: v.to(device) for k, v in feed.items()})
    finally:
        if state:
            state.given = given
        sharded(model)
        for m, flag in was.items():
            m.training = flag
    logits = getattr(out, "logits", None)
    logits = getattr(out, "last_hidden_state", None) if logits is None else logits
    return None if logits is None else logits.detach().float().cpu()


def probe_record(logits: Tensor, base: Tensor) -> dict[str, Any]:
    """What a receipt keeps of the probe: a digest, a few logits, and how far the adapter moves them from the base's."""
    flat = logits.reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(64, flat.numel())).long()
    return {"sha256": _sha(flat), "shape": list(logits.shape), "at": at.tolist(), "logits": flat[at].tolist(), "norm": float(flat.double().norm()),
            "moved": float((logits - base).abs().max()), "base_logits": base.reshape(-1)[at].tolist()}


def tolerance(logits: Tensor, *where: nn.Module | str) -> float:
    """How far logits may differ by rounding alone (another machine, another order of sums), absolutely, for the coarsest of the dtypes."""
    dtypes = [w if isinstance(w, str) else str(next(w.parameters()).dtype).removeprefix("torch.") for w in where]
    eps = max({"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}.get(d, 1e-4) for d in dtypes)
    return eps * max(1.0, float(logits.abs().max()))


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    out = {"python": platform.python_version()}
    for package in ("lorakit", "torch", "transformers", "safetensors", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
