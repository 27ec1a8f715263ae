"""GGUF LoRA, as llama.cpp reads it (`--lora`): one file of type `adapter`.

    <gguf name>.lora_a (r, i), <gguf name>.lora_b (o, r)      W + (adapter.lora.alpha / r) b a,  r of each tensor, alpha of the whole file

Names come from the `gguf` package's table of the architecture. In architectures of llama's kind the rows of the q and k projections
are stored in another order inside every head, (2, d/2) as (d/2, 2), and so are those of their `lora_b`. The input table's
`lora_a` is (vocab, r). alpha 0 or none means scale 1.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError, extra, near
from lorakit.formats.base import Format, lora_part, names_of, not_lora, rank_stabilised, times
from lorakit.formats.folder import Folder
from lorakit.sites import adaptable, site_for

# a base's model_type -> (architecture in GGUF, whether the rows of q and k are stored in another order), as llama.cpp converts the bases
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True), "mistral": ("llama", True), "mixtral": ("llama", True), "granite": ("granite", True), "smollm3": ("smollm3", True),
    "olmo": ("olmo", True), "olmo2": ("olmo2", False), "olmo3": ("olmo2", False), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False), "phi": ("phi2", False), "phi3": ("phi3", False),
    "gpt2": ("gpt2", False), "cohere": ("command-r", False),
}
ENDS = (".lora_a", ".lora_b")
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # tensor of a block -> whose heads


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise extra("gguf", "convert") from None
    return gguf


class Base:
    """What the format needs of a base: its architecture, the names of its layers, its heads."""

    def __init__(self, model: nn.Module):
        gguf = _library()
        config = getattr(model, "config", None)
        config = getattr(config, "get_text_config", lambda: config)()
        kind = getattr(config, "model_type", type(model).__name__)
        if kind not in ARCHITECTURES:
            raise LorakitError(f"gguf: this base is a `{kind}`, and it is not known here how llama.cpp names and orders its weights"
                               f"{near(kind, ARCHITECTURES)} (known are {', '.join(ARCHITECTURES)})")
        self.config, (self.arch, self.permutes) = config, ARCHITECTURES[kind]
        number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.arch)
        table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        layers = {n: m for n, m in names_of(model).items() if adaptable(m)}
        self.names = {n: name for n in layers if (name := table.get_name(n)) is not None}  # path -> name without .weight
        self.tables = {n for n, m in layers.items() if site_for(m, n).lookup}

    def rows(self, name: str, B: Tensor, back: bool = False) -> Tensor:
        """The second factor (o, r) with its rows in GGUF's order, or `back` from it."""
        key = PERMUTED.get(name.rpartition(".")[2])
        if not self.permutes or key is None:
            return B
        heads = getattr(self.config, key, None) or self.config.num_attention_heads
        if B.shape[0] % (2 * heads):
            raise LorakitError(f"gguf: {name} has {B.shape[0]} outputs, which {heads} heads of even size do not divide")
        half = B.shape[0] // heads // 2
        return B.reshape(heads, *((half, 2) if back else (2, half)), -1).transpose(1, 2).reshape(B.shape)


