"""What a step costs, told before it and counted on the real one."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
import transformers as tf

import lorakit
from lorakit.errors import LorakitError
from lorakit.planning import GOALS, advise, memory, seconds
from lorakit.planning.duration import extrapolated, shallow
from lorakit.planning.guide import rank_for
from lorakit.planning.memory import Live, counting_saved, step
from lorakit.stores.saved import lean

SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
    "tied": tf.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2),
    "gpt2": tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "opt": tf.OPTConfig(**SMALL, word_embed_proj_dim=32, ffn_dim=64, max_position_embeddings=64),
    "mixtral": tf.MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2),
}
CASES = [("llama", "lora", {}), ("llama", "lora", {"r": 32, "target_modules": "attention"}), ("llama", "dora", {}), ("llama", "lora-fa", {}),
         ("llama", "lora-nonzero", {}), ("llama", "full", {}), ("llama", None, {}), ("tied", "lora", {"target_modules": ["embed_tokens", "q_proj"]}),
         ("gpt2", "lora", {}), ("gpt2", "dora", {"lora_dropout": 0.1}), ("opt", "lora", {"bias": "all"}), ("opt", "bitfit", {}),
         ("llama", "lora", {"modules_to_save": ["norm"]}), ("llama", "lora", {"trainable_token_indices": [3, 4]}),
         ("llama", "lora", {"quantize": "nf4"}), ("gpt2", "dora", {"quantize": {"name": "int4", "group": 8}}), ("llama", "oft", {"quantize": "int8"})]


def real(kind, adapter, options, checkpointing=False, dtype=torch.float32):
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype).train()
    options = dict(options)
    if (scheme := options.pop("quantize", None)) is not None:
        lorakit.quantize(model, scheme)
    if adapter:
        lorakit.adapt(model, adapter, **options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = {}
    for k, c in CONFIGS.items():
        out[k] = tmp_path_factory.mktemp(k)
        c.save_pretrained(out[k])
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_of_the_real_step(case, folders):
    kind, adapter, options = case
    plan = memory(folders[kind], adapter, batch=3, length=40, **options)
    model = real(kind, adapter, options)
    saved, logits, alive = step(model, 3, 40)
    assert (plan.saved, plan.logits) == (saved, logits)
    assert plan.trainable == lorakit.trainable(model)[0]
    assert plan.base + plan.adapter == sum(t.untyped_storage().nbytes() for t in {t.untyped_storage()._cdata: t for t in [
        *model.parameters(), *model.buffers()]}.values())
    assert plan.gradients == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    told = plan.peak - plan.base - plan.adapter - plan.optimizer
    assert told == pytest.approx(max(alive, 3 * plan.gradients), rel=0.002)


def test_checkpointing_and_dtype_change_what_is_saved(folders):
    plain = memory(folders["llama"], "lora", batch=3, length=40)
    less = memory(folders["llama"], "lora", batch=3, length=40, gradient_checkpointing=True)
    half = memory(folders["llama"], "lora", batch=3, length=40, dtype="bfloat16")
    assert less.saved == step(real("llama", "lora", {}, checkpointing=True), 3, 40)[0] < 0.6 * plain.saved
    assert half.saved == step(real("llama", "lora", {}, dtype=torch.bfloat16), 3, 40)[0] < plain.saved and half.base < plain.base
    assert half.adapter == plain.adapter, "adapters never live below float32"


def test_a_classifier_and_another_optimiser(folders):
    one = memory(folders["llama"], "lora", task="sequence-classification", batch=3, length=40)
    assert one.logits == 3 * 2 * 4 and one.saved > 0, "two classes for each of three sequences"
    plain, sgd = (memory(folders["llama"], "lora", batch=3, length=40, optimizer=o) for o in ("adamw", "sgd"))
    assert plain.optimizer == 2 * plain.gradients and sgd.optimizer == 0 and plain.saved == sgd.saved
    assert plain.peak - sgd.peak == plain.optimizer


def test_no_memory_is_taken(folders):
    """Planning for a thousand times the batch allocates nothing of that size."""
    code = f"""
