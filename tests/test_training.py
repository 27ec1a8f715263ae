"""Resume to the bit through Trainer and TRL, hooks in their order, whole runs in every stage, and what a user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

import lorakit
from lorakit.errors import LorakitError
from lorakit.hooks import HOOKS, Hook, LoRAPlus
from lorakit.models import load_tokenizer
from lorakit.training import AdapterTrainer, AdapterTrainerMixin
from lorakit.training import config as c
from lorakit.training import run as r

TEXT = "\n".join(f"the {a} {b} sat on the {p} and looked at the {q}." for a in ("old", "red", "small") for b in ("cat", "dog", "owl")
                 for p in ("mat", "roof", "tree") for q in ("moon", "sea", "road")) + "\n"


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of its own, as a folder."""
    out = tmp_path_factory.mktemp("base")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"],
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64).save_pretrained(out)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=tok.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                                 pad_token_id=0, initializer_range=0.1)).save_pretrained(out)
    return out


class Noisy(Hook):
    """Random and stateful: perturbs gradients, counts, and notes the order of events."""

    def __init__(self):
        self.generator, self.count, self.events = torch.Generator().manual_seed(7), 0, []

    def before_forward(self, model, step):
        self.events.append("before_forward")

    def extra_loss(self, model, outputs):
        self.events.append("extra_loss")
        return sum(p.square().sum() for p in model.parameters() if p.requires_grad) * 1e-3

    def before_step(self, model, optimizer, step):
        self.events.append("before_step")
        for p in model.parameters():
            if p.requires_grad:
                assert p.grad is not None
                p.grad.add_(torch.randn(p.shape, generator=self.generator) * 1e-2)

    def after_step(self, model, optimizer, step):
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        self.events.append("after_step")

    def on_interval(self, model, optimizer, scheduler, step):
        self.count += 1
        self.events.append("on_interval")

    def before_save(self, model, path):
        self.events.append("before_save")

    def state_dict(self):
        return {"generator": self.generator.get_state(), "count": self.count}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.count = state["count"]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kw):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


ROWS = [{"input_ids": (i := torch.randint(3, 48, (12,), generator=torch.Generator().manual_seed(n))), "labels": i} for n in range(24)]


def arguments(out, **kw):
    return TrainingArguments(str(out), **{"max_steps": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "save_steps": 3,
                                          "logging_steps": 100, "report_to": "none", "learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True,
                                          "lr_scheduler_type": "cosine", **kw})


def same_state(a, b):
    """Adapter tensors and optimiser state, equal to the bit."""
    pa, pb = dict(a.model.named_parameters()), dict(b.model.named_parameters())
    assert pa.keys() == pb.keys()
    for k in pa:
        assert torch.equal(pa[k], pb[k]), k
    sa, sb = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert sa.keys() == sb.keys() and len(sa) > 0
    for k, v in sa.items():
        for n, t in v.items():
            assert torch.equal(t, sb[k][n]), (k, n)


@pytest.mark.parametrize("recipe", ["lora", "dora", "lora-nonzero", "full", "base-storage"])
def test_trainer_resumes_to_the_bit(recipe, tmp_path):
    def trainer(out, stop=None):
        model = tiny.llama()
        if recipe == "base-storage":
            lorakit.adapt(model, "lora", r=3, lora_dropout=0.2, init={"name": "nonzero", "storage": "base"})
        else:
            lorakit.adapt(model, recipe, **({} if recipe == "full" else {"r": 3, "lora_dropout": 0.2}))
        hooks = [Noisy()] if recipe == "full" else [LoRAPlus(4.0), Noisy()]
        return AdapterTrainer(model=model, args=arguments(out), train_dataset=ROWS, hooks=hooks, callbacks=[StopAt(stop)] if stop else None)

    straight = trainer(tmp_path / "a")
    straight.train()
    trainer(tmp_path / "b", stop=4).train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    same_state(straight, resumed)
    assert straight.hooks[-1].count == resumed.hooks[-1].count == 8
    files = {f.name for f in (tmp_path / "a" / "checkpoint-6").iterdir()}
    assert "model.safetensors" not in files and {"adapter_model.safetensors", "receipt.json", "optimizer.pt", "lorakit_hooks.pt"} <= files