class GGUF(Format):
    name = "gguf"
    looks_for = "a file that begins with the word GGUF"
    suffix = ".gguf"
    reads_with_base = True
    writes_with_base = True

    def found(self, path):
        if not path.is_file():
            return False
        with path.open("rb") as f:
            return f.read(4) == b"GGUF"

    def read(self, path, model):
        gguf = _library()
        if model is None:
            raise LorakitError(f"{path}: GGUF's names and row order can be read only beside the base they belong to; mend: give base")
        try:
            reader = gguf.GGUFReader(path)
        except Exception as e:  # numpy, struct and gguf itself, according to where the file breaks
            raise LorakitError(f"{path} is truncated or not a GGUF file ({path.stat().st_size} bytes): {e}") from None
        told = {k: f.contents() for k, f in reader.fields.items()}
        if (kind := told.get(gguf.Keys.General.TYPE)) != gguf.GGUFType.ADAPTER or told.get(gguf.Keys.Adapter.TYPE) not in _LORA:
            raise LorakitError(f"{path} holds a {kind or 'model'}{', of type ' + str(told.get(gguf.Keys.Adapter.TYPE)) if kind else ''}, not a LoRA adapter")
        base = Base(model)
        if (arch := told.get(gguf.Keys.General.ARCHITECTURE)) != base.arch:
            raise LorakitError(f"{path} was made for the architecture `{arch}`, and this base is a `{base.arch}`; mend: give the base it belongs to")
        if told.get(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS):
            raise LorakitError(f"{path} is an activated LoRA (it begins to act at certain tokens), which this version of lorakit does not carry out")
        paths = {name: p for p, name in base.names.items()}
        pairs: dict[str, dict[str, Tensor]] = {}
        for t in reader.tensors:
            stem, end = t.name.removesuffix(ENDS[0]).removesuffix(ENDS[1]), t.name[-len(ENDS[0]):]
            if end not in ENDS:
                raise LorakitError(f"{path}: `{t.name}` is no factor of a LoRA (a norm kept whole?), which this reader does not know")
            if stem.removesuffix(".weight") not in paths:
                raise LorakitError(f"{path}: `{t.name}` is no tensor of this base{near(stem.removesuffix('.weight'), paths, 1)}")
            pairs.setdefault(stem.removesuffix(".weight"), {})[end] = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).float()
        alpha, parts = told.get(gguf.Keys.Adapter.LORA_ALPHA) or 0.0, {}
        for name, pair in pairs.items():
            if len(pair) < 2:
                raise LorakitError(f"{path}: `{name}` has {next(iter(pair))} alone")
            A, B = (pair[e] for e in ENDS)
            lookup = paths[name] in base.tables
            A = A.mT.contiguous() if lookup else A
            parts[paths[name]] = lora_part(f"{path}: {name}", A, base.rows(name, B, back=True).contiguous(), alpha or A.shape[0], lookup)
        return Folder.held(path, parts, [] if alpha else ["the file has no alpha: scale 1"])

    def unfit(self, part):
        return not_lora(part)

    def write(self, source, out: Path, model, **options: Any):
        gguf, base = _library(), Base(model)
        given = source.parts()
        tied = getattr(base.config, "tie_word_embeddings", False)
        parts, alpha, folded = _one_alpha(given)
        if any(t.dtype == torch.float64 for part in parts.values() for t in part.leaves.values()):
            folded.append("float64 became float32")
        writer = gguf.GGUFWriter(out, base.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, _LORA[0])
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for p, part in parts.items():
            name = base.names.get(p)
            if name is None:
                raise LorakitError(f"gguf: `{p}` has no name in the architecture {base.arch}{near(p, base.names, 1)}")
            if tied and name in ("output", "token_embd"):
                raise LorakitError(f"gguf: {p} is tied to the {'input table' if name == 'output' else 'head'}, and llama.cpp keeps one tensor for both, so it "
                                   "takes no adapter for one of them; mend: leave it out of the targets, or merge the adapter")
            A, B = part.leaves["A"], base.rows(name, part.leaves["B"])
            writer.add_tensor(f"{name}.weight{ENDS[0]}", (A.mT if part.lookup else A).float().contiguous().numpy())
            writer.add_tensor(f"{name}.weight{ENDS[1]}", B.float().contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return [*rank_stabilised(given), f"architecture {base.arch}, alpha {alpha:g} for all", *folded]


_LORA = ("lora",)


def _one_alpha(given: dict) -> tuple[dict, float, list[str]]:
    """The parts with one alpha for all: what differs is folded into the second factor."""
    stated = {p: part.method.s * part.method.r for p, part in given.items()}
    most = Counter(a for a in stated.values() if a).most_common(1)
    alpha = most[0][0] if most else 1.0
    out = {p: times(part, "B", stated[p] / alpha) for p, part in given.items()}
    other = sum(a != alpha for a in stated.values())
    return out, alpha, [f"{other} of {len(given)} targets have an alpha other than {alpha:g}: folded into their second factor"] if other else []
