"""File formats of adapters: every pair there and back, the other side's own arithmetic and libraries, what is refused, bad files."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit import LorakitError
from lorakit.formats import files, kohya
from lorakit.formats.base import FORMATS as EVERY
from lorakit.formats.gguf import ARCHITECTURES
from lorakit.formats.receipt import probe
from lorakit.methods.lokr import LoKr
from lorakit.recipes import RECIPES
from lorakit.spec import Spec, attach

FORMATS = {n: f for n, f in EVERY.items() if not f.rounds}
SUFFIX = {n: f.suffix for n, f in FORMATS.items()}
MIXED = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 5}}


def noisy(model: nn.Module, scale: float = 0.3) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=g) * scale
    return model.eval()


def saved(path: Path, recipe="lora", base=None, **options) -> nn.Module:
    """An adapter with noise on every leaf, saved to `path`; the model with it."""
    model = noisy(lorakit.adapt(base or tiny.llama(), recipe, **options))
    lorakit.save(model, path)
    return model


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    """Path -> by how much merging changes the weight."""
    base, merged = dict(model.state_dict()), lorakit.merged(model).state_dict()
    return {k.removesuffix(".weight"): merged[k] - base[k] for k in merged if k in base and not torch.equal(base[k], merged[k])}


def place(path: Path, to: str, name="out") -> Path:
    return path / f"{name}-{to}{SUFFIX[to]}"


def near(a: torch.Tensor, b: torch.Tensor, eps=1e-5) -> bool:
    return a.shape == b.shape and float((a - b).detach().norm()) <= eps * float(b.detach().norm())


# There and back


@pytest.mark.parametrize("scaled", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("to", FORMATS)
def test_there_and_back_with_other_ranks_and_alphas(tmp_path, to, scaled):
    model = saved(tmp_path / "a", use_rslora=scaled, **MIXED)
    want, moved = probe(model), deltas(model)
    done = lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama())
    assert done.targets == 6 and done.error < 1e-6 and done.moved > 0.1 and (scaled is False or to == "peft" or any("rsLoRA" in n for n in done.notes))
    for read in (place(tmp_path, to), lorakit.convert(place(tmp_path, to), tmp_path / "back", "peft", tiny.llama()).output):
        again = lorakit.load(tiny.llama(), read)
        assert torch.allclose(probe(again), want, atol=1e-4)
        assert all(near(d, moved[k]) for k, d in deltas(again).items()) and deltas(again).keys() == moved.keys()
    with_peft = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "back").eval()
    assert torch.allclose(probe(with_peft.base_model.model), want, atol=1e-4)


@pytest.mark.parametrize("to", FORMATS)
def test_a_lora_of_one_rank_and_scale_comes_back_to_the_bit(tmp_path, to):
    saved(tmp_path / "a", r=4, lora_alpha=6)
    done = lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama())
    assert done.error == 0 and done.logits == 0
    lorakit.convert(place(tmp_path, to), tmp_path / "back", "peft", tiny.llama())
    first, last = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "back"))
    assert first.keys() == last.keys() and all(torch.equal(t, last[k]) for k, t in first.items())
    config, back = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("a", "back"))
    assert all(config[k] == back[k] for k in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "task_type"))


@pytest.mark.parametrize("to", ["kohya", "gguf", "mlx", "vllm"])
def test_factors_of_16_bits_lose_nothing_where_a_scale_is_folded(tmp_path, to):
    saved(tmp_path / "a", **MIXED)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    (tmp_path / "a" / "receipt.json").unlink()
    want = deltas(lorakit.load(tiny.llama(), tmp_path / "a"))
    assert lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama()).error < 1e-6
    assert all(near(d, want[p], 1e-6) for p, d in deltas(lorakit.load(tiny.llama(), place(tmp_path, to))).items())


@pytest.mark.parametrize("a", ["kohya", "gguf", "mlx"])
@pytest.mark.parametrize("b", ["kohya", "gguf", "mlx", "vllm"])
def test_from_one_foreign_format_to_another(tmp_path, a, b):
    want = probe(saved(tmp_path / "a", **MIXED))
    lorakit.convert(tmp_path / "a", place(tmp_path, a, "first"), a, tiny.llama())
    lorakit.convert(place(tmp_path, a, "first"), place(tmp_path, b), b, tiny.llama())
    assert torch.allclose(probe(lorakit.load(tiny.llama(), place(tmp_path, b))), want, atol=1e-4)


@pytest.mark.parametrize("to", ["kohya", "mlx", "vllm", "peft"])
def test_without_a_base_the_same_is_written(tmp_path, to):
    want = probe(saved(tmp_path / "a", "dora" if to == "kohya" else "lora", **MIXED))
    done = lorakit.convert(tmp_path / "a", place(tmp_path, to), to)
    assert done.logits is None and done.error < 1e-6
    assert torch.allclose(probe(lorakit.load(tiny.llama(), place(tmp_path, to))), want, atol=1e-4)
    if SUFFIX[to] == "" and to != "mlx":  # the source's receipt still holds
        report = lorakit.verify(place(tmp_path, to), tiny.llama())
        assert report.ok and all(p.ok for p in report.points)


def test_the_folder_ends_in_a_receipt_that_says_where_it_came_from(tmp_path):
    saved(tmp_path / "a", **MIXED)
    lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", tiny.llama())
    lorakit.convert(tmp_path / "x.gguf", tmp_path / "b", "peft", tiny.llama())
    receipt = json.loads((tmp_path / "b" / "receipt.json").read_text())
    assert receipt["converted"]["files"] == {"x.gguf": files.sha256(tmp_path / "x.gguf")} and receipt["converted"]["read_as"] == "gguf"
    assert lorakit.verify(tmp_path / "b", tiny.llama()).ok
    lorakit.convert(tmp_path / "b", tmp_path / "m", "mlx")
    receipt = json.loads((tmp_path / "m" / "receipt.json").read_text())
    assert receipt["files"]["adapters.safetensors"] == files.sha256(tmp_path / "m" / "adapters.safetensors")


def test_targets_that_only_logits_can_compare_are_counted(tmp_path):
    saved(tmp_path / "a", "lora", tiny.mixtral(), r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    done = lorakit.convert(tmp_path / "a", tmp_path / "b", "peft", tiny.mixtral())
    assert done.by_logits == 2 and done.targets == 4 and done.logits == 0 and "2 of 4 targets by the logits alone" in str(done)


def test_another_base_than_the_one_trained_on_is_refused_unless_told(tmp_path):
    saved(tmp_path / "a", r=2)
    for to in FORMATS:
        with pytest.raises(LorakitError, match="was trained on another base"):
            lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama(seed=5))
        assert not place(tmp_path, to).exists()
        lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama(seed=5), check_base=False)


def test_a_model_with_other_adapters_is_left_as_it_was(tmp_path):
    saved(tmp_path / "a", r=2)
    model = noisy(lorakit.adapt(tiny.llama(), "lora", r=3, name="mine"))
    was = probe(model)
    lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", model)
    assert list(lorakit.adapters(model)) == ["mine"] and lorakit.active(model) == {"mine": 1.0} and torch.equal(probe(model), was)


# kohya


def kohya_delta(t: dict, name: str) -> torch.Tensor:
    """What sd-scripts and LyCORIS add to a weight, written out from their formulas."""
    leaf = {k.partition(".")[2]: v.float() for k, v in t.items() if k.partition(".")[0] == name}
    alpha = float(leaf["alpha"])
    if "lora_down.weight" in leaf:
        down, up = leaf["lora_down.weight"], leaf["lora_up.weight"]
        if "lora_mid.weight" in leaf:
            return alpha / down.shape[0] * torch.einsum("ijkl,pi,jr->prkl", leaf["lora_mid.weight"], up[:, :, 0, 0], down[:, :, 0, 0])
        if down.dim() == 4:
            return alpha / down.shape[0] * nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        return alpha / down.shape[0] * up @ down
    if "hada_t1" in leaf:
        one, two = (torch.einsum("ij...,ip,jr->pr...", *(leaf[f"hada_{k}"] for k in (f"t{n}", f"w{n}_a", f"w{n}_b"))) for n in (1, 2))
        return alpha / leaf["hada_w1_b"].shape[0] * one * two
    if "hada_w1_a" in leaf:
        return alpha / leaf["hada_w1_b"].shape[0] * (leaf["hada_w1_a"] @ leaf["hada_w1_b"]) * (leaf["hada_w2_a"] @ leaf["hada_w2_b"])
    w1 = leaf["lokr_w1"] if "lokr_w1" in leaf else leaf["lokr_w1_a"] @ leaf["lokr_w1_b"]
    if "lokr_t2" in leaf:
        w2 = torch.einsum("ij...,ip,jr->pr...", *(leaf[f"lokr_{k}"] for k in ("t2", "w2_a", "w2_b")))
    else:
        w2 = leaf["lokr_w2"] if "lokr_w2" in leaf else leaf["lokr_w2_a"] @ leaf["lokr_w2_b"]
    ranks = [leaf[k].shape[0] for k in ("lokr_w1_b", "lokr_w2_b") if k in leaf]
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.dim() - 2)), w2) * (alpha / ranks[0] if ranks else 1.0)


KOHYA = {  # recipe and options -> what is in the file for each target
    "lora": ({"r": 3, "lora_alpha": 5}, {"lora_down.weight", "lora_up.weight", "alpha"}),
    "loha": ({"r": 2, "alpha": 3.0}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}),
    "lokr": ({"r": 1, "alpha": 3.0}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"}),
    "lokr both": ({"r": 1, "alpha": 3.0, "decompose_both": True}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "alpha"}),
    "lokr full": ({"r": 8, "alpha": 3.0, "decompose_factor": 4}, {"lokr_w1", "lokr_w2", "alpha"}),
}


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("kind", KOHYA)
def test_kohya_keys_and_arithmetic(tmp_path, kind, dora):
    options, keys = KOHYA[kind]
    model = saved(tmp_path / "a", kind.split()[0], target_modules=["q_proj", "v_proj"], use_dora=dora, **options)
    lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya", tiny.llama(), prefix="lycoris")
    t, moved, base = load_file(tmp_path / "x.safetensors"), deltas(model), tiny.llama().state_dict()
    names = {p: f"lycoris_{p.replace('.', '_')}" for p in moved}
    assert set(t) == {f"{n}.{k}" for n in names.values() for k in keys | ({"dora_scale"} if dora else set())} and len(moved) == 4
    for p, n in names.items():
        W = base[f"{p}.weight"]
        V = W + kohya_delta(t, n)
        if dora:
            assert t[f"{n}.dora_scale"].shape == (len(W), 1)
            V = t[f"{n}.dora_scale"] * V / V.norm(dim=1, keepdim=True)
        assert near(V - W, moved[p], 1e-4)
    assert torch.allclose(probe(lorakit.load(tiny.llama(), tmp_path / "x.safetensors")), probe(model), atol=1e-4)


class Net(nn.Module):
    """Convolutions and a linear layer under names that hold dots and underscores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.down_blocks = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)])
        self.to_out = nn.Sequential(nn.Linear(4, 5))

    def forward(self, x):
        for block in self.down_blocks:
            x = block(x).relu()
        return self.to_out(x.mean((2, 3)))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("recipe", ["lora", "dora", "loha"])
