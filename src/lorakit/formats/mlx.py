"""MLX (mlx-lm): a folder with `adapters.safetensors` and `adapter_config.json`.

    <path>.lora_a (i, r), <path>.lora_b (r, o)      y + scale (x a) b;   DoRA: and <path>.m (o)

Both factors are transposed against PEFT's; the scale is one raw number for all targets, no alpha / r, and the rank is one for all. Keys
name the targets inside a block, or by their whole path; `num_layers: -1` means every block, and a target without tensors has a zero `b`.
"""

from __future__ import annotations

import re

from safetensors.torch import save_file

from lorakit.errors import LorakitError
from lorakit.formats.base import Format, lora_part, names_of, not_lora, one_scale, rank_stabilised, tensors_of
from lorakit.formats.files import read_json, write_json
from lorakit.formats.folder import Folder
from lorakit.methods.magnitude import Magnitude
from lorakit.sites import adaptable, site_for

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
KINDS = {"lora": False, "dora": True}  # fine_tune_type -> whether there are magnitudes
LEAVES = ("lora_a", "lora_b", "m")
TABLES = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings")  # embeddings of inputs, where no base tells
BLOCK = re.compile(r"(?:[^.]+\.)*?\d+\.(.+)")  # a path through the first numbered module, and what follows


class MLX(Format):
    name = "mlx"
    looks_for = f"a folder with {TENSORS}"

    def found(self, path):
        return (path / TENSORS).is_file()

    def read(self, path, model):
        config, where = read_json(path / CONFIG), path / TENSORS
        kind, told = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
        if kind not in KINDS:
            raise LorakitError(f"{path}: fine_tune_type `{kind}` is no low-rank adapter; mend: one of {', '.join(KINDS)}, or load its weights as a model's")
        if not isinstance(told, dict) or not isinstance(told.get("scale"), (int, float)):
            raise LorakitError(f"{path / CONFIG} has no lora_parameters.scale, which nothing else tells")
        by_path: dict[str, dict] = {}
        for k, t in tensors_of(where).items():
            p, _, leaf = k.rpartition(".")
            if leaf not in LEAVES or t.dim() != (1 if leaf == LEAVES[2] else 2):
                raise LorakitError(f"{where}: `{k}` {list(t.shape)} is no lora_a, lora_b or m of a layer (experts of mlx-lm are not read)")
            by_path.setdefault(p, {})[leaf] = t
        modules, parts = {} if model is None else names_of(model), {}
        for p, t in by_path.items():
            need = LEAVES if KINDS[kind] else LEAVES[:2]
            if set(t) != set(need):
                raise LorakitError(f"{where}: {p} has {', '.join(sorted(t))}; {kind} needs {', '.join(need)}")
            A, B = t["lora_a"].mT.contiguous(), t["lora_b"].mT.contiguous()
            if site_for(modules[p]).lookup if p in modules and adaptable(modules[p]) else p.rpartition(".")[2] in TABLES:
                raise LorakitError(f"{where}: {p} is an embedding, and mlx's adapter on it acts on a tied head as well; this reader does not take it")
            parts[p] = lora_part(f"{where}: {p}", A, B, told["scale"] * A.shape[0], m=t.get("m"))
        return Folder.held(path, parts, base_model_name_or_path=config.get("model"), lora_dropout=told.get("dropout") or 0.0)

    def unfit(self, part):
        return not_lora(part, magnitude=True, lookup=False)

    def write(self, source, out, model, **options):
        given = source.parts()
        magnitudes = {p for p, part in given.items() if isinstance(part.method, Magnitude)}
        if magnitudes and len(magnitudes) < len(given):
            raise LorakitError(f"{next(iter(magnitudes))} is a DoRA and {next(p for p in given if p not in magnitudes)} a LoRA; mlx has one kind for all; "
                               "mend: rank=R, for plain LoRA")
        parts, s, notes = one_scale(given, rank=True)
        tensors = {}
        for p, part in parts.items():
            a, b = (part.leaves[k].mT.contiguous() for k in ("A", "B"))
            tensors |= {f"{p}.lora_a": a, f"{p}.lora_b": b} | ({f"{p}.m": part.leaves["m"].contiguous()} if magnitudes else {})
        save_file(tensors, str(out / TENSORS), metadata={"format": "mlx"})
        keys = sorted({m[1] if (m := BLOCK.fullmatch(p)) else p for p in parts})
        kind = next(k for k, has in KINDS.items() if has == bool(magnitudes))
        config = {"model": source.base, "fine_tune_type": kind, "num_layers": -1,
                  "lora_parameters": {"rank": next(iter(parts.values())).method.core.r, "scale": s, "dropout": source.dropout, "keys": keys}}
        write_json(out / CONFIG, config)
        return [*rank_stabilised(given), f"one scale for all: {s:.6g}", *notes]