def test_hooks_are_called_in_order(tmp_path):
    hook = Noisy()
    model = lorakit.adapt(tiny.llama(), r=2)
    AdapterTrainer(model=model, args=arguments(tmp_path, max_steps=1, save_steps=1), train_dataset=ROWS, hooks=[hook]).train()
    assert hook.events == ["before_forward", "extra_loss", "extra_loss", "before_step", "after_step", "on_interval", "before_save"]


def test_plain_loop_equals_trainer(tmp_path):
    """The same three steps by hand: nothing depends on the bridge."""
    model = lorakit.adapt(tiny.llama(), "dora", r=2)
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=1, lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no")
    trainer = AdapterTrainer(model=model, args=args, train_dataset=ROWS)
    batches = [next(it)["input_ids"] for it in [iter(trainer.get_train_dataloader())] for _ in range(3)]
    trainer = AdapterTrainer(model=lorakit.adapt(tiny.llama(), "dora", r=2), args=args, train_dataset=ROWS)
    trainer.train()
    order = [{"input_ids": b, "labels": b} for b in batches]
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    model.train()
    for b in order:
        model(**b).loss.backward()
        opt.step()
        opt.zero_grad()
    for (k, a), (_, b) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), k


def test_lora_plus_groups():
    model = lorakit.adapt(tiny.llama(), "dora", r=2, target_modules=["q_proj"])
    group = {"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.5, "weight_decay": 0.0}
    slow, fast = LoRAPlus(8.0).param_groups(model, [group])
    names = {id(p): n for n, p in model.named_parameters()}
    assert (slow["lr"], fast["lr"]) == (0.5, 4.0)
    assert all(".lora_B." in names[id(p)] for p in fast["params"]) and len(fast["params"]) == 2
    assert len(slow["params"]) == 4 and not {id(p) for p in slow["params"]} & {id(p) for p in fast["params"]}


def test_trainer_without_adapter_is_refused(tmp_path):
    with pytest.raises(LorakitError, match="no adapters"):
        AdapterTrainer(model=tiny.llama(), args=arguments(tmp_path), train_dataset=ROWS)


class TestTRL:
    @pytest.fixture(autouse=True)
    def _trl(self):
        pytest.importorskip("trl")

    def _sft(self, base, out, stop=None):
        from trl import SFTConfig, SFTTrainer

        class Trainer(AdapterTrainerMixin, SFTTrainer):
            pass

        from datasets import Dataset

        data = Dataset.from_list([{"prompt": line[:20], "completion": line[20:]} for line in TEXT.splitlines()[:24]])
        model = lorakit.adapt(lorakit_base(base), "dora", r=3, lora_dropout=0.1)
        args = SFTConfig(str(out), max_steps=6, per_device_train_batch_size=4, save_steps=2, report_to="none", learning_rate=1e-2, disable_tqdm=True,
                         use_cpu=True, bf16=False, max_length=48, gradient_checkpointing=False)
        return Trainer(model=model, args=args, train_dataset=data, processing_class=load_tokenizer(base), hooks=[Noisy()],
                       callbacks=[StopAt(stop)] if stop else None)

    def test_sft_resumes_to_the_bit(self, base, tmp_path):
        straight = self._sft(base, tmp_path / "a")
        straight.train()
        self._sft(base, tmp_path / "b", stop=4).train()
        resumed = self._sft(base, tmp_path / "b")
        resumed.train(resume_from_checkpoint=True)
        same_state(straight, resumed)
        moved = [p.detach().abs().sum() for n, p in resumed.model.named_parameters() if ".lora_B." in n]
        assert all(m > 0 for m in moved), "the adapter did not learn through SFTTrainer"

    def _dpo(self, base, out, stop=None):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Trainer(AdapterTrainerMixin, DPOTrainer):
            pass

        lines = TEXT.splitlines()[:16]
        data = Dataset.from_list([{"prompt": a[:12], "chosen": a[12:], "rejected": b[12:][::-1]} for a, b in zip(lines, lines[::-1], strict=True)])
        model = lorakit.adapt(lorakit_base(base), "lora", r=3)
        args = DPOConfig(str(out), max_steps=4, per_device_train_batch_size=4, save_steps=2, report_to="none", learning_rate=1e-2, disable_tqdm=True,
                         use_cpu=True, bf16=False, max_length=48, gradient_checkpointing=False)
        return Trainer(model=model, args=args, train_dataset=data, processing_class=load_tokenizer(base), callbacks=[StopAt(stop)] if stop else None)

    def test_dpo_resumes_to_the_bit(self, base, tmp_path):
        straight = self._dpo(base, tmp_path / "a")
        straight.train()
        self._dpo(base, tmp_path / "b", stop=2).train()
        resumed = self._dpo(base, tmp_path / "b")
        resumed.train(resume_from_checkpoint=True)
        same_state(straight, resumed)

    def test_adapter_on_a_bypassed_head_is_refused(self, base, tmp_path):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class Trainer(AdapterTrainerMixin, SFTTrainer):
            pass

        model = lorakit.adapt(tiny.llama(), target_modules=["lm_head"])
        plain = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        data = Dataset.from_list([{"text": "the cat"}])
        tok = load_tokenizer(base)
        try:
            trainer = Trainer(model=model, args=plain, train_dataset=data, processing_class=tok)
        except LorakitError as e:
            assert "skipped silently" in str(e)
        else:  # this TRL calls the head: then the adapter must have a gradient
            trainer.train()
            assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if ".lora_B." in n)