def test_kohya_convolutions(tmp_path, recipe, rank):
    x = torch.randn(2, 3, 5, 5)
    model = saved(tmp_path / "a", recipe, Net(), r=rank, alpha=3.0, target_modules=["0", "1"])
    done = lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya", Net())
    t, moved = load_file(tmp_path / "x.safetensors"), deltas(model)
    assert len(moved) == 3 and "names begin with lora_unet_" in done.notes
    for p, d in moved.items():
        n, W = f"lora_unet_{p.replace('.', '_')}", dict(Net().state_dict())[f"{p}.weight"]
        V = W + kohya_delta(t, n).reshape(W.shape)
        V = V if recipe != "dora" else t[f"{n}.dora_scale"] * V / V.flatten(1).norm(dim=1).view(-1, *[1] * (W.dim() - 1))
        assert near(V - W, d, 1e-4)
    assert torch.allclose(lorakit.load(Net(), tmp_path / "x.safetensors")(x), model(x), atol=1e-5)
    bare = lorakit.convert(tmp_path / "a", tmp_path / "y.safetensors", "kohya")
    assert bare.notes == done.notes and all(torch.equal(v, t[k]) for k, v in load_file(tmp_path / "y.safetensors").items())


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.line, self.wide = nn.Conv1d(12, 8, 3), nn.Conv2d(1, 6, (3, 1))

    def forward(self, x):
        return self.wide(self.line(x)[:, None])


