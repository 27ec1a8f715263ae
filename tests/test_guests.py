"""Layers that bitsandbytes, torchao and HQQ have quantised: every method on them computes with what their weight stands for, and merges are exact."""

import copy
import importlib.util
import json
import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.models import load_base
from lorakit.planning.memory import counting_saved
from lorakit.quantized import packed
from lorakit.quantized.bitsandbytes import parts_of, readable, translated
from lorakit.quantized.hub import Quantize
from lorakit.sites import site_for
from lorakit.stores import STORES, store_for
from lorakit.stores.layer import PREFIX
from lorakit.stores.normal_float import DYNAMIC, NF4, NormalFloat
from lorakit.testing.conformance import rel

N, M = 192, 128


def needs(library: str):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def four_bits(kind="nf4", double=True, bias=True, dtype=torch.float32):
    needs("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(N, M, bias=bias, quant_type=kind, compress_statistics=double)
    layer.load_state_dict(nn.Linear(N, M, bias=bias).state_dict())
    return layer.to(dtype).to("cpu")


def eight_bits():
    needs("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(N, M, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(N, M).state_dict())
    return layer.to("cpu")


def torchao():
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    m = nn.Sequential(nn.Linear(N, M))
    quantize_(m, Int8WeightOnlyConfig())
    return m[0]


def hqq(bits=4, bias=True):
    needs("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    with torch.no_grad():
        return HQQLinear(nn.Linear(N, M, bias=bias), BaseQuantizeConfig(nbits=bits, group_size=64), compute_dtype=torch.float32, device="cpu")


GUESTS = {"nf4": four_bits, "nf4-plain": lambda: four_bits(double=False), "fp4": lambda: four_bits("fp4"), "int8": eight_bits, "torchao": torchao, "hqq4": hqq,
          "hqq8-no-bias": lambda: hqq(8, bias=False)}
METHODS = {"lora": {"r": 4}, "dora": {"r": 4}, "oft": {"block_size": 16, "r": 0}}
guests = pytest.mark.parametrize("kind", GUESTS)


def base(kind: str) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(GUESTS[kind]())


def noisy(m: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=g)
    return m


def adapted(kind: str, method: str = "lora") -> nn.Module:
    m = base(kind).eval()
    torch.manual_seed(3)
    return noisy(lorakit.adapt(m, method, target_modules="0", **METHODS[method]))


def dense_of(m: nn.Module) -> nn.Sequential:
    """A model with an ordinary layer of the numbers that the weight stands for."""
    store = store_for(m[0])
    layer = nn.Linear(N, M, bias=m[0].bias is not None)
    with torch.no_grad():
        layer.weight.copy_(store.read())
        if layer.bias is not None:
            layer.bias.copy_(m[0].bias)
    return nn.Sequential(layer)


def grads(m: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    m.zero_grad()
    m(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad} | {"": x.grad}


X = torch.randn(5, 3, N, generator=torch.Generator().manual_seed(4))


@guests
def test_the_store_is_found_and_reads_what_the_library_reads(kind):
    m = base(kind)
    site = site_for(m[0])
    name = next(n for n, s in STORES.items() if type(site.store) is s)
    assert name not in ("dense", "packed") and (site.out, site.in_) == (M, N)
    W = site.store.read()
    assert W.shape == (M, N) and W.is_contiguous() and not W.requires_grad
    if name == "bitsandbytes-4bit":
        from bitsandbytes.functional import dequantize_4bit  # right for these shapes

        assert torch.equal(W, dequantize_4bit(m[0].weight.data, m[0].weight.quant_state))
    with torch.no_grad():
        own = m.train()(X)  # LLM.int8 rounds the inputs too in evaluation
    assert rel(F.linear(X, W, m[0].bias), own) < 1e-5


@guests
@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_and_learns_as_on_the_dense_weight(kind, method):
    m = adapted(kind, method)
    d = dense_of(base(kind))
    torch.manual_seed(3)
    d = noisy(lorakit.adapt(d, method, target_modules="0", **METHODS[method]))
    for training in (False, True, False, True):
        m.train(training)
        with torch.no_grad():
            assert rel(m(X), d(X)) < 1e-5
        got, want = grads(m, X), grads(d, X)
        assert got.keys() == want.keys() and len(got) > 1
        assert all(want[k].any() and rel(got[k], want[k]) < 1e-4 for k in want), "evaluation must not spoil training"


@guests
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_the_live_model_and_undone_to_the_bit(kind, method):
    m = adapted(kind, method)
    kept = {k: v.clone() for k, v in store_for(m[0]).tensors(store_for(m[0]).take()).items()}
    with torch.no_grad():
        live = m(X)
        lorakit.merge(m)
        assert rel(m(X), live) < 1e-5 and isinstance(m[0], nn.Linear)
        lorakit.unmerge(m)
        assert torch.equal(m(X), live)
    store = store_for(m[0])
    now = store.tensors(store.take())
    assert now.keys() == kept.keys() and all(torch.equal(now[k], kept[k]) for k in kept)
    lorakit.detach(m)
    again = base(kind)
    with torch.no_grad():
        assert type(m[0]) is type(again[0]) and torch.equal(m.train()(X), again.train()(X))


@guests
def test_merged_and_unloaded_it_is_an_ordinary_layer(kind):
    m = adapted(kind)
    with torch.no_grad():
        live = m(X)
    lorakit.merge(m)
    host.unload(m)
    assert type(m[0]) is nn.Linear and type(m[0].weight) is nn.Parameter
    keys = {"0.weight", "0.bias"} if m[0].bias is not None else {"0.weight"}
    assert set(m.state_dict()) == keys
    fresh = nn.Sequential(nn.Linear(N, M, bias=len(keys) == 2))
    fresh.load_state_dict(m.state_dict())
    with torch.no_grad():
        assert rel(fresh(X), live) < 1e-5
    assert all(vars(m[0]).get(k) is None for k in ("quant_state", "state", "meta")), "nothing quantised stays behind"


@guests
def test_an_adapter_is_saved_and_loaded(kind, tmp_path):
    m = adapted(kind)
    with torch.no_grad():
        want = m(X)
    lorakit.save(m, tmp_path)
    again = lorakit.load(base(kind).eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(X), want)
    store = store_for(m[0])
    told = json.loads((tmp_path / "receipt.json").read_text())["base"]["tensors"]
    assert {f"0.{k}" for k in store.tensors(store.take())} <= set(told), "the receipt knows the constants too"


@guests
@pytest.mark.parametrize("method", METHODS)
def test_nothing_dense_is_kept_for_the_backward_pass(kind, method):
    m, d = adapted(kind, method), dense_of(base(kind))
    lorakit.adapt(d, method, target_modules="0", **METHODS[method])
    sizes = []
    for model in (m, d):
        own = [t for s in [store_for(model[0])] for t in s.tensors(s.take()).values()]
        with counting_saved(model) as saved:
            model(X.clone().requires_grad_())
        mine = {t.untyped_storage()._cdata for t in own}
        sizes.append(sum(size for k, size in saved.items() if k not in mine))
    assert sizes[0] <= sizes[1]


@guests
def test_writing_goes_through_the_librarys_own_rounding_and_back(kind):
    m = base(kind)
    store = store_for(m[0])
    W, kept = store.read(), store.take()
    new = W.flip(0) * 1.5
    assert store.writable
    want = store.rounded(new)
    assert torch.equal(store.read(), W), "rounded() only looks"
    store.write(new)
    got = store.read()
    assert torch.equal(got, want) and 0 < rel(got, new) + 1e-9 < store.eps + 1e-9
    with torch.no_grad():
        assert rel(m.train()(X), F.linear(X, got, m[0].bias)) < 1e-5, "the layer's own product sees it"
    store.put(kept)
    assert torch.equal(store.read(), W)
    with torch.no_grad():
        assert rel(m(X), F.linear(X, W, m[0].bias)) < 1e-5


@guests
def test_a_copy_is_its_own(kind):
    m = adapted(kind)
    c = copy.deepcopy(m)
    with torch.no_grad():
        want = m(X)
        assert torch.equal(c(X), want)
        lorakit.merge(c)
        assert rel(c(X), want) < 1e-5 and torch.equal(m(X), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao", "hqq4"])
def test_autocast(kind):
    m = adapted(kind)
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    y.float().sum().backward()
    with torch.no_grad():
        assert y.dtype == torch.bfloat16 and rel(y.float(), m(X)) < 2e-2
    assert x.grad.dtype == torch.float32 and x.grad.any()


# What bitsandbytes does on this kind of CPU


def repacks() -> None:
    needs("bitsandbytes")
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes lays weights out anew only on a CPU with AVX512-BF16")


def test_the_trap_is_there_without_us():
    repacks()
    m = base("nf4").eval()
    codes = m[0].weight.data.clone()
    with torch.no_grad():
        m(X)
    assert not torch.equal(m[0].weight.data.view(-1), codes.view(-1)), "bitsandbytes has mended it: the guard can go"


def test_evaluation_under_an_adapter_leaves_the_weight_alone():
    repacks()
    m = adapted("nf4")
    codes, W = m[0].weight.data.clone(), store_for(m[0]).read()
    with torch.no_grad():
        m.eval()(X)
        lorakit.activate(m)  # none: the layer's own forward
        m(X)
        lorakit.activate(m, "default")
    assert torch.equal(m[0].weight.data, codes) and torch.equal(store_for(m[0]).read(), W)


def test_a_weight_that_was_laid_out_anew_is_refused():
    repacks()
    m = base("nf4").eval()
    with torch.no_grad():
        m(X)
    with pytest.raises(LorakitError, match="before its first call"):
        lorakit.adapt(m, "lora", r=2, target_modules="0")
    assert type(m[0]).__name__ == "Linear4bit"


def test_layers_that_are_not_quantised_yet_are_refused():
    needs("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for layer in (Linear4bit(N, M, quant_type="nf4"), Linear8bitLt(N, M, has_fp16_weights=False)):
        with pytest.raises(LorakitError, match=r"mend: model.to\(device\)"):
            lorakit.adapt(nn.Sequential(layer), "lora", r=2, target_modules="0")


def test_a_torchao_weight_that_cannot_be_written_says_so():
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    m = nn.Sequential(nn.Linear(N, M))
    quantize_(m, Int8WeightOnlyConfig(granularity=PerGroup(64)))
    store = store_for(m[0])
    assert not store.writable
    with pytest.raises(LorakitError, match="cannot be quantised again from here; mend: lorakit.merge"):
        store.write(store.read())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(24, 16), (128, 96), (64, 32), (100, 52), (16, 192)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_blocks_that_straddle_rows_are_read_right(shape, kind):
    needs("bitsandbytes")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=False)
    W = layer.weight.data.clone()
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    got = store_for(layer).read()
    assert torch.equal(got, _dequantize_4bit_compute(layer.weight.data.reshape(-1), state.absmax, state.code, 64, shape, torch.float32))
    assert rel(got, W) < 0.14


# Whole models, as transformers loads them


def by_hqq(m: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.quantize_model(m, BaseQuantizeConfig(nbits=4, group_size=8), compute_dtype=dtype, device="cpu")
    return m


@pytest.mark.parametrize("kind", ["4bit", "8bit", "torchao", "hqq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_as_transformers_loads_them(kind, dtype, tmp_path):
    needs(kind if kind in ("torchao", "hqq") else "bitsandbytes")
    import transformers

    tiny.llama().save_pretrained(tmp_path / "base")
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "hqq":
        how = transformers.HqqConfig(nbits=4, group_size=8)
    else:
        how = transformers.BitsAndBytesConfig(load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", bnb_4bit_quant_type="nf4",
                                              bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    try:
        m = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, dtype=dtype, device_map="cpu")
    except NotImplementedError:  # transformers 5 has not moved HQQ to its new loader yet; hqq itself quantises the model
        m = by_hqq(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), dtype)
    m = noisy(lorakit.adapt(m, "lora", r=4, target_modules="all-linear"))
    assert all(type(s.site.store).__module__.endswith(("bitsandbytes", "torchao", "hqq")) for s in host.slots(m).values()) and len(host.slots(m)) == 14
    ids = tiny.ids()
    live = tiny.logits(m)
    m.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in m.parameters() if p.requires_grad)
    m.eval()
    lorakit.save(m, tmp_path / "adapter")
    lorakit.merge(m)
    tol = 1e-4 if dtype == torch.float32 else 5e-2
    assert rel(tiny.logits(m).float(), live.float()) < tol
    lorakit.unmerge(m)
    assert torch.equal(tiny.logits(m), live)


def bitsandbytes_folder(at, double: bool) -> torch.nn.Module:
    """A model that transformers has packed with bitsandbytes, and saved in at / nf4."""
    needs("bitsandbytes")
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    tf.LlamaForCausalLM(config).save_pretrained(at / "base")
    how = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    m = tf.AutoModelForCausalLM.from_pretrained(at / "base", quantization_config=how, dtype=torch.float32, device_map="cpu").train()
    m.save_pretrained(at / "nf4")
    return m


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
def test_nf4_checkpoints_are_read_without_bitsandbytes_to_the_bit(double, tmp_path):
    m = bitsandbytes_folder(tmp_path, double)
    import transformers as tf
    from bitsandbytes.functional import dequantize_4bit

    tensors, groups = translated(load_file(tmp_path / "nf4" / "model.safetensors"))
    config = tf.AutoConfig.from_pretrained(tmp_path / "nf4")
    assert readable(config.quantization_config) and not readable({**config.quantization_config, "bnb_4bit_quant_type": "fp4"})
    config.quantization_config = Quantize(packed=groups).to_dict()
    got = tf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    modules = dict(got.named_modules())
    theirs = {n: layer for n, layer in m.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert len(theirs) == 7
    for n, layer in theirs.items():
        assert torch.equal(modules[n].weight, dequantize_4bit(layer.weight.data, layer.weight.quant_state)), n
    assert rel(tiny.logits(got), tiny.logits(m)) < 1e-5


NAMES = {"codes": "", "absmax": ".absmax", "nested_absmax": ".nested_absmax"}


def written_as_bitsandbytes(model: torch.nn.Module, at) -> None:
    """A packed NF4 model as a folder with bitsandbytes' names, its tensors written by hand."""
    schemes = {p: layer.scheme for p, layer in packed(model).items()}
    model.save_pretrained(at)
    kept = load_file(at / "model.safetensors")
    out = {k: t for k, t in kept.items() if PREFIX not in k.rpartition(".")[2]}
    for path, scheme in schemes.items():
        w = f"{path}.weight"
        told = {"quant_type": "nf4", "blocksize": scheme.block, "dtype": "float32", "shape": list(model.get_submodule(path).shape)}
        for part, name in NAMES.items():
            if (t := kept.get(f"{path}.{PREFIX}{part}")) is not None:
                out[w + name] = t.view(-1, 1) if part == "codes" else t
        out[f"{w}.quant_map"] = torch.tensor(NF4)
        if scheme.double_quant:
            out[f"{w}.nested_quant_map"] = torch.tensor(DYNAMIC)
            told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(kept[f"{path}.{PREFIX}offset"])}
        out[f"{w}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    save_file(out, at / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((at / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (at / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
def test_load_base_reads_a_folder_in_bitsandbytes_names_as_packed_layers(double, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    want = load_base(tmp_path / "base", quantize={"name": "nf4", "double_quant": double})
    want.generation_config.max_length = 17
    logits = tiny.logits(want)
    written_as_bitsandbytes(want, tmp_path / "nf4")
    got = load_base(tmp_path / "nf4")
    assert len(packed(got)) == 14 and {m.scheme for m in packed(got).values()} == {NormalFloat(4, 64, double)} and not got.training
    assert torch.equal(tiny.logits(got), logits) and got.generation_config.max_length == 17
    half = load_base(tmp_path / "nf4", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and rel(tiny.logits(half).float(), logits) < 5e-2
    noisy(lorakit.adapt(got, "lora", r=2, merge_aware=True))
    lorakit.save(got, tmp_path / "adapter")
    assert lorakit.verify(tmp_path / "adapter").ok, "the adapter names the folder"
    lorakit.save_merged(got, tmp_path / "merged", route="requantize")
    assert lorakit.verify(tmp_path / "adapter", merged=tmp_path / "merged").ok
    with pytest.raises(LorakitError, match="quantised already .bitsandbytes.*leave `quantize` out"):
        load_base(tmp_path / "nf4", quantize="nf4")


def test_load_base_reads_what_bitsandbytes_wrote_without_it(tmp_path):
    want = tiny.logits(bitsandbytes_folder(tmp_path, True))
    code = "import sys; sys.modules['bitsandbytes'] = None; import torch; from lorakit.models import load_base; from lorakit.quantized import packed; " \
           "m = load_base(sys.argv[1]); ids = torch.load(sys.argv[2]); print(len(packed(m))); torch.save(m(input_ids=ids).logits.detach(), sys.argv[3])"
    torch.save(tiny.ids(), tmp_path / "ids")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "nf4", tmp_path / "ids", tmp_path / "logits"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "7" and rel(torch.load(tmp_path / "logits"), want) < 1e-5


def test_a_pickled_checkpoint_of_bitsandbytes_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "nf4")
    (tmp_path / "nf4" / "model.safetensors").rename(tmp_path / "nf4" / "pytorch_model.bin")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LorakitError, match="holds no safetensors"):
        load_base(tmp_path / "nf4")


def test_a_checkpoint_of_another_kind_is_refused():
    needs("bitsandbytes")
    told = {f"{k}": v for k, v in four_bits("fp4").state_dict().items()}
    with pytest.raises(LorakitError, match="weight is kept as fp4, and only nf4"):
        parts_of(told, "weight")
    with pytest.raises(LorakitError, match="bias is no 4-bit weight"):
        parts_of(told, "bias")
    told = four_bits().state_dict()
    told["weight.quant_map"] = told["weight.quant_map"] * 2
    with pytest.raises(LorakitError, match="other numbers"):
        parts_of(told, "weight")


def test_importing_lorakit_imports_no_guest():
    code = "import sys, torch, lorakit, lorakit.stores; from lorakit.stores import store_for; store_for(torch.nn.Linear(2, 2)); " \
           "print([n for n in ('bitsandbytes', 'torchao', 'hqq') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
