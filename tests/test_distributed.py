"""Two processes on one machine (gloo): they train what one does on the whole batch, save whole adapters, and go on as if never stopped."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_host import shake
from tiny import logits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import lorakit
from lorakit import LorakitError, host
from lorakit.formats.receipt import fingerprint
from lorakit.hooks import LoRAPlus
from lorakit.training import AdapterTrainer

METHODS = {"lora": ("lora", {"r": 3}), "dora": ("dora", {"r": 3}), "saved": ("lora", {"r": 1, "modules_to_save": ["lm_head"]}), "full": ("full", {}),
           "prompt": ("prompt-tuning", {"num_virtual_tokens": 3}), "prefix": ("lora", {"r": 2, "prompt": {"method": "prefix-tuning", "num_virtual_tokens": 3}})}
SHARED = {"vblora": ("vb-lora", {"vector_length": 8, "num_vectors": 6}), "lotr": ("lotr", {"r": 3}), "tied": ("tied-lora", {"r": 3})}  # one leaf, many layers
SOME, MORE = range(3), range(3, 6)  # steps before the save and after it
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo in this torch")


# Two processes


def _child(rank: int, world: int, job, folder: str, kw: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))  # as torchrun does
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=40))
    try:
        torch.save(job(Path(folder), **kw), f"{folder}/said-{rank}.pt")
    finally:
        dist.destroy_process_group()


def together(job, folder: Path, world: int = 2, limit: float = 90, **kw) -> list:
    """Runs `job(folder, **kw)` in several processes at once; what each returned."""
    mp.get_context("forkserver").set_forkserver_preload(["tiny", "probes", "torch.distributed.fsdp", "lorakit.training"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meet").unlink(missing_ok=True)
    group = mp.start_processes(_child, (world, job, str(folder), kw), nprocs=world, join=False, start_method="forkserver")
    end = time.monotonic() + limit
    while not group.join(timeout=0.2):
        if time.monotonic() > end:
            for p in group.processes:
                p.kill()
            pytest.fail(f"{job.__name__}: after {limit} s the processes still wait for each other")
    return [torch.load(folder / f"said-{n}.pt", weights_only=False) for n in range(world)]


def first() -> bool:
    return dist.get_rank() == 0


def adapted(method: str, **kw) -> nn.Module:
    recipe, options = (METHODS | SHARED)[method]
    return lorakit.adapt(tiny.llama(), recipe, **{**options, **kw})


def shard(model: nn.Module, *more: nn.Module) -> nn.Module:
    for m in [*more, *model.model.layers, model]:
        fully_shard(m)
    return model


def sharded(method: str, model: nn.Module) -> nn.Module:
    return fully_shard(model) if method in SHARED else shard(model)  # torch keeps a tensor that several layers share in one group


def batch(k: int, whole: bool) -> Tensor:
    x = torch.randint(4, tiny.VOCAB, (4, 6), generator=torch.Generator().manual_seed(k))
    return x if whole else x[2 * dist.get_rank():][:2]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, whole: bool = False) -> None:
    for k in steps:
        x = batch(k, whole)
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)  # a gradient near zero would turn rounding into a step


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """What trains, whole."""
    found = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in found.items()}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and len(a) > 0
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def error(verb) -> str:
    try:
        verb()
    except LorakitError as e:
        return str(e)
    return "no error"


def alone(method: str) -> dict[str, Tensor]:
    """One process, the whole batch."""
    model = adapted(method)
    train(model, adamw(model), range(6), whole=True)
    return leaves(model)


# DistributedDataParallel


def _ddp(folder: Path) -> dict:
    out = {}
    for method in METHODS | SHARED:
        model = DistributedDataParallel(adapted(method))
        optimizer = adamw(model)
        train(model, optimizer, SOME)
        if first():
            lorakit.save(model.module, folder / method)
            torch.save(optimizer.state_dict(), folder / f"{method}.pt")
        train(model, optimizer, MORE)
        out[method] = leaves(model)
    return out


def _ddp_again(folder: Path) -> dict:
    out = {}
    for method in METHODS | SHARED:
        model = DistributedDataParallel(lorakit.load(tiny.llama(), folder / method, trainable=True))
        optimizer = adamw(model)
        optimizer.load_state_dict(torch.load(folder / f"{method}.pt"))
        train(model, optimizer, MORE)
        out[method] = leaves(model)
    return out


def test_ddp_trains_saves_and_goes_on(tmp_path):
    one, other = together(_ddp, tmp_path)
    resumed, _ = together(_ddp_again, tmp_path)
    for method in METHODS | SHARED:
        assert gap(one[method], other[method]) == 0.0, "the processes have drifted apart"
        assert gap(one[method], alone(method)) <= 1e-6
        assert gap(one[method], resumed[method]) == 0.0, "resumed in two processes"
        model = lorakit.load(tiny.llama(), tmp_path / method, trainable=True)
        optimizer = adamw(model)
        optimizer.load_state_dict(torch.load(tmp_path / f"{method}.pt"))
        train(model, optimizer, MORE, whole=True)
        assert gap(one[method], leaves(model)) <= 1e-6, "resumed in one process"


def three() -> nn.Module:
    """Two adapters of a method whose tensors many layers share, and a bank beside a prompt."""
    model = tiny.llama()
    for seed, (name, method, more) in enumerate((("a", "tied", {}), ("b", "tied", {}), ("c", "vblora", {"prompt": "prompt-tuning"}))):
        lorakit.adapt(model, SHARED[method][0], name=name, seed=seed, **SHARED[method][1], **more)
    return model


def train_rows(model: nn.Module, steps: range, inner: nn.Module, share: slice) -> None:
    """One row for each adapter in each process."""
    optimizer = adamw(model)
    for k in steps:
        x = torch.randint(4, tiny.VOCAB, (6, 6), generator=torch.Generator().manual_seed(k))[share]
        with lorakit.rows(inner, ["a", "b", "c"] * (len(x) // 3)):
            model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _ddp_rows(folder: Path) -> tuple:
    model, rank = DistributedDataParallel(three()), dist.get_rank()
    train_rows(model, SOME, model.module, slice(3 * rank, 3 * rank + 3))
    for name in "abc":
        lorakit.save(model.module, folder / name, name)
    lorakit.activate(model.module, "a", "b")
    y, again = logits(model.module), copy.deepcopy(model.module)
    gaps = float((logits(again) - y).abs().max()), float((logits(lorakit.merged(model.module)) - y).abs().max())
    return leaves(model), gaps


def test_rows_of_adapters_with_shared_tensors_and_prompts_train_as_in_one_process(tmp_path):
    (one, gaps), (other, _) = together(_ddp_rows, tmp_path)
    model, back = three(), tiny.llama()
    begun = leaves(model)
    train_rows(model, SOME, model, slice(None))
    for name in "abc":
        lorakit.load(back, tmp_path / name, name=name, trainable=True)
    assert gap(one, other) == 0.0 and gap(one, leaves(model)) <= 1e-6 and gap(one, leaves(back)) == 0.0
    assert all(float((one[n] - t).abs().max()) > 1e-4 for n, t in begun.items()) and max(gaps) <= 1e-5


def _wrapped(folder: Path) -> dict:
    path, out = folder / f"a-{dist.get_rank()}", {}
    model = DistributedDataParallel(shake(adapted("lora")))
    y = logits(model.module)
    lorakit.save(model, path)
    out["adapt"] = error(lambda: lorakit.adapt(model, name="b", r=2))
    out["load to train"] = error(lambda: lorakit.load(model, path, name="b", trainable=True))
    with lorakit.disabled(model):
        out["disabled"] = float((logits(model.module) - logits(tiny.llama())).abs().max())
    lorakit.load(model, path, name="b", probe=True)
    out["loaded"] = float((logits(model.module) - y).abs().max())
    return out


def test_a_wrapped_model_is_saved_as_itself_but_gets_nothing_new_to_train(tmp_path):
    for rank, said in enumerate(together(_wrapped, tmp_path)):
        for verb, text in (("adapt", said["adapt"]), ("load", said["load to train"])):
            assert "inside a DistributedDataParallel" in text and f"mend: lorakit.{verb}(model.module, ...) before it is wrapped" in text
        assert said["disabled"] == said["loaded"] == 0.0
        assert torch.equal(logits(lorakit.load(tiny.llama(), tmp_path / f"a-{rank}")), logits(shake(adapted("lora"))))


def _at_once(folder: Path) -> list[str]:
    model, said = shake(adapted("dora")), []
    for _ in range(4):
        dist.barrier()
        said.append(error(lambda: lorakit.save(model, folder / "a")))
    return said


def test_every_process_may_save_to_the_same_place(tmp_path):
    assert together(_at_once, tmp_path) == [["no error"] * 4] * 2
    assert torch.equal(logits(lorakit.load(tiny.llama(), tmp_path / "a")), logits(shake(adapted("dora"))))


# FSDP2


def _fsdp(folder: Path) -> dict:
    out = {}
    for method in METHODS | SHARED:
        model = sharded(method, adapted(method))
        optimizer = adamw(model)
        train(model, optimizer, SOME)
        lorakit.save(model, folder / method)
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if first():
            torch.save(state, folder / f"{method}.pt")
        out[f"{method} saved"] = leaves(model)
        train(model, optimizer, MORE)
        out[method] = leaves(model)
    return out


def _fsdp_again(folder: Path) -> dict:
    out = {}
    for method in METHODS | SHARED:
        model = sharded(method, lorakit.load(tiny.llama(), folder / method, trainable=True))
        optimizer = adamw(model)
        set_optimizer_state_dict(model, optimizer, torch.load(folder / f"{method}.pt"), options=StateDictOptions(full_state_dict=True))
        train(model, optimizer, MORE)
        out[method] = leaves(model)
    return out


def test_fsdp_trains_saves_and_goes_on(tmp_path):
    one, other = together(_fsdp, tmp_path)
    resumed, _ = together(_fsdp_again, tmp_path)
    for method in METHODS | SHARED:
        assert gap(one[method], other[method]) == 0.0 and gap(one[method], alone(method)) <= 1e-5
        assert gap(one[method], resumed[method]) == 0.0, "resumed"
        written, there = load_file(tmp_path / method / "adapter_model.safetensors"), lorakit.load(tiny.llama(), tmp_path / method, trainable=True, probe=True)
        assert written and all(t.numel() > 0 for t in written.values())
        assert gap(leaves(there), one[f"{method} saved"]) == 0.0, "what was written is not what was trained"


def _gather(folder: Path) -> dict:
    out = {}
    for method in METHODS:
        model = shake(adapted(method))
        plain, y = fingerprint(model), logits(model)
        if first():
            lorakit.save(model, folder / f"plain-{method}")
        shard(model, model.lm_head)
        out[method] = {"forward": float((logits(model) - y).abs().max()), "prints": fingerprint(model) == plain}
        lorakit.save(model, folder / f"sharded-{method}")  # the call before it has left the root's parameters gathered
        out[method] |= {"again": fingerprint(model) == plain, "verified": lorakit.proof.verify(folder / f"sharded-{method}", model).ok,
                        "after": float((logits(model) - y).abs().max())}
    return out


def test_a_sharded_adapter_is_saved_as_a_whole_one(tmp_path):
    for said in together(_gather, tmp_path):
        for method, row in said.items():
            assert row["forward"] <= 1e-6 and row["after"] <= 1e-6 and row["prints"] and row["again"] and row["verified"], method
    for method in METHODS:
        a, b = (load_file(tmp_path / f"{how}-{method}" / "adapter_model.safetensors") for how in ("plain", "sharded"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        a, b = (json.loads((tmp_path / f"{how}-{method}" / "receipt.json").read_text()) for how in ("plain", "sharded"))
        assert a["base"] == b["base"] and a["modules"] == b["modules"] and a["keys"] == b["keys"]
        assert a["probe"]["logits"] == pytest.approx(b["probe"]["logits"], abs=1e-6)


def _shard_then_adapt(folder: Path) -> dict:
    if first():
        lorakit.save(shake(adapted("dora")), folder / "dora")
    dist.barrier()
    want, out = logits(lorakit.load(tiny.llama(), folder / "dora")), {}
    model = tiny.llama()
    shard(model, model.model.layers[0].mlp.up_proj, model.lm_head)
    out["adapt"] = error(lambda: lorakit.adapt(model, r=2))
    out["load to train"] = error(lambda: lorakit.load(model, folder / "dora", trainable=True))
    out["untouched"] = not any(isinstance(m, host.Host) for m in model.modules())
    lorakit.load(model, folder / "dora", probe=True)
    out["loaded"] = float((logits(model) - want).abs().max())
    with lorakit.disabled(model):
        out["disabled"] = float((logits(model) - logits(tiny.llama())).abs().max())
    lorakit.save(model, folder / "again")
    lorakit.detach(model)
    out["detached"] = float((logits(model) - logits(tiny.llama())).abs().max())
    out["class"] = isinstance(model.lm_head, FSDPModule) and not isinstance(model.lm_head, host.Host)
    return out


def test_a_sharded_base_takes_saved_adapters_but_no_new_ones(tmp_path):
    for said in together(_shard_then_adapt, tmp_path):
        assert "mend: lorakit.adapt(model, ...) first, then fully_shard" in said["adapt"]
        assert "mend: lorakit.load(model, ...) first, then fully_shard" in said["load to train"]
        assert said["untouched"] and said["class"] and max(said[k] for k in ("loaded", "disabled", "detached")) <= 1e-6
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("dora", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _adapt_then_shard(folder: Path) -> dict:
    model = shake(lorakit.adapt(tiny.llama(), "dora", r=3, target_modules=["q_proj", "up_proj", "lm_head"]))
    y, x = logits(model), tiny.ids()
    model(input_ids=x, labels=x).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    shard(model, model.model.layers[0].self_attn.q_proj, model.lm_head)
    out = {"classes": [type(m).__name__ for m in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.q_proj)],
           "forward": float((logits(model) - y).abs().max())}
    model(input_ids=x, labels=x).loss.backward()
    out["backward"] = gap(want, {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad})
    lorakit.save(model, folder / "a")
    for verb in ("merge", "merged", "detach"):
        out[verb] = error(partial(getattr(lorakit, verb), model))
    out["freeze"], out["delete"] = error(lambda: lorakit.freeze(model, "default")), error(lambda: lorakit.delete(model, "default"))
    out["after"] = float((logits(model) - y).abs().max())
    with lorakit.rows(model, ["default", None, "default"]):
        mixed = logits(model)
    out["rows"] = float((mixed[0] - y[0]).abs().max()), float((mixed[1] - logits(tiny.llama())[1]).abs().max())
    return out


def test_a_layer_with_an_adapter_may_itself_be_sharded(tmp_path):
    for said in together(_adapt_then_shard, tmp_path):
        assert said["classes"] == ["FSDPAdaptedLinear", "AdaptedLinear"]
        assert max(said["forward"], said["backward"], said["after"], *said["rows"]) <= 1e-6
        for verb in ("merge", "merged", "detach", "delete", "freeze"):
            assert "(FSDP)" in said[verb] and "mend:" in said[verb], verb


def _refusals(folder: Path) -> dict:
    out = {}
    model = shard(shake(adapted("lora")))
    (folder / "file").touch()
    out["no folder"] = error(lambda: lorakit.save(model, folder / "file" / "a"))
    lorakit.save(model, folder / "a")
    other = shard(shake(lorakit.adapt(tiny.llama(seed=1), r=2, name="mine"), "mine"))
    out["another base"] = error(lambda: lorakit.load(other, folder / "a"))
    was = fingerprint(model)
    if not first():
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.to_local().add_(1.0)
    now = fingerprint(model)  # one process sees the change; neither may wait for the other
    out["changed"] = [n for n in was if was[n] != now[n]]
    return out


def test_errors_are_raised_in_every_process(tmp_path):
    said = together(_refusals, tmp_path)
    for one in said:
        assert "could not write" in one["no folder"] and "was trained on another base" in one["another base"]
        assert one["changed"] == ["model.layers.0.mlp.up_proj.weight"]


def _small(folder: Path) -> dict:
    """A base in bfloat16 under leaves in float32, with gradient checkpointing."""
    out, x = {}, tiny.ids()
    for method in ("lora", "dora"):
        model = shake(lorakit.adapt(tiny.llama().to(torch.bfloat16), method, r=3))
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=x, labels=x).loss.backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        shard(model)
        model(input_ids=x, labels=x).loss.backward()
        out[method] = gap(want, {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad})
        lorakit.save(model, folder / method)
    return out


def test_a_bfloat16_base_under_float32_leaves(tmp_path):
    for said in together(_small, tmp_path):
        assert max(said.values()) <= 1e-6
    assert {t.dtype for t in load_file(tmp_path / "dora" / "adapter_model.safetensors").values()} == {torch.float32}


# Trainer


ROWS = [{"input_ids": (i := torch.randint(3, tiny.VOCAB, (12,), generator=torch.Generator().manual_seed(n))), "labels": i} for n in range(24)]


def trainer_run(method: str, out: str, sharding: str = "", resume: bool = False, best: bool = False) -> None:
    """AdapterTrainer over four rows a step, however many processes share them."""
    world, more = int(os.environ.get("WORLD_SIZE", "1")), {}
    if sharding:
        more = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": sharding}}
    if best:
        more |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3}
    args = TrainingArguments(**{"output_dir": out, "max_steps": 6, "per_device_train_batch_size": 4 // world, "save_steps": 2, "logging_steps": 100,
                                "report_to": "none", "learning_rate": 1e-2, "adam_epsilon": 1e-4, "disable_tqdm": True, "use_cpu": True,
                                "dataloader_pin_memory": False, "lr_scheduler_type": "cosine", "ddp_find_unused_parameters": False} | more)
    if sharding:  # accelerate knows FSDP on accelerators only: on the CPU it quietly trains with DDP
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = AdapterTrainer(model=adapted(method, lora_dropout=0.0), args=args, train_dataset=ROWS, eval_dataset=ROWS[:4],
                             hooks=[LoRAPlus(4.0)])
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.state.global_step == 6
    assert type(trainer.model_wrapped).__name__ == ("FSDPLlamaForCausalLM" if sharding else "DistributedDataParallel" if world > 1 else "LlamaForCausalLM")
    trainer.save_model(f"{out}/final")
    if best:
        (Path(out) / "best").write_text(Path(trainer.state.best_model_checkpoint).name)


def test_trainer_refuses_fsdp1(tmp_path, monkeypatch):
    make = AdapterTrainer.create_accelerator_and_postprocess

    def as_on_a_machine_that_has_it(self):
        make(self)
        monkeypatch.setitem(vars(self.accelerator.state), "fsdp_plugin", SimpleNamespace(fsdp_version=1))
        self.is_fsdp_enabled = True

    monkeypatch.setattr(AdapterTrainer, "create_accelerator_and_postprocess", as_on_a_machine_that_has_it)
    with pytest.raises(LorakitError, match=r"FSDP1 .* mend: fsdp_config: \{version: 2\}"):
        trainer_run("lora", str(tmp_path))


def run(*jobs: dict, world: int = 2) -> None:
    """`trainer_run` with these arguments, one after the other, in so many processes that torchrun starts."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([*launch, *map(json.dumps, jobs)], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _resumed(folder: Path, **job) -> None:
    trainer_run(out=str(folder), resume=True, **job)