@pytest.mark.parametrize(("method", "options"), [
    ("loha", {"r": 2, "tucker": True}), ("lokr", {"r": 1, "tucker": True}), ("lokr", {"r": 1, "decompose_both": True}), ("lokr", {"r": 8})])
@pytest.mark.parametrize(("base", "x"), [(Net, (2, 3, 5, 5)), (Line, (2, 12, 9))], ids=["conv2d", "conv1d"])
def test_kohya_holds_products_on_convolutions(tmp_path, base, x, method, options):
    """Cores and Kronecker factors go out in LyCORIS' shapes, mean there what its formulas say, and come back as they went."""
    x = torch.randn(x)
    model = saved(tmp_path / "a", method, base(), alpha=3.0, target_modules=["0", "1"] if base is Net else ["line", "wide"], **options)
    lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya", base())
    t, moved = load_file(tmp_path / "x.safetensors"), deltas(model)
    for p, d in moved.items():
        assert near(kohya_delta(t, f"lora_unet_{p.replace('.', '_')}").reshape(d.shape), d, 1e-4)
    cores = {k: v.shape[2:] for k, v in t.items() if k.endswith(("_t1", "_t2"))}
    kernels = {p.replace(".", "_"): m.weight.shape[2:] for p, m in base().named_modules() if hasattr(m, "kernel_size")}
    assert bool(cores) == ("tucker" in options) and all(kernels[k.removeprefix("lora_unet_").partition(".")[0]] == s for k, s in cores.items())
    back = lorakit.load(base(), tmp_path / "x.safetensors")
    assert torch.allclose(back(x), model(x), atol=1e-5)
    lorakit.convert(tmp_path / "x.safetensors", tmp_path / "b", "peft", base())
    assert torch.allclose(lorakit.load(base(), tmp_path / "b")(x), model(x), atol=1e-5)