def lorakit_base(base: Path):
    from lorakit.models import load_base

    return load_base(base, dtype="float32")


def config(base: Path, tmp: Path, **kw) -> c.Run:
    (tmp / "text.txt").write_text(TEXT)
    raw = {"base": str(base), "adapter": {"method": "lora", "r": 4}, "data": {"train": str(tmp / "text.txt"), "max_length": 32},
           "train": {"max_steps": 12, "learning_rate": 2e-2, "batch_size": 8, "threads": 1}, "output": str(tmp / "run"), "eval": {"max_new_tokens": 4}}
    return c.parse(raw | kw)


def test_whole_run_learns_and_verifies(base, tmp_path):
    said = []
    rec = r.train(config(base, tmp_path), say=said.append)
    assert rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"] - 0.3
    assert rec["verify"]["ok"] and all(p["ok"] for p in rec["verify"]["points"])
    out = tmp_path / "run"
    assert {"config.yaml", "run.json", "report.html", "loss.png", "adapter"} <= {f.name for f in out.iterdir()}
    assert c.parse(yaml.safe_load((out / "config.yaml").read_text())) == config(base, tmp_path), "the resolved config runs again"
    assert json.loads((out / "run.json").read_text())["metrics"] == rec["metrics"]
    with pytest.raises(LorakitError, match="already holds a finished run"):
        r.train(config(base, tmp_path), say=said.append)