@pytest.mark.parametrize(("sharding", "method"), [
    ("", "dora"), ("FULL_STATE_DICT", "saved"), pytest.param("SHARDED_STATE_DICT", "dora", marks=pytest.mark.slow)])
def test_trainer_in_two_processes(sharding, method, tmp_path):
    """Straight, and with the best checkpoint brought back at the end; then, in new processes, from the fourth step on."""
    job = {"method": method, "sharding": sharding}
    run(job | {"out": str(tmp_path / "a")}, job | {"out": str(tmp_path / "best"), "best": True})
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    together(_resumed, tmp_path / "b", **job)
    straight = tensors(tmp_path / "a" / "final")
    assert gap(straight, tensors(tmp_path / "b" / "final")) == 0.0, "resumed is not as if never stopped"
    trainer_run(method, str(tmp_path / "one"))
    assert gap(straight, tensors(tmp_path / "one" / "final")) <= 1e-5, "two processes do not train what one does"
    best = (tmp_path / "best" / "best").read_text()
    assert best != "checkpoint-6", "the last is the best, so nothing had to come back"
    assert gap(tensors(tmp_path / "best" / "final"), tensors(tmp_path / "best" / best)) == 0.0
    files = {str(f.relative_to(tmp_path / "a" / "checkpoint-4")) for f in (tmp_path / "a" / "checkpoint-4").rglob("*") if f.is_file()}
    mine = {"adapter_model.safetensors", "adapter_config.json", "receipt.json", "lorakit_hooks.pt"}
    theirs = {"training_args.bin", "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}
    assert mine | theirs <= files and all(f.startswith("optimizer") for f in files - mine - theirs), "a checkpoint holds more than what trains"
    assert lorakit.proof.verify(tmp_path / "a" / "final", tiny.llama()).ok


if __name__ == "__main__":
    for words in sys.argv[1:]:
        trainer_run(**json.loads(words))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as children of multiprocessing end: gloo's threads, which FSDP keeps, at times wake while the interpreter ends, and abort