def test_kohya_mid_weights_are_multiplied_into_the_first_factor(tmp_path):
    g = torch.Generator().manual_seed(0)
    shapes = {"lora_down.weight": (2, 3, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (6, 2, 1, 1)}
    t = {f"lora_unet_down_blocks_0.{k}": torch.randn(s, generator=g) for k, s in shapes.items()} | {"lora_unet_down_blocks_0.alpha": torch.tensor(3.0)}
    save_file(t, tmp_path / "x.safetensors")
    assert near(deltas(lorakit.load(Net(), tmp_path / "x.safetensors"))["down_blocks.0"], kohya_delta(t, "lora_unet_down_blocks_0"))


def test_kohya_without_alpha_has_scale_one_and_half_precision_is_read(tmp_path):
    name = "lora_te_model_layers_1_mlp_up_proj"
    t = {f"{name}.lora_down.weight": torch.randn(2, 16).half(), f"{name}.lora_up.weight": torch.randn(24, 2).half()}
    save_file(t, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="1 of 1 targets have no alpha: scale 1"):
        model = lorakit.load(tiny.llama(), tmp_path / "x.safetensors")
    up, down = t[f"{name}.lora_up.weight"].float(), t[f"{name}.lora_down.weight"].float()
    assert near(deltas(model)["model.layers.1.mlp.up_proj"], up @ down)


def test_kohya_file_of_two_models_gives_each_its_own(tmp_path):
    saved(tmp_path / "te", r=2, target_modules=["q_proj"])
    saved(tmp_path / "unet", "lora", Net(), r=2, target_modules=["0"])
    for n, m in (("te", tiny.llama()), ("unet", Net())):
        lorakit.convert(tmp_path / n, tmp_path / f"{n}.safetensors", "kohya", m)
    save_file(load_file(tmp_path / "te.safetensors") | load_file(tmp_path / "unet.safetensors"), tmp_path / "both.safetensors")
    for base, other in ((tiny.llama(), "lora_unet_"), (Net(), "lora_te_")):
        with pytest.warns(UserWarning, match=f"left out: 2 targets under {other}"):
            model = lorakit.load(base, tmp_path / "both.safetensors")
        assert len(deltas(model)) == 2


# GGUF


def gguf_delta(path: Path, config) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to its tensors, by GGUF name, its q and k put back in order by transformers' own reader of GGUF models."""
    gguf = pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    reader = gguf.GGUFReader(path)
    told = {k: f.contents() for k, f in reader.fields.items()}
    assert told["general.type"] == "adapter" and told["adapter.type"] == "lora"
    order = TENSOR_PROCESSORS.get(told["general.architecture"], TensorProcessor)(config.to_dict())
    t = {x.name: torch.from_numpy(x.data.copy()) for x in reader.tensors}
    out = {}
    for stem in {n.rpartition(".")[0] for n in t}:
        a, b = t[f"{stem}.lora_a"], t[f"{stem}.lora_b"]
        a = a.T if stem.startswith("token_embd") else a
        delta = told["adapter.lora.alpha"] / b.shape[1] * b @ a
        out[stem.removesuffix(".weight")] = torch.from_numpy(order.process(delta.numpy(), stem).weights.copy())
    return out


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "qwen2", "qwen3", "gemma2"])
def test_gguf_is_read_by_its_own_library_and_adds_the_same(tmp_path, kind):
    import transformers as tf

    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 4, "initializer_range": 0.2, "tie_word_embeddings": False}
    classes = {"mistral": tf.MistralConfig, "qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config, "gemma2": tf.Gemma2Config}

    def base():
        torch.manual_seed(0)
        return getattr(tiny, kind)() if kind not in classes else tf.AutoModelForCausalLM.from_config(classes[kind](**size)).eval()

    embedding = [] if kind == "gpt2" else ["embed_tokens"]  # GPT-2's is tied
    every = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = saved(tmp_path / "a", "lora", base(), r=2, lora_alpha=3, target_modules=every + embedding, alpha_pattern={"c_fc|v_proj": 7})
    lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", base())
    import gguf

    have, moved = gguf_delta(tmp_path / "x.gguf", base().config), deltas(model)
    arch = {"mistral": "LLAMA"}.get(kind, kind.upper())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 2)
    assert {names.get_name(p) for p in moved} == have.keys() and len(moved) == (8 if kind == "gpt2" else 15)
    for p, d in moved.items():
        assert near(have[names.get_name(p)], d.T if "embed" in p else d)
    assert torch.allclose(probe(lorakit.load(base(), tmp_path / "x.gguf")), probe(model), atol=1e-4)


def test_gguf_scales_are_folded_into_one_alpha(tmp_path):
    model = saved(tmp_path / "a", use_rslora=True, **MIXED)
    done = lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", tiny.llama())
    have, moved = gguf_delta(tmp_path / "x.gguf", tiny.llama().config), deltas(model)
    assert near(have["blk.1.attn_k"], moved["model.layers.1.self_attn.k_proj"]) and near(have["blk.0.ffn_down"], moved["model.layers.0.mlp.down_proj"])
    assert "4 of 6 targets have an alpha other than 10: folded into their second factor" in done.notes


def test_gguf_of_16_bits_and_without_alpha_is_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    a, b = torch.randn(2, 16), torch.randn(24, 2)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", a.half().numpy())
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", b.half().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.warns(UserWarning, match="no alpha: scale 1"):
        model = lorakit.load(tiny.llama(), tmp_path / "x.gguf")
    assert near(deltas(model)["model.layers.0.mlp.up_proj"], b.half().float() @ a.half().float())


def test_gguf_needs_its_library(tmp_path, monkeypatch):
    saved(tmp_path / "a", r=2)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LorakitError, match=r"needs the package `gguf`.*lorakit\[convert\]"):
        lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", tiny.llama())
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".lorakit*"))


# MLX


@pytest.mark.parametrize("library", ["torch", "mlx"])
@pytest.mark.parametrize("recipe", ["lora", "dora"])
def test_mlx_arithmetic_gives_the_layers_output(tmp_path, recipe, library):
    model = saved(tmp_path / "a", recipe, **MIXED)
    lorakit.convert(tmp_path / "a", tmp_path / "m", "mlx", tiny.llama())
    config, file = json.loads((tmp_path / "m" / "adapter_config.json").read_text()), tmp_path / "m" / "adapters.safetensors"
    if library == "mlx":
        mx = pytest.importorskip("mlx.core")
        mx.set_default_device(mx.cpu)
        t, array, norm = mx.load(str(file)), lambda x: mx.array(x.numpy()), lambda x: mx.linalg.norm(x, axis=1)
    else:
        t, array, norm = load_file(file), lambda x: x, lambda x: x.norm(dim=1)
    told = config["lora_parameters"]
    assert config["fine_tune_type"] == recipe and config["num_layers"] == -1
    assert told["keys"] == ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"] and told["rank"] == 4
    for p in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_submodule(p)
        W, x, a, b = array(layer.weight.detach()), torch.randn(3, layer.in_features), t[f"{p}.lora_a"], t[f"{p}.lora_b"]
        assert tuple(a.shape) == (layer.in_features, 4) and tuple(b.shape) == (4, layer.out_features)
        y = array(x) @ W.T + told["scale"] * ((array(x) @ a) @ b)
        if recipe == "dora":
            y = t[f"{p}.m"] / norm(W + (told["scale"] * b.T) @ a.T) * y
        assert torch.allclose(torch.tensor(y.tolist()), layer(x), atol=1e-4)