import resource
from lorakit.planning import memory
memory({str(folders['llama'])!r}, "lora", batch=1, length=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
big = memory({str(folders['llama'])!r}, "lora", batch=20000, length=512)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert big.peak > 50 * 2**30, big.peak
assert (after - before) * 1024 < 2**28, (before, after)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_live_counts_what_is_alive():
    with Live(torch.nn.Linear(1, 1)) as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        assert live.now == 8000
        del a
        gc.collect()
        assert live.now == 4000
        del b
    assert live.peak == 8000 and live.now == 0


def test_the_command_line_says_what_fits(folders, call):
    def run(*words):
        return call("plan", folders["llama"], "--batch", "3", "--length", "40", *words)

    told = json.loads(run("--methods", "lora,none", "--memory", "2MB", "--json")[1])
    plan = memory(folders["llama"], "lora", batch=3, length=40)
    assert told["lora"] == plan.to_dict() | {"fits": plan.peak <= 2_000_000} and set(told) == {"lora", "none"}
    assert "peak" in run()[1]
    for words, says in ((["--methods", "lroa"], "did you mean `lora`"), (["--memory", "much"], "not a size"), (["--set", "r"], "KEY=VALUE"),
                        (["--optimizer", "adma"], "did you mean `adamw`"), (["--batch", "0"], "at least 1")):
        code, _, wrong = run(*words)
        assert code == 1 and says in " ".join(wrong.split()), (words, wrong)


@pytest.mark.parametrize("looking", [counting_saved, lambda m: lean()], ids=["counting", "lean"])
def test_a_step_that_was_looked_at_is_freed(looking):
    """Also without a backward pass: a node that keeps its own result (tanh) is not held by it."""
    model, made = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()), []
    model[1].register_forward_hook(lambda m, args, y: made.append(weakref.ref(y)))
    with looking(model):
        y = model(torch.ones(2, 3)).sum()
    assert made[0]() is None, "the result is the graph's alone"
    del y
    with looking(model):
        y = model(torch.ones(2, 3))
    y.sum().backward()
    assert model[0].weight.grad.any()
    del y
    gc.collect()
    assert made[1]() is None


def test_time_is_that_of_one_layer_and_so_many_more(tmp_path):
    """A slow round counts for nothing; the calibration never makes the deep model."""
    assert extrapolated([(1.0, 1.5), (1.25, 1.75), (9.0, 9.5)], 5) == 1.25 + 4 * 0.5
    assert extrapolated([(1.0, 0.5)], 5) == 1.0
    sizes = {"vocab_size": 96, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 256, "num_key_value_heads": 2}
    tf.LlamaConfig(**sizes, num_hidden_layers=10**6, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    told = seconds(tmp_path, "lora", batch=4, length=32, at_least=0.05)
    assert told.step > 0 and told.tokens_per_second == pytest.approx(4 * 32 / told.step)
    assert shallow(tf.Gemma3TextConfig(num_hidden_layers=8), 2).layer_types == tf.Gemma3TextConfig(num_hidden_layers=8).layer_types[:2]


@pytest.mark.parametrize("goal", GOALS)
def test_the_guide_recommends_what_fits_and_says_why_not(goal, folders):
    step = {"batch": 3, "length": 40}
    free = advise(folders["llama"], goal, **step)
    assert free.method == GOALS[goal][1][0].method and free.why and "rank" in free.rank_rule
    assert free.memory == memory(folders["llama"], free.method, gradient_checkpointing=free.checkpointing, quantize=free.quantize, **step, **free.options)
    last = None
    for limit in (free.memory.peak - 1,):
        tight = advise(folders["llama"], goal, limit, **step)
        assert tight.method is None or tight.memory.peak <= limit, "recommended what does not fit"
        assert any("GiB at its peak" in why for _, why in tight.ruled_out)
        last = tight
    nothing = advise(folders["llama"], goal, 1000, **step)
    assert nothing.method is None and "nothing fits" in nothing.why and last is not None
    config = free.config("somewhere")
    lorakit.adapt(real("llama", None, {}), **{"adapter" if k == "method" else k: v for k, v in config["adapter"].items()})


def test_ranks_are_within_their_band_and_a_percent_of_the_base():
    assert rank_for(500_000_000, 300_000)[0] == 16 and rank_for(500_000_000, 500_000)[0] == 8
    assert rank_for(8_000_000_000, 2_600_000)[0] == 16 and rank_for(8_000_000_000, 1_000_000)[0] == 32
    assert rank_for(70_000_000_000, 20_000_000)[0] == 16 and rank_for(1_000_000, 1_000_000)[0] == 8


def test_the_command_line_recommends_times_and_draws(folders, tmp_path, call):
    def run(*words):
        return call("plan", folders["llama"], "--batch", "3", "--length", "40", *words)

    told = json.loads(run("--goal", "memory", "--memory", "50MB", "--json")[1])
    assert told["method"] == "lora-fa" and told["config"]["adapter"]["method"] == "lora-fa" and told["memory"]["peak"] < 50_000_000
    assert told["config"]["base"]["quantize"] == "nf4", "least memory is with a base in 4 bits"
    tight = json.loads(run("--goal", "quality", "--memory", "0.6MB", "--json")[1])
    assert tight["method"] is None or tight["memory"]["peak"] < 600_000
    kept = json.loads(run("--methods", "lora", "--quantize", "nf4", "--json")[1])["lora"]
    assert kept["base"] < 0.8 * json.loads(run("--methods", "lora", "--json")[1])["lora"]["base"]
    assert "Take lora" in run("--goal", "speed")[1]
    assert "did you mean `memory`" in run("--goal", "memroy")[2]
    timed = json.loads(run("--methods", "lora", "--time", "--json", "--picture", str(tmp_path / "plan.png"))[1])
    assert timed["lora"]["seconds_per_step"] > 0 and (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_planned_says_so(folders, tmp_path):
    with pytest.raises(LorakitError, match="there is no config.json"):
        memory(tmp_path, "lora")
    with pytest.raises(LorakitError, match="a step of the task `seq2seq` is not known"):
        memory(folders["llama"], "lora", task="seq2seq")