def test_run_resumes_to_the_bit(base, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    long = {"max_steps": 12, "learning_rate": 2e-2, "batch_size": 8, "save_steps": 4, "threads": 1}
    adapter = {"method": "dora", "r": 4, "lora_dropout": 0.2}
    r.train(config(base, tmp_path, train=long, adapter=adapter, output=str(tmp_path / "a")), say=lambda s: None)
    init = r._RunTrainer.__init__
    monkeypatch.setattr(r._RunTrainer, "__init__", lambda self, *a, **k: init(self, *a, **k, callbacks=[Crash(9)]))
    with pytest.raises(KeyboardInterrupt):
        r.train(config(base, tmp_path, train=long, adapter=adapter, output=str(tmp_path / "b")), say=lambda s: None)
    monkeypatch.undo()
    r.train(config(base, tmp_path, train=long, adapter=adapter, output=str(tmp_path / "b")), resume=True, say=lambda s: None)
    a, b = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Crash(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["continue", "freeze", "merge"])
def test_stages_start_where_the_last_ended_and_serve_what_was_trained(stage, base, tmp_path):
    from lorakit.cli.use import ready
    from lorakit.training.measure import token_loss

    first = r.train(config(base, tmp_path, adapter={"method": "dora", "r": 3}), say=lambda s: None)
    run = config(base, tmp_path, from_adapter={"path": str(tmp_path / "run" / "adapter"), "stage": stage}, output=str(tmp_path / "second"),
                 adapter={"method": "dora", "r": 2})
    rec = r.train(run, say=lambda s: None)
    assert abs(rec["metrics"]["before"]["eval_loss"] - first["metrics"]["after"]["eval_loss"]) < 1e-4, "the second stage does not start at the end of the first"
    assert rec["verify"]["ok"], rec["verify"]
    model, tok = ready(tmp_path / "second" / "adapter", None)
    p = r.prepare(run)
    with torch.no_grad():
        loss = token_loss(model, p.heldout.rows, tok.pad_token_id, 16)
    assert abs(loss - rec["metrics"]["after"]["eval_loss"]) < 1e-4, "what is loaded is not what was trained"
    assert [s["stage"] for s in rec["lineage"]] == [stage]


def test_classification(base, tmp_path):
    rows = [{"text": line, "label": line.split()[2]} for line in TEXT.splitlines()]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = config(base, tmp_path, data={"train": str(tmp_path / "c.jsonl"), "eval_fraction": 0.3},
                 train={"epochs": 12, "learning_rate": 1e-2, "batch_size": 8, "threads": 1})
    rec = r.train(run, say=lambda s: None)
    assert rec["labels"] == ["cat", "dog", "owl"]
    assert rec["metrics"]["after"]["accuracy"] > max(0.6, rec["metrics"]["before"]["accuracy"])
    assert rec["verify"]["ok"], rec["verify"]
    keys = lorakit.proof.Folder(tmp_path / "run" / "adapter").tensors
    assert "base_model.model.score.weight" in keys, "the head must be saved with the adapter"


def test_training_data_of_every_shape_runs(base, tmp_path):
    lines = TEXT.splitlines()[:20]
    shapes = {
        "messages": [{"messages": [{"role": "user", "content": t[:9]}, {"role": "assistant", "content": t[9:20]}]} for t in lines],
        "alpaca": [{"instruction": "go on", "input": t[:9], "output": t[9:20]} for t in lines],
        "prompt_completion": [{"prompt": t[:9], "completion": t[9:20]} for t in lines],
    }
    for shape, rows in shapes.items():
        (tmp_path / f"{shape}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        run = config(base, tmp_path, data={"train": str(tmp_path / f"{shape}.jsonl"), "max_length": 64}, train={"max_steps": 1, "threads": 1},
                     eval={"metrics": ["exact_match"], "max_new_tokens": 2}, output=str(tmp_path / f"run_{shape}"))
        rec = r.train(run, say=lambda s: None)
        assert rec["data"]["shape"] == shape and 0 <= rec["metrics"]["after"]["exact_match"] <= 1
        assert rec["data"]["trained_tokens"] < rec["data"]["tokens"], "only answers are trained"


def test_preference_pairs_run_through_dpo(base, tmp_path):
    pytest.importorskip("trl")
    lines = TEXT.splitlines()[:30]
    rows = [{"prompt": t[:12], "chosen": t[12:24], "rejected": t[12:24][::-1]} for t in lines]
    chats = [{"prompt": [{"role": "user", "content": t[:12]}], "chosen": [{"role": "assistant", "content": t[12:20]}],
              "rejected": [{"role": "assistant", "content": t[12:20][::-1]}]} for t in lines]
    for name, some in (("plain", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
        run = config(base, tmp_path, data={"train": str(tmp_path / f"{name}.jsonl"), "max_length": 48, "eval_fraction": 0.2},
                     output=str(tmp_path / f"run_{name}"), train={"max_steps": 15, "learning_rate": 2e-2, "batch_size": 4, "threads": 1})
        rec = r.train(run, say=lambda s: None)
        assert rec["data"]["shape"] == "preference" and rec["verify"]["ok"], rec["verify"]
        assert rec["metrics"]["after"]["preference_accuracy"] > max(0.5, rec["metrics"]["before"]["preference_accuracy"] - 1e-9), rec["metrics"]


def cli(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lorakit", *words], capture_output=True, text=True, cwd=cwd, timeout=120)


WRONG = {
    "unknown key": (["--set", "train.lerning_rate=1"], "did you mean `learning_rate`"),
    "unknown group": (["--set", "trian.seed=1"], "did you mean `train`"),
    "unknown method": (["--set", "adapter.method=dorra"], "did you mean `dora`"),
    "unknown target": (["--set", "adapter.target_modules=[q_prj]"], "did you mean `q_proj`"),
    "one of two targets": (["--set", "adapter.target_modules=[q_proj, vproj]"], "`v_proj`"),
    "rank": (["--set", "adapter.r=0"], "at least 1"),
    "missing data": (["--set", "data.train=nothing.jsonl"], "nothing.jsonl"),
    "empty data": (["--set", "data.train=empty.jsonl"], "empty"),
    "never answered": (["--set", "data.train=long.jsonl", "--set", "data.max_length=8", "--set", "data.eval_fraction=0"], "label never answered"),
    "no such base": (["--set", "base=./nobase"], "nobase"),
    "metric without answers": (["--set", "eval.metrics=[exact_match]"], "needs rows with an answer"),
    "unknown hook": (["--set", "hooks=[lora_plsu]"], "did you mean `lora_plus`"),
    "unknown scheduler": (["--set", "train.lr_scheduler_type=cosin"], "did you mean `cosine`"),
    "unknown optimiser": (["--set", "train.optim=adamw_torc"], "did you mean `adamw_torch`"),
}


def test_mistakes_on_the_command_line(base, tmp_path, monkeypatch, capsys):
    """Each is one clear line on the error stream, exit 1, and nothing written."""
    from lorakit.cli import app

    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"prompt": "a b c " * 40, "completion": "d e f g h i j k " * 30}) for _ in range(4)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"base": str(base), "data": "text.txt", "train": {"max_steps": 2}, "output": "out"}))
    monkeypatch.chdir(tmp_path)
    for what, (words, part) in WRONG.items():
        monkeypatch.setattr(sys, "argv", ["lorakit", "train", "run.yaml", *words])
        code = app.run(app.app)
        text = " ".join(capsys.readouterr().err.split())
        assert code == 1 and part in text and "Traceback" not in text, (what, code, text)
        assert not (tmp_path / "out" / "adapter").exists(), what