def test_mlx_names_what_is_outside_the_blocks_by_its_whole_path(tmp_path):
    saved(tmp_path / "a", r=2, target_modules=["lm_head", "v_proj"])
    lorakit.convert(tmp_path / "a", tmp_path / "m", "mlx")
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["lora_parameters"]["keys"] == ["lm_head", "self_attn.v_proj"]


# vLLM


def test_vllm_folder_has_one_rank_one_scale_and_nothing_beside(tmp_path):
    model = saved(tmp_path / "a", use_rslora=True, **MIXED)
    done = lorakit.convert(tmp_path / "a", tmp_path / "v", "vllm")
    config, t = json.loads((tmp_path / "v" / "adapter_config.json").read_text()), load_file(tmp_path / "v" / "adapter_model.safetensors")
    assert config["r"] == 4 and config["target_modules"] == ["down_proj", "k_proj", "q_proj"] and not config["use_rslora"] and not config["use_dora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["modules_to_save"] and config["bias"] == "none"
    assert {x.shape[0 if "lora_A" in k else 1] for k, x in t.items()} == {4} and all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in t)
    s, moved = config["lora_alpha"] / config["r"], deltas(model)
    for p, d in moved.items():
        assert near(s * t[f"base_model.model.{p}.lora_B.weight"] @ t[f"base_model.model.{p}.lora_A.weight"], d)
    assert any("--max-lora-rank 8 or more" in n for n in done.notes)


# Fused experts as PEFT before 0.19 wrote them


@pytest.mark.parametrize("square", [False, True], ids=["o!=i", "o=i"])
def test_experts_in_the_older_layout_are_turned(tmp_path, square):
    import transformers as tf

    def base():
        torch.manual_seed(0)
        return tf.MixtralForCausalLM(tf.MixtralConfig(
            vocab_size=48, hidden_size=16, intermediate_size=16 if square else 24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, max_position_embeddings=32, initializer_range=0.2)).eval()

    name = "mlp.experts.down_proj"
    saved(tmp_path / "a", "lora", base(), r=3, lora_alpha=6, target_parameters=[name])
    key = "base_model.model.model.layers.0.mlp.experts"
    o, i = base().get_parameter(f"model.layers.0.{name}").shape[1:]
    A, B = torch.randn(12, o), torch.randn(i, 12)  # 0.18 read (E, o, i) as (E, inputs, outputs)
    save_file({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    (tmp_path / "a" / "receipt.json").unlink()
    want = 2 * torch.einsum("ore,eri->eio", B.reshape(i, 3, 4), A.reshape(4, 3, o))  # PEFT 0.18's own sum, in the parameter's shape
    with pytest.warns(UserWarning, match="PEFT before 0.19"):
        model = lorakit.load(base(), tmp_path / "a")
    assert near(deltas(model)[f"model.layers.0.{name}"], want)
    done = lorakit.convert(tmp_path / "a", tmp_path / "b", "peft", base())
    assert any("PEFT before 0.19" in n for n in done.notes)
    now = peft.PeftModel.from_pretrained(base(), tmp_path / "b").merge_and_unload()
    assert near(now.get_parameter(f"model.layers.0.{name}") - base().get_parameter(f"model.layers.0.{name}"), want, 1e-4)


# What a format cannot hold


@pytest.mark.parametrize("to", ["gguf", "vllm"])
def test_dora_becomes_lora_only_on_demand_and_its_error_is_said(tmp_path, to):
    model = saved(tmp_path / "a", "dora", r=3, target_modules=["q_proj", "v_proj"])
    with pytest.raises(LorakitError, match=r"cannot hold .*DoRA magnitude around LoRA is more than a plain LoRA.*rank=\d+ would be exact here"):
        lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama())
    if to == "vllm":
        with pytest.raises(LorakitError, match="cannot hold .*its base is needed: the adapter does not say which base"):
            lorakit.convert(tmp_path / "a", place(tmp_path, to), to)
    assert not place(tmp_path, to).exists()
    done = lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama(), rank=4)
    have, want = deltas(lorakit.load(tiny.llama(), place(tmp_path, to))), deltas(model)
    left = sum(float((have[p] - d).square().sum()) for p, d in want.items()) ** 0.5 / sum(float(d.square().sum()) for d in want.values()) ** 0.5
    assert 0.01 < left < 0.9 and done.left_out["overall"] == pytest.approx(left, rel=1e-3)
    for p, d in want.items():
        U, S, V = torch.linalg.svd(d, full_matrices=False)
        assert near(have[p], U[:, :4] * S[:4] @ V[:4], 1e-3)


