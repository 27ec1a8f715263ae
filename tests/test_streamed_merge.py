"""Base + adapter -> merged checkpoint, a weight at a time."""

import json
import subprocess
import sys

import pytest
import tiny
import torch

import lorakit
from lorakit.errors import LorakitError
from lorakit.merges.streamed import entries
from lorakit.models import load_base


def saved(model, folder, **kw):
    model.save_pretrained(folder, **kw)
    return folder


def trained(base, at, method="lora", **options):
    model = lorakit.adapt(load_base(base), method, **options)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    lorakit.save(model, at)
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "oft", "loha", "ia3"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_what_merging_the_loaded_model_gives(kind, method, tmp_path):
    base = saved(tiny.MODELS[kind](), tmp_path / "base", max_shard_size="20KB")
    model = trained(base, tmp_path / "a", method, **({"target_modules": ["c_attn", "c_proj"]} if kind == "gpt2" else {}))
    assert len(list(base.glob("*.safetensors"))) > 1
    changed = lorakit.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    there, was = load_base(tmp_path / "out"), load_base(base)
    want = lorakit.merged(model)
    for (n, a), b, c in zip(there.state_dict().items(), want.state_dict().values(), was.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), n
        assert torch.equal(a, c) != any(n.endswith(x) or x.endswith(n) for x in changed), n
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in base.iterdir()}
    assert lorakit.verify(tmp_path / "a", base, merged=tmp_path / "out").ok


def test_a_16_bit_checkpoint_keeps_its_dtype(tmp_path):
    base = saved(tiny.llama().bfloat16(), tmp_path / "base")
    trained(base, tmp_path / "a")
    lorakit.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert {e.dtype for e in entries(tmp_path / "out").values()} == {torch.bfloat16}
    assert lorakit.verify(tmp_path / "a", base, merged=tmp_path / "out").ok


def test_what_cannot_be_done_a_weight_at_a_time_is_refused_and_nothing_is_written(tmp_path):
    base = saved(tiny.llama(), tmp_path / "base")
    tied = saved(tiny.llama(tied=True), tmp_path / "tied")
    cases = [("vera", base, {}, "cannot be merged a weight at a time"), ("full", base, {}, "cannot be merged a weight at a time"),
             ("hydralora", base, {}, "cannot be merged a weight at a time"),
             ("lora", tied, {"target_modules": ["embed_tokens"]}, "tied to another")]
    for n, (method, where, options, why) in enumerate(cases):
        trained(where, tmp_path / f"a{n}", method, **options)
        with pytest.raises(LorakitError, match=why):
            lorakit.merge_checkpoint(where, tmp_path / f"a{n}", tmp_path / "out")
        assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if "out" in p.name]
    packed = saved(lorakit.quantize(tiny.llama(), "nf4"), tmp_path / "packed")
    trained(base, tmp_path / "b")
    with pytest.raises(LorakitError, match="is quantised"):
        lorakit.merge_checkpoint(packed, tmp_path / "b", tmp_path / "out")
    other = saved(tiny.llama(layers=1), tmp_path / "other")
    with pytest.raises(LorakitError, match=r"layers\.1"):
        lorakit.merge_checkpoint(other, tmp_path / "b", tmp_path / "out")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20] + b"}" * 40)
    with pytest.raises(LorakitError, match="no whole safetensors file"):
        lorakit.merge_checkpoint(base, tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_a_weight_not_of_the_model(tmp_path):
    import transformers as tf

    sizes = {"vocab_size": 256, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    base = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), tmp_path / "base", max_shard_size="100MB")
    trained(base, tmp_path / "a", r=4)
    code = f"""
import json, torch, lorakit, re
from lorakit.models import skeleton
torch.set_num_threads(1)
lorakit.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "lora", r=2, target_modules="0")
skeleton({str(base)!r})  # what is imported for it
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
before = peak()
lorakit.merge_checkpoint({str(base)!r}, {str(tmp_path / 'a')!r}, {str(tmp_path / 'out')!r})
print(json.dumps(peak() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, shard = json.loads(done.stdout.splitlines()[-1]), max(f.stat().st_size for f in base.glob("*.safetensors")) / 2**20
    assert sum(f.stat().st_size for f in base.glob("*.safetensors")) / 2**20 > 2 * shard
    assert grown < 1.5 * shard, f"{grown:.0f} MiB for shards of {shard:.0f}"