def test_verify_generate_merge_from_the_shell(base, tmp_path):
    """Real processes: exit codes and what is printed."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"base": str(base), "data": {"train": "text.txt", "max_length": 32}, "output": "out",
                                                       "train": {"max_steps": 3, "learning_rate": 1e-2}, "eval": {"max_new_tokens": 3}}))
    done = cli("train", "run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout and (tmp_path / "out" / "report.html").is_file()
    good = cli("verify", "out/adapter", cwd=tmp_path)
    assert good.returncode == 0 and good.stdout.strip().endswith("PASS"), good
    assert cli("merge", "out/adapter", "-o", "merged", cwd=tmp_path).returncode == 0
    bad = cli("verify", "out/adapter", "--merged", str(base), cwd=tmp_path)
    assert bad.returncode == 1 and "the merge wrote the base back" in bad.stdout
    text = cli("generate", "the old", "-a", "out/adapter", "--max-new-tokens", "3", cwd=tmp_path)
    assert text.returncode == 0 and text.stdout.startswith("the old")
    assert cli("inspect", "out/nothing", cwd=tmp_path).returncode == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_optimiser_that_pages_says_that_there_is_nothing_to_page(base, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    run = c.parse({"base": str(base), "data": {"train": str(tmp_path / "text.txt"), "max_length": 32}, "train": {"max_steps": 1, "optim": "paged_adamw_8bit"},
                   "eval": {"samples": 0}, "output": str(tmp_path / "out")})
    with monkeypatch.context() as m:
        m.setattr(r, "find_spec", lambda name: None)
        with pytest.raises(LorakitError, match="mend: pip install bitsandbytes"):
            r.train(run)
    pytest.importorskip("bitsandbytes")
    said = []
    assert r.train(run, say=said.append)["verify"]["ok"]
    assert "there is no GPU, so there is nothing to page" in " ".join(said)


def test_registry_of_hooks():
    from lorakit.hooks.base import build

    assert build({"lora_plus": {"ratio": 4}}).ratio == 4 and build("lora-plus").ratio == 16.0 and set(HOOKS) >= {"lora_plus"}
    with pytest.raises(LorakitError, match="no option `ratoi`"):
        build({"lora_plus": {"ratoi": 4}})


def test_numbers_that_yaml_reads_as_words():
    text = "{data: t.txt, train: {learning_rate: 1e-3}, adapter: {dropout: 1e-1}, hooks: [{factor_decay: {weight: 1e-3}}]}"
    run = c.parse(yaml.safe_load(text))
    assert (run.train.learning_rate, run.adapter["dropout"], run.hooks) == (1e-3, 0.1, [{"factor_decay": {"weight": 1e-3}}])