def test_an_update_that_is_exactly_plain_lora_is_turned_unasked_on_the_base_the_adapter_names(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    base = lorakit.models.load_base(tmp_path / "base")
    model = saved(tmp_path / "a", "vera", base, r=3, target_modules=["q_proj", "v_proj"])
    done = lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya")
    assert "4 of 4 targets turned into plain LoRA" in done.notes and done.left_out is None and done.on_base
    assert torch.allclose(probe(lorakit.load(tiny.llama(), tmp_path / "x.safetensors")), probe(model), atol=1e-4)


REFUSED = {  # options of an adapter -> what is said
    "whole module": ({"recipe": "lora", "modules_to_save": ["lm_head"]}, r"lm_head \(Full copy\) cannot be turned into a plain LoRA"),
    "bias": ({"recipe": "lora", "base": tiny.opt, "bias": "lora_only"}, "changes the bias"),
    "input-dependent": ({"recipe": "hydralora"}, "depends on its input, so no LoRA is near it"),
    "prompt": ({"recipe": "prompt-tuning"}, "cannot hold the model: .*depends on its input"),
    "experts": ({"recipe": "lora", "base": tiny.mixtral, "target_parameters": ["experts.down_proj"]}, "parameters that are read, not called"),
    "tied head": ({"recipe": "lora", "base": tiny.gemma3, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "head that follows"),
}


@pytest.mark.parametrize("to", ["kohya", "gguf", "mlx", "vllm"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_format_cannot_hold_is_named(tmp_path, what, to):
    options, said = REFUSED[what]
    options = dict(options)
    recipe, base = options.pop("recipe"), options.pop("base", tiny.llama)
    saved(tmp_path / "a", recipe, base(), **options)
    with pytest.raises(LorakitError, match=said):
        lorakit.convert(tmp_path / "a", place(tmp_path, to), to, base())
    assert not place(tmp_path, to).exists() and not list(tmp_path.glob(".lorakit*"))


def test_gguf_takes_no_adapter_of_one_of_two_tied_tables(tmp_path):
    saved(tmp_path / "a", "lora", tiny.llama(tied=True), target_modules=["embed_tokens"])
    with pytest.raises(LorakitError, match="embed_tokens is tied to the head, and llama.cpp keeps one tensor for both"):
        lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", tiny.llama(tied=True))


def test_vllm_has_room_for_so_much(tmp_path):
    base = nn.Sequential(nn.Linear(600, 600))
    saved(tmp_path / "a", "lora", base, r=520, target_modules=["0"])
    with pytest.raises(LorakitError, match="rank 520 is above the highest that vLLM has room for, 512; mend: rank=512"):
        lorakit.convert(tmp_path / "a", tmp_path / "v", "vllm")


# Bad input


def kohya_file(path: Path, **change) -> Path:
    t = {"lora_down.weight": torch.randn(2, 16), "lora_up.weight": torch.randn(16, 2), "alpha": torch.tensor(2.0)} | change
    save_file({f"lora_te_model_layers_0_self_attn_q_proj.{k}": v for k, v in t.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("by", [1.001, 1e9])
def test_a_file_that_holds_another_adapter_than_was_meant_does_not_appear(tmp_path, monkeypatch, by):
    saved(tmp_path / "a", r=2)
    right = kohya._tensors
    monkeypatch.setattr(kohya, "_tensors", lambda part: right(part) | {"alpha": right(part)["alpha"] * by})
    with pytest.raises(LorakitError, match=r"read back, the update of \S+ differs by .*this is a defect of lorakit"):
        lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        self.to, self.to_q = nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.Linear(4, 4)


def test_two_paths_of_one_flat_name_are_refused(tmp_path):
    saved(tmp_path / "a", "lora", Alike(), r=2, target_modules=["to.q", "to_q"])
    for base in (Alike(), None):
        with pytest.raises(LorakitError, match="have one flat name, lora_unet_to_q"):
            lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya", base)


@pytest.mark.parametrize("to", ["kohya", "mlx", "vllm", "peft"])
def test_nan_is_refused_also_without_a_base(tmp_path, to):
    saved(tmp_path / "a", r=2)
    file = tmp_path / "a" / "adapter_model.safetensors"
    t = load_file(file)
    next(iter(t.values()))[0, 0] = float("nan")
    save_file(t, file)
    with pytest.raises(LorakitError, match="lora_.*holds NaN or infinity"):
        lorakit.convert(tmp_path / "a", place(tmp_path, to), to)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


BROKEN = {
    "no such module": (lambda p: save_file({k.replace("q_proj", "q_prj"): v for k, v in load_file(kohya_file(p)).items()}, p),
                       "q_prj` is no module of this base; did you mean `lora_te_model_layers_0_self_attn_q_proj`"),
    "no known prefix": (lambda p: save_file({k.replace("lora_te", "net"): v for k, v in load_file(kohya_file(p)).items()}, p),
                        "`net_model_layers_0_self_attn_q_proj` begins with no prefix of kohya's"),
    "shapes that do not fit each other": (lambda p: kohya_file(p, **{"lora_up.weight": torch.randn(16, 3)}), r"first \[2, 16\], second \[16, 3\]"),
    "shapes that do not fit the base": (lambda p: kohya_file(p, **{"lora_down.weight": torch.randn(2, 15)}), r"has shape \[2, 15\].*need \[2, 16\]"),
    "half a pair": (lambda p: kohya_file(p, **{"lora_up.weight": None}), "the tensor 'lora_up.weight' is missing"),
    "NaN": (lambda p: kohya_file(p, **{"lora_up.weight": torch.full((16, 2), float("nan"))}), "holds NaN or infinity"),
    "something else beside": (lambda p: kohya_file(p, diff_b=torch.ones(16)), "holds `diff_b`, which this reader does not know"),
    "a magnitude of inputs": (lambda p: kohya_file(p, dora_scale=torch.ones(1, 16)), "a magnitude for each input, of an older LyCORIS"),
    "truncated": (lambda p: p.write_bytes(kohya_file(p).read_bytes()[:-40]), "truncated or not a safetensors file"),
    "a PEFT folder's file": (lambda p: save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 2)}, p), "no adapter in a known format: .*kohya is a"),
    "text": (lambda p: p.write_text("hello"), "truncated or not a safetensors file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_kohya_file_is_refused_and_nothing_is_written(tmp_path, what):
    make, said = BROKEN[what]
    make(tmp_path / "x.safetensors")
    with pytest.raises(LorakitError, match=said):
        lorakit.convert(tmp_path / "x.safetensors", tmp_path / "b", "peft", tiny.llama())
    model = tiny.llama()
    with pytest.raises(LorakitError, match=said):
        lorakit.load(model, tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"] and type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("cut", [3, 20, 200, 500, -1], ids=str)
def test_a_truncated_gguf_file_is_refused(tmp_path, cut):
    saved(tmp_path / "a", r=2)
    lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", tiny.llama())
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:cut])
    with pytest.raises(LorakitError, match="no adapter in a known format" if cut == 3 else "truncated or not a GGUF file"):
        lorakit.load(tiny.llama(), tmp_path / "x.gguf")


def test_a_gguf_file_of_another_kind_or_base_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    saved(tmp_path / "a", r=2)
    lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf", tiny.llama())
    with pytest.raises(LorakitError, match="made for the architecture `llama`, and this base is a `gpt2`"):
        lorakit.load(tiny.gpt2(), tmp_path / "x.gguf")
    with pytest.raises(LorakitError, match=r"`blk.1.(\w+).weight.lora_a` is no tensor of this base; did you mean `blk.0.\1`"):
        lorakit.load(tiny.llama(layers=1), tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(LorakitError, match="holds a model, not a LoRA adapter"):
        lorakit.load(tiny.llama(), tmp_path / "model.gguf")
    saved(tmp_path / "o", "lora", tiny.opt(), r=2)
    with pytest.raises(LorakitError, match="this base is a `opt`, and it is not known here how llama.cpp names"):
        lorakit.convert(tmp_path / "o", tmp_path / "o.gguf", "gguf", tiny.opt())


def test_a_bad_mlx_folder_is_refused(tmp_path):
    saved(tmp_path / "a", r=2)
    lorakit.convert(tmp_path / "a", tmp_path / "m", "mlx")
    config, tensors = json.loads((tmp_path / "m" / "adapter_config.json").read_text()), load_file(tmp_path / "m" / "adapters.safetensors")

    def said(match, change=None, **told):
        (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(config | told))
        save_file(tensors | (change or {}), tmp_path / "m" / "adapters.safetensors")
        with pytest.raises(LorakitError, match=match):
            lorakit.load(tiny.llama(), tmp_path / "m")

    said("fine_tune_type `full` is no low-rank adapter", fine_tune_type="full")
    said("has no lora_parameters.scale", lora_parameters={"rank": 2})
    said("needs lora_a, lora_b, m", fine_tune_type="dora")
    said("experts of mlx-lm are not read", {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(2, 2, 3)})
    said(r"`model.layers.9.x`, which this LlamaForCausalLM has not", {"model.layers.9.x.lora_a": torch.ones(3, 2), "model.layers.9.x.lora_b": torch.ones(2, 3)})
    said("embed_tokens is an embedding", {"model.embed_tokens.lora_a": torch.ones(48, 2), "model.embed_tokens.lora_b": torch.ones(2, 16)})
    (tmp_path / "m" / "adapter_config.json").unlink()
    with pytest.raises(LorakitError, match=r"there is no adapter_config\.json"):
        lorakit.load(tiny.llama(), tmp_path / "m")


def test_what_the_user_says_wrong_is_refused(tmp_path):
    saved(tmp_path / "a", r=2)

    def said(match, dst="x.gguf", to="gguf", src="a", **kw):
        with pytest.raises(LorakitError, match=match):
            lorakit.convert(tmp_path / src, tmp_path / dst, to, tiny.llama(), **kw)

    said("unknown format `ggfu`; did you mean `gguf`", to="ggfu")
    said("there is no .*/b; did you mean|there is no .*/b", src="b")
    said(r"gguf is written as a \.gguf file, and .*mend: .*x\.gguf", dst="x.bin")
    said("peft is written as a folder", dst="x.gguf", to="peft")
    said("is there already; mend: another name", dst="a", to="peft")
    said("gguf has no option `prefix`", prefix="lora_te")
    said("prefix: unknown `lora_tee`; did you mean `lora_te`", "x.safetensors", "kohya", prefix="lora_tee")
    said("no adapter in a known format: .*mend: name its folder, which is peft", src="a/adapter_model.safetensors")
    (tmp_path / "empty").mkdir()
    said("empty is no adapter in a known format: .*the folder holds nothing", src="empty")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "empty"}
    with pytest.raises(LorakitError, match="does not say which base"):
        lorakit.convert(tmp_path / "a", tmp_path / "x.gguf", "gguf")
    lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya")
    with pytest.raises(LorakitError, match="only beside the base whose modules they mean; mend: give base"):
        lorakit.convert(tmp_path / "x.safetensors", tmp_path / "b", "peft")
    with pytest.raises(LorakitError, match="is a file, not an adapter folder; mend: lorakit convert"):
        lorakit.verify(tmp_path / "x.safetensors", tiny.llama()).raise_if_failed()


@pytest.mark.parametrize("to", FORMATS)
def test_a_base_without_the_adapters_modules_is_refused(tmp_path, to):
    for recipe in ("lora", "lokr"):
        saved(tmp_path / recipe, recipe, r=2, target_modules=["q_proj"])
        (tmp_path / recipe / "receipt.json").unlink()
        with pytest.raises(LorakitError, match=r"layers[._]1[._]self_attn[._]q_proj"):
            lorakit.convert(tmp_path / recipe, place(tmp_path, to, recipe), to, tiny.llama(layers=1))
        assert not place(tmp_path, to, recipe).exists()


def test_a_lokr_that_is_not_cut_as_kohyas_files_are_is_refused(tmp_path):
    for name, method, said in (("old", LoKr(1, kernel=0), "cuts the whole kernel"), ("swapped", LoKr(1, kernel=9, swapped=True), "cuts in the other order")):
        model = Net()
        attach(model, "a", Spec(method, ("down_blocks.0",)), {"down_blocks.0": method})
        lorakit.save(model, tmp_path / name)
        with pytest.raises(LorakitError, match=said):
            lorakit.convert(tmp_path / name, tmp_path / "x.safetensors", "kohya", Net())
    saved(tmp_path / "a", "lokr", Net(), r=1, tucker=True, target_modules=["0"])
    with pytest.raises(LorakitError, match="cannot be told without the base; mend: give base"):
        lorakit.convert(tmp_path / "a", tmp_path / "x.safetensors", "kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "old", "swapped"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path, to, monkeypatch):
    saved(tmp_path / "a", r=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    last = {"kohya": "files._flush", "gguf": "files._flush", "mlx": "mlx.write_json", "vllm": "folder.save_file", "peft": "folder.save_file"}
    monkeypatch.setattr(f"lorakit.formats.{last[to]}", full)
    with pytest.raises(LorakitError, match="could not write .*No space left on device"):
        lorakit.convert(tmp_path / "a", place(tmp_path, to), to, tiny.llama())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# The page


def test_the_page_tells_what_each_format_can_hold(tmp_path):
    """docs/formats.md has a table of methods by formats; every cell is tried."""
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.split("\n\n")[2].splitlines()]
    assert set(head[1:]) == set(FORMATS) and len(rows) == 6
    for row, *cells in rows:
        recipe = row.strip("`")
        saved(tmp_path / recipe, recipe, r=4, target_modules=["q_proj"])
        for to, cell in zip(head[1:], cells, strict=True):
            try:
                notes = " ".join(lorakit.convert(tmp_path / recipe, place(tmp_path, to, recipe), to, tiny.llama()).notes)
                have = "as plain LoRA" if "turned into plain LoRA" in notes else "scale folded" if "rsLoRA" in notes else "yes"
            except LorakitError as e:
                assert "rank=" in str(e)
                have = "with rank"
            assert cell == have, (recipe, to)


def test_the_page_lists_the_architectures_that_gguf_knows():
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    listed = " ".join(text.partition("`model_type`:")[2].partition(".")[0].split())
    assert listed.split(", ") == sorted(ARCHITECTURES)
    permuted = " ".join(text.partition("smollm3. Of ")[2].partition(" the rows")[0].split()).replace(" and ", ", ")
    assert set(permuted.split(", ")) == {k for k, (_, other) in ARCHITECTURES.items() if other}


# The verb


def test_the_verb_there_and_back(tmp_path, call):
    tiny.llama().save_pretrained(tmp_path / "base")
    want = probe(saved(tmp_path / "a", base=lorakit.models.load_base(tmp_path / "base"), **MIXED))
    code, out, _ = call("convert", tmp_path / "a", "-o", tmp_path / "x.gguf", "--to", "gguf")
    assert code == 0 and "(gguf), 6 targets" in out and "architecture llama" in out and "on the base: logits equal to" in out
    code, out, _ = call("convert", tmp_path / "a", "-o", tmp_path / "x.safetensors", "--to", "kohya", "--prefix", "lycoris")
    assert code == 0 and "names begin with lycoris_" in out and "logits not compared, for no base was given" in out
    for name in ("x.gguf", "x.safetensors"):
        code, out, err = call("convert", tmp_path / name, "-o", tmp_path / "b", "--to", "peft")
        assert code == 1 and "mend: give base" in err and out == ""
    code, out, _ = call("convert", tmp_path / "x.gguf", "-o", tmp_path / "b", "--to", "peft", "--base", tmp_path / "base", "--json")
    assert code == 0 and json.loads(out)["error"] == 0 and json.loads(out)["on_base"]
    assert call("verify", tmp_path / "b")[0] == 0
    assert torch.allclose(probe(lorakit.load(tiny.llama(), tmp_path / "b")), want, atol=1e-4)
    code, _, err = call("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "peft")
    assert code == 1 and "is there already" in err and call("verify", tmp_path / "b")[0] == 0


def test_the_verb_on_a_real_model(tmp_path, call, data):
    base = data / "stories260k" / "hf-llama-fp32"
    saved(tmp_path / "a", "dora", lorakit.models.load_base(base), r=4, target_modules=["q_proj", "k_proj", "down_proj"])
    code, out, err = call("convert", tmp_path / "a", "-o", tmp_path / "x.gguf", "--to", "gguf", "--rank", 8)
    assert code == 0 and "15 of 15 targets turned into plain LoRA" in out and "of the update's norm left out" in out, err
    code, out, _ = call("convert", tmp_path / "a", "-o", tmp_path / "m", "--to", "mlx")
    assert code == 0 and "read back: equal to the bit" in out
    assert call("convert", tmp_path / "m", "-o", tmp_path / "b", "--to", "peft", "--base", base)[0] == 0 and call("verify", tmp_path / "b")[0] == 0


# Every method


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_is_converted_or_refused_by_name(tmp_path, recipe, to):
    try:
        model = saved(tmp_path / "a", recipe)
    except LorakitError as e:
        pytest.skip(f"not with its own settings on a tiny model: {e}")
    want = probe(model)
    for rank in (None, 4):
        dst = place(tmp_path, to, f"r{rank}")
        try:
            done = lorakit.convert(tmp_path / "a", dst, to, tiny.llama(), rank=rank)
        except LorakitError as e:
            assert "mend" in str(e) and not dst.exists(), e
            continue
        gap = float((probe(lorakit.load(tiny.llama(), dst)) - want).abs().max())
        assert done.moved > 0 and (done.left_out or gap <= 1e-3 * max(1.0, float(want.abs().max()))), gap
