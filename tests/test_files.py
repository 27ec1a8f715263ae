"""Adapter folders: every way a file can be wrong is refused by name, a write is all or nothing, old folders go on loading."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import logits
from torch import nn

import lorakit
from lorakit import LorakitError, host
from lorakit.formats import files
from lorakit.formats.folder import Folder

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make as golden

GOLDEN = sorted(p for p in (Path(__file__).parent / "golden" / "v1").iterdir() if p.is_dir())
CONFIG, TENSORS, RECEIPT = "adapter_config.json", "adapter_model.safetensors", "receipt.json"


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


@torch.no_grad()
def fill(model, value, name="default"):
    for slot in host.slots(model, name).values():
        for k, t in slot.whole(name).items():
            if t.requires_grad:
                t.copy_(torch.linspace(-value, value, t.numel()).view_as(t) + (k == "m"))
    return model


def adapted(value=0.3, method="lora", width=8, **kw):
    return fill(lorakit.adapt(net(width=width), method, **{"r": 2, "target_modules": ["0", "2"]} | kw), value)


@pytest.fixture
def saved(tmp_path):
    """A good folder of a tiny Llama adapter."""
    model = fill(lorakit.adapt(tiny.llama(), "dora", r=2, target_modules=["q_proj", "up_proj"]), 0.3)
    return lorakit.save(model, tmp_path / "adapter")


def rewrite(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def rename(old, new):
    return lambda t: t.__setitem__(new, t.pop(old))


P = "base_model.model.model.layers.1."
Q = P + "self_attn.q_proj."
WRONG = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(Q + "lora_B.weight")), rf"{TENSORS}: the tensor `{Q}lora_B.weight` is missing"),
    "missing magnitude": (lambda f: rewrite(f, lambda t: t.pop(Q + "lora_magnitude_vector")), "lora_magnitude_vector` is missing"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.__setitem__(Q + "lora_C.weight", torch.ones(2))),
                     rf"`{Q}lora_C.weight` has no place in this model; did you mean `{Q}lora_[AB].weight`"),
    "renamed leaf": (lambda f: rewrite(f, rename(Q + "lora_A.weight", Q + "lora_Aa.weight")),
                     "lora_A.weight` is missing; did you mean `.*q_proj.lora_Aa.weight`"),
    "renamed module": (lambda f: rewrite(f, lambda t: [rename(k, k.replace("q_proj", "q_prj"))(t) for k in list(t) if "q_proj" in k]),
                       r"the adapter has `model\.layers\.0\.self_attn\.q_prj`, which this LlamaForCausalLM has not; did you mean `.*\.0\.self_attn\.q_proj`"),
    "another prefix": (lambda f: rewrite(f, lambda t: [rename(k, k.removeprefix("base_model."))(t) for k in list(t)]), "no tensor has a key of this method"),
    "misshaped": (lambda f: rewrite(f, lambda t: t.__setitem__(Q + "lora_B.weight", torch.ones(5, 2))),
                  r"lora_B.weight` has shape \[5, 2\], this model and configuration need \[16, 2\]"),
    "rank and config disagree": (lambda f: rewrite(f, lambda t: t.__setitem__(Q + "lora_A.weight", torch.ones(3, 16))),
                                 r"has shape \[3, 16\].* need \[2, 16\]"),
    "nan": (lambda f: rewrite(f, lambda t: t[Q + "lora_B.weight"].__setitem__((0, 0), float("nan"))), "lora_B.weight` holds NaN or infinity"),
    "infinity": (lambda f: rewrite(f, lambda t: t[Q + "lora_A.weight"].__setitem__((0, 0), float("inf"))), "lora_A.weight` holds NaN or infinity"),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-100]), rf"{TENSORS} is truncated or not a safetensors file \(\d+ bytes\)"),
    "cut to nothing": (lambda f: (f / TENSORS).write_bytes(b""), r"truncated or not a safetensors file \(0 bytes\)"),
    "something else": (lambda f: (f / TENSORS).write_text("<html>not found</html>"), "truncated or not a safetensors file"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), rf"there is no {TENSORS}"),
    "pickle only": (lambda f: [(f / TENSORS).unlink(), torch.save({}, f / "adapter_model.bin")],
                    r"there is a pickle \(adapter_model.bin\), which lorakit never opens: convert it to safetensors"),
    "broken json": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:200]), rf"{CONFIG} is not valid JSON \(truncated\?\)"),
    "json of another shape": (lambda f: (f / CONFIG).write_text("[1, 2]"), "should hold a JSON object, not a list"),
    "no config": (lambda f: (f / CONFIG).unlink(), rf"there is no {CONFIG}; the folder holds {TENSORS}, {RECEIPT}"),
    "broken receipt": (lambda f: (f / RECEIPT).write_text("{"), rf"{RECEIPT} is not valid JSON"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_and_the_model_stays_as_it_was(what, saved):
    change, why = WRONG[what]
    change(saved)
    model = fill(lorakit.adapt(tiny.llama(), r=2, name="there", target_modules=["v_proj"]), 0.2, "there")
    y, keys, classes = logits(model), list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(LorakitError, match=why):
        lorakit.load(model, saved, "new")
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    assert lorakit.active(model) == {"there": 1.0} and list(lorakit.adapters(model)) == ["there"] and torch.equal(logits(model), y)


def test_a_folder_that_is_not_there_names_its_neighbours(saved):
    with pytest.raises(LorakitError, match=r"there is no adapter folder .*adaptor; did you mean `adapter`"):
        lorakit.load(tiny.llama(), saved.with_name("adaptor"))


def test_a_newer_format_is_refused_by_number(tmp_path):
    lorakit.save(adapted(method="lora-nonzero"), tmp_path, form="native")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lorakit_format": 99}))
    with pytest.raises(LorakitError, match="written in format 99, this lorakit reads up to 1; mend: upgrade"):
        lorakit.load(net(), tmp_path)


@pytest.mark.parametrize(("change", "why"), [
    (lambda c: c["modules"]["0"].__setitem__("method", "ofset"), "unknown method `ofset`; did you mean `offset`"),
    (lambda c: c["modules"]["0"]["inner"].__setitem__("rr", 3), "lora has no field `rr`"),
    (lambda c: c["modules"].__setitem__("7", c["modules"].pop("0")), "the adapter has `7`, which this Sequential has not")])
def test_our_own_config_is_checked_by_name(change, why, tmp_path):
    lorakit.save(adapted(method="lora-nonzero"), tmp_path, form="native")
    config = json.loads((tmp_path / CONFIG).read_text())
    change(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(LorakitError, match=why):
        lorakit.load(net(), tmp_path)


# The base


def test_another_base_is_refused_and_the_tensors_that_differ_are_named(saved):
    other = tiny.llama()
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight[3, 4] += 0.5
        other.model.norm.weight[0] += 1
    with pytest.raises(LorakitError, match="trained on another base") as e:
        lorakit.load(other, saved)
    said = str(e.value)
    assert "model.layers.0.mlp.gate_proj.weight: values differ" in said and "model.norm.weight: values differ" in said
    assert "q_proj" not in said and "mend: load that base, or pass check_base=false" in said.lower()
    assert not any(isinstance(m, host.Host) for m in other.modules())
    lorakit.load(other, saved, check_base=False)


def test_a_base_of_another_size_is_told_from_one_of_other_values(saved):
    with pytest.raises(LorakitError, match=r"not in this base|shape"):
        lorakit.load(tiny.llama(layers=1), saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(dtype, saved):
    model = lorakit.load(tiny.llama().to(dtype), saved)
    assert lorakit.active(model) == {"default": 1.0}


def test_a_base_kept_in_float16_is_recognised_in_float32(tmp_path):
    half = tiny.llama().half()
    lorakit.save(fill(lorakit.adapt(half, r=2, target_modules=["q_proj"]), 0.3), tmp_path)
    lorakit.load(tiny.llama().half().float(), tmp_path)
    with pytest.raises(LorakitError, match="another base"):
        lorakit.load(tiny.llama(seed=1).half(), tmp_path)


def test_loading_on_a_base_with_an_adapter_merged_in_is_refused(saved):
    model = fill(lorakit.adapt(tiny.llama(), r=2, name="x", target_modules=["q_proj"]), 0.3, "x")
    lorakit.merge(model)
    with pytest.raises(LorakitError, match="merged"):
        lorakit.load(model, saved)
    plain = lorakit.merged(fill(lorakit.adapt(tiny.llama(), r=2, target_modules=["q_proj"]), 0.3))
    with pytest.raises(LorakitError, match=r"another base.*layers\.0\.self_attn\.q_proj\.weight: values differ"):
        lorakit.load(plain, saved)


def test_the_fingerprint_follows_a_change_of_the_base_between_two_saves(tmp_path):
    model = adapted()
    a = json.loads((lorakit.save(model, tmp_path / "a") / RECEIPT).read_text())["base"]
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    b = json.loads((lorakit.save(model, tmp_path / "b") / RECEIPT).read_text())["base"]
    assert a["digest"] != b["digest"] and a["tensors"]["2.weight"] == b["tensors"]["2.weight"]


# The receipt


def test_what_a_receipt_holds(saved):
    r = json.loads((saved / RECEIPT).read_text())
    assert set(r) >= {"format", "created", "adapter", "spec", "base", "modules", "keys", "files", "versions", "lineage", "probe"}
    model = tiny.llama()
    assert set(r["base"]["tensors"]) == {n for n, _ in model.named_parameters()} and r["base"]["class"] == "LlamaForCausalLM"
    for n, p in model.named_parameters():
        assert r["base"]["tensors"][n]["shape"] == list(p.shape) and r["base"]["tensors"][n]["dtype"] == "float32"
    assert set(r["files"]) == {CONFIG, TENSORS} and all(files.sha256(saved / f) == d for f, d in r["files"].items())
    assert {k: list(t.shape) for k, t in load_file(saved / TENSORS).items()} == r["keys"]
    assert len(r["modules"]) == 4
    live = lorakit.load(model, saved)
    for path, row in r["modules"].items():
        slot = host.slots(live)[path]
        W, V = slot.map({}).weight(), slot.map({"default": 1.0}).weight()
        assert row["delta_norm"] == pytest.approx(float((V - W).norm()), rel=1e-4) and row["base_norm"] == pytest.approx(float(W.norm()), rel=1e-4)
        assert row["trainable"] == sum(t.numel() for t in slot.params("default").values()) == 2 * (W.shape[0] + W.shape[1]) + W.shape[0]
    assert r["probe"]["moved"] > 1e-3 and r["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("method", ["lora", "dora", "lora-nonzero", "full"])
def test_norms_in_the_receipt_are_those_of_the_dense_update(method, tmp_path):
    model = adapted(method=method) if method != "full" else fill(lorakit.adapt(net(), "full", target_modules=["0", "2"]), 0.3)
    lorakit.save(model, tmp_path)
    for path, row in json.loads((tmp_path / RECEIPT).read_text())["modules"].items():
        slot = host.slots(model)[path]
        want = float((slot.map({"default": 1.0}).weight() - slot.map({}).weight()).detach().double().norm())
        if (bias := slot.bias({"default": 1.0})) is not None:
            want = (want**2 + float((bias - slot.site.bias).detach().double().square().sum())) ** 0.5
        assert row["delta_norm"] == pytest.approx(want, rel=1e-5)


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = fill(lorakit.adapt(tiny.llama(), "lora", r=2, lora_dropout=0.3), 0.3).train()
    lorakit.adapt(model, r=2, name="other", target_modules=["v_proj"])
    lorakit.activate(model, "default", "other", weights=[1.0, 0.5])
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    lorakit.save(model, tmp_path, "default")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and model.training and model.model.layers[0].training
    assert lorakit.active(model) == {"default": 1.0, "other": 0.5} and torch.equal(rng, torch.get_rng_state())


def test_which_adapter_is_saved_must_be_clear(tmp_path):
    model = adapted()
    lorakit.adapt(model, r=2, name="b", target_modules=["0"])
    lorakit.activate(model, "default", "b")
    with pytest.raises(LorakitError, match="which adapter\\? there are default, b"):
        lorakit.save(model, tmp_path)
    with pytest.raises(LorakitError, match="no adapter `c`"):
        lorakit.save(model, tmp_path, "c")
    lorakit.merge(model)
    with pytest.raises(LorakitError, match=r"merged into the base; mend: lorakit\.unmerge"):
        lorakit.save(model, tmp_path, "b")
    assert not any(tmp_path.iterdir())


def test_an_empty_tensor_is_never_written(tmp_path):
    """What a sharded parameter looks like that nobody gathered."""
    model = adapted()
    model[0].lora_A._parameters["default"] = nn.Parameter(torch.empty(0, 6))
    model[0].lora_B._parameters["default"] = nn.Parameter(torch.empty(8, 0))
    with pytest.raises(LorakitError, match=r"the tensor base_model\.model\.0\.lora_A\.weight is empty .* nothing was written"):
        lorakit.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# All or nothing


def outcome(folder):
    """Which of the two adapters a folder holds; it must be one of them, whole, and load."""
    read = Folder(folder)
    assert read.changed is None, f"{read.changed} is not the one of the receipt"
    model = lorakit.load(net(), folder)
    x = torch.ones(1, 6)
    with torch.no_grad():
        y = model(x)
    names = [n for n, v in {"old": OLD, "new": NEW}.items() if torch.equal(y, v()(x))]
    assert len(names) == 1, "neither the old nor the new adapter"
    left = sorted(p.name for p in Path(folder).iterdir())
    return names[0], left


def OLD():
    return adapted(0.3, alpha=3.0)


def NEW():
    return adapted(0.4, "dora", alpha=5.0)


FORK = multiprocessing.get_context("fork")


def child(act):
    """Runs `act` in a forked process and returns the process."""
    p = FORK.Process(target=act)
    p.start()
    return p


STEPS = [(os, "replace"), (os, "fsync"), (Path, "write_text"), (Path, "unlink")]


def counting(at, monkey, act):
    """Calls act(n) before the n-th step of a write that a reader could see, and after it with n + 0.5."""
    count = [0]
    for owner, name in STEPS:
        real = getattr(owner, name)

        def step(*a, real=real, **kw):
            count[0] += 1
            act(count[0])
            out = real(*a, **kw)
            act(count[0] + 0.5)
            return out
        monkey.setattr(owner, name, step)
    return count


def test_a_kill_at_every_step_of_a_write_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    new = NEW()
    with monkeypatch.context() as m:
        count = counting(None, m, lambda n: None)
        lorakit.save(OLD(), tmp_path / "count")
        total = count[0]
    assert total >= 8, "the steps are not being counted"
    seen = []
    for half in range(2, 2 * total + 2):
        folder = lorakit.save(OLD(), tmp_path / f"at{half}")

        def dies(half=half, folder=folder):
            def act(n):
                if 2 * n >= half:
                    os.kill(os.getpid(), signal.SIGKILL)

            counting(None, pytest.MonkeyPatch(), act)
            lorakit.save(new, folder)

        p = child(dies)
        p.join(30)
        assert p.exitcode == -signal.SIGKILL
        seen.append(outcome(folder)[0])
        assert "old" not in seen[seen.index("new"):] if "new" in seen else True, f"step {half / 2}: back to the old one after the new one stood"
        assert lorakit.save(NEW(), folder) and outcome(folder) == ("new", [CONFIG, TENSORS, RECEIPT]), "a later save clears what a kill left"
    assert {"old", "new"} <= set(seen)


def test_kills_at_random_moments_leave_the_old_or_the_new(tmp_path):
    pair, folder, rng = (OLD(), NEW()), tmp_path / "adapter", random.Random(5)
    begun = time.monotonic()
    lorakit.save(pair[0], folder)
    once = time.monotonic() - begun  # on this machine, as busy as it is
    seen = set()

    def forever(first):
        for n in range(10**6):
            lorakit.save(pair[(n + first) % 2], folder)

    for k in range(30):
        p = child(partial(forever, k % 2))
        time.sleep(rng.uniform(0.1, 3) * once)
        os.kill(p.pid, signal.SIGKILL)
        p.join(30)
        seen.add(outcome(folder)[0])
    assert seen == {"old", "new"}, "every kill came before or after all work: the test did not test"


def test_a_first_write_that_is_killed_leaves_no_adapter_or_a_whole_one(tmp_path, monkeypatch):
    new, seen = NEW(), set()
    for half in range(2, 30, 2):
        folder = tmp_path / f"first{half}"

        def dies(half=half, folder=folder):
            counting(None, pytest.MonkeyPatch(), lambda n: os.kill(os.getpid(), signal.SIGKILL) if 2 * n >= half else None)
            lorakit.save(new, folder)

        p = child(dies)
        p.join(30)
        try:
            seen.add(outcome(folder)[0])
        except LorakitError as e:
            assert "there is no" in str(e)
            seen.add("none")
    assert seen == {"none", "new"}


class Crash(BaseException):
    """What is not an Exception: a signal, an interrupt."""


@pytest.mark.parametrize("error", [Crash("pulled the plug"), OSError(errno.EIO, "the disk is gone")])
def test_a_crash_between_journal_and_each_rename_recovers(error, tmp_path, monkeypatch):
    """os.replace is called for the journal, then once for each file."""
    seen = []
    for fail in range(1, 5):
        folder, calls, real = lorakit.save(OLD(), tmp_path / f"{fail}"), [], os.replace

        def replace(a, b, fail=fail, calls=calls, real=real):
            calls.append(b)
            if len(calls) >= fail:
                raise error
            real(a, b)

        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            with pytest.raises((Crash, LorakitError)):
                lorakit.save(NEW(), folder)
        what, left = outcome(folder)
        seen.append(what)
        assert left == [CONFIG, TENSORS, RECEIPT], "temporary files stay behind"
    assert seen == ["old", "new", "new", "new"], "once the journal stands the write has happened; before, nothing has"


def test_two_processes_that_finish_the_same_write_do_not_fail(tmp_path, monkeypatch):
    """A reader recovers a folder while another one does: each file is moved once, and nobody complains."""
    folder, real = lorakit.save(OLD(), tmp_path / "a"), os.replace
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda a, b: real(a, b) if Path(b).name == files.JOURNAL else (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            lorakit.save(NEW(), folder)
    assert (folder / files.JOURNAL).exists()

    def both(a, b):
        monkeypatch.setattr(os, "replace", real)
        files.recover(folder)  # the other process, in between
        real(a, b)

    monkeypatch.setattr(os, "replace", both)
    files.recover(folder)
    assert outcome(folder) == ("new", [CONFIG, TENSORS, RECEIPT])


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_the_old_adapter_and_says_so(there, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    if there:
        lorakit.save(OLD(), folder)

    def full(*a, **kw):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(LorakitError, match=r"could not write .*No space left on device \([\d.]+ MiB free\); nothing that was there before is changed"):
            lorakit.save(NEW(), folder)
    assert outcome(folder) == ("old", [CONFIG, TENSORS, RECEIPT]) if there else not folder.exists()


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs here: {done.stderr.strip()}")
    try:
        lorakit.save(OLD(), disk / "a")
        free = shutil.disk_usage(disk).free
        for leave in (min(100_000, free), 8192, 0):
            ballast = disk / "ballast"
            ballast.write_bytes(b"x" * max(0, shutil.disk_usage(disk).free - leave))
            big = adapted(0.4, width=9000)
            with pytest.raises(LorakitError, match=r"could not write .*nothing that was there before is changed"):
                lorakit.save(big, disk / "a")
            with pytest.raises(LorakitError, match="could not write"):
                lorakit.save(big, disk / "new")
            assert outcome(disk / "a") == ("old", [CONFIG, TENSORS, RECEIPT]) and not (disk / "new").exists()
            ballast.unlink()
        lorakit.save(NEW(), disk / "a")
        assert outcome(disk / "a")[0] == "new"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_one_may_not_write_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LorakitError, match=r"could not write .*file/adapter"):
        lorakit.save(adapted(), tmp_path / "file" / "adapter")


def test_what_is_on_disk_is_read_back_and_compared(tmp_path, monkeypatch):
    """A disk that lies: what was written is not what is read."""
    from lorakit.formats import folder as module

    real = module.save_file

    def lie(tensors, path, **kw):
        real({k: t + 1 for k, t in tensors.items()}, path, **kw)

    monkeypatch.setattr(module, "save_file", lie)
    with pytest.raises(LorakitError, match="read back from disk is not what was written"):
        lorakit.save(adapted(), tmp_path / "a")


def test_save_merged_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model = fill(lorakit.adapt(tiny.llama(), r=2, target_modules=["q_proj"]), 0.3)
    lorakit.save_merged(model, tmp_path / "m")
    before = files.sha256(tmp_path / "m" / "model.safetensors")
    fill(model, 0.5)
    monkeypatch.setattr("lorakit.api.same_function", lambda *a: (_ for _ in ()).throw(LorakitError("not what was merged")))
    with pytest.raises(LorakitError, match="not what was merged"):
        lorakit.save_merged(model, tmp_path / "m")
    assert files.sha256(tmp_path / "m" / "model.safetensors") == before and [p.name for p in tmp_path.iterdir()] == ["m"]


# Folders that are out there


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_golden_folders_of_format_1_give_the_stored_outputs(folder, tmp_path):
    want = load_file(folder.parent / "outputs.safetensors")
    copy = shutil.copytree(folder, tmp_path / "a")
    model = lorakit.load(golden.base(), copy, probe=True)
    torch.testing.assert_close(logits(model), want[folder.name], rtol=0, atol=2e-6)
    with lorakit.disabled(model):
        torch.testing.assert_close(logits(model), want["base"], rtol=0, atol=2e-6)
    assert float((want[folder.name] - want["base"]).abs().max()) > 0.1
    report = lorakit.verify(copy, golden.base())
    assert report.ok, str(report)
    lorakit.save(model, tmp_path / "b", form="native" if folder.name == "native" else "auto")
    now, then = (load_file(d / TENSORS) for d in (tmp_path / "b", folder))
    assert now.keys() == then.keys() and all(torch.equal(now[k], then[k]) for k in then), "what is written today differs from format 1"


def test_there_is_a_golden_folder_of_every_kind():
    assert {p.name for p in GOLDEN} == {"lora", "dora", "native", "peft-0.21.2"}


def test_a_reader_beside_a_writer_sees_the_old_or_the_new(tmp_path):
    pair, folder = (OLD(), NEW()), tmp_path / "adapter"
    lorakit.save(pair[0], folder)

    def forever():
        for n in range(10**6):
            lorakit.save(pair[(n + 1) % 2], folder)

    x, want = torch.ones(1, 6), []
    with torch.no_grad():
        want = [m(x) for m in pair]
        p = child(forever)
        try:
            seen = [lorakit.load(net(), folder)(x) for _ in range(120)]
        finally:
            os.kill(p.pid, signal.SIGKILL)
            p.join(30)
    which = [[torch.equal(y, w) for w in want].index(True) if any(torch.equal(y, w) for w in want) else None for y in seen]
    assert None not in which, "a mixture of two adapters was read"
    assert {0, 1} <= set(which), "the writer did not write meanwhile: the test did not test"


def test_the_fingerprint_follows_an_edit_of_the_base_through_data(tmp_path):
    model = adapted()
    a = json.loads((lorakit.save(model, tmp_path / "a") / RECEIPT).read_text())["base"]["digest"]
    model[0].weight.data.add_(1.0)
    b = json.loads((lorakit.save(model, tmp_path / "b") / RECEIPT).read_text())["base"]["digest"]
    assert a != b


def test_a_trained_start_out_of_the_base_is_saved(tmp_path):
    """What the receipt says of the update is over the untouched base, as a reader will find it."""
    model = lorakit.adapt(tiny.llama(), r=2, target_modules=["q_proj", "down_proj"], init={"name": "nonzero", "storage": "base"})
    fill(model, 0.2)
    y = tiny.logits(model)
    lorakit.save(model, tmp_path)
    again = lorakit.load(tiny.llama(), tmp_path)
    assert float((tiny.logits(again) - y).abs().max()) < 1e-5 and lorakit.verify(tmp_path, tiny.llama()).ok
