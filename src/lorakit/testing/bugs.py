"""Seeded bugs: each is put into a copy of the package, and the tests that stand guard there must fail.

    python -m lorakit.testing.bugs [name ...]        prints caught or MISSED for each, exits with 1 if one is missed

A suite that cannot fail proves nothing. This needs a source checkout, for the tests beside the package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import LorakitError, near

PACKAGE = Path(__file__).resolve().parents[1]
TESTS = PACKAGE.parents[1] / "tests"


@dataclass(frozen=True)
class Bug:
    """`old`, once in `file` (relative to the package), becomes `new`; one of the tests at `guards` must fail."""

    file: str
    old: str
    new: str
    guards: tuple[str, ...]


def cells(*names: str) -> tuple[str, ...]:
    return tuple(f"test_conformance.py::test_conforms[{n}]" for n in names)


def there_and_back(case: str) -> str:
    return f"test_peft_parity.py::test_there_and_back[{case}]"


LORA, DORA, SQUARE = cells("lora-linear-float32"), cells("magnitude(lora)-linear-float32"), cells("magnitude(lora)-linear-square-float32")
BUGS: dict[str, Bug] = {
    # maths
    "scale lost in the two factors": Bug(
        "methods/lora.py", "    def from_file(self", '    def two(self, p):\n        return p["B"], p["A"]\n\n    def from_file(self', LORA),
    "scale applied twice in the fast path": Bug(
        "methods/lora.py", "    def from_file(self",
        '    def update(self, p, x, f, site, drop):\n        return super().update(p, x, f, site, drop) * self.s\n\n'
        "    def from_file(self", LORA),
    "rank-stabilised scale forgotten": Bug("method.py", "lambda alpha, r: alpha / math.sqrt(r)", "lambda alpha, r: alpha / r",
                                           (there_and_back("llama rslora"),)),
    "factored norm: wrong axis": Bug("kernels/norms.py", "(2 * cross + own).sum(1)", "(2 * cross + own).sum(0)", SQUARE),
    "factored norm: cross term without its 2": Bug("kernels/norms.py", "(2 * cross + own)", "(cross + own)", DORA),
    "row norms of the base over the wrong axis": Bug(
        "sites/layers.py", "now, weight().detach().square().sum(-1))", "now, weight().detach().square().sum(0))",
        SQUARE),
    "row norms of the base kept for ever": Bug(
        "sites/layers.py", "if self._row_sq is None or self._row_sq[0]() is not token or self._row_sq[1] != now:", "if self._row_sq is None:",
        ("test_host.py::test_norms_follow_a_change_of_dtype",)),
    "magnitude: norm over the wrong axis": Bug("methods/magnitude.py", "norm = V.norm(dim=1)", "norm = V.norm(dim=0)", SQUARE),
    "magnitude: norm takes part in the gradient": Bug(
        "methods/magnitude.py", "norm.detach() if self.detach else norm", "norm", cells("dora@default-linear-float32")),
    "bias scaled by the magnitude": Bug("methods/magnitude.py", "    inner: Method\n", "    inner: Method\n    adds = True\n", DORA),
    "gain ignored in update": Bug("maps.py", "return u if self.gain == 1.0 else u * self.gain", "return u", LORA),
    "adapters multiplied by the number of them": Bug(
        "maps.py", "            y = y + m.update(x)\n", "            y = y + m.update(x) * len(self.maps)\n", LORA),
    "a kept output given for another input": Bug("maps.py", "if x is not self.x:", "if self.x is None:", LORA),
    # dropout
    "offset: each side draws its own dropout mask": Bug(
        "methods/offset.py",
        "        x = drop(x)  # one mask for both, or they would not cancel\n"
        "        return self.inner.update(p, x, f, site, same) - self.inner.update(self.begun(p), x, f, site, same)",
        "        return self.inner.update(p, x, f, site, drop) - self.inner.update(self.begun(p), x, f, site, drop)", LORA),
    "dropout active in evaluation": Bug("host/slot.py", "if p and self.module.training and self.site.drops", "if p and self.site.drops", LORA),
    "dropout reaches the base": Bug(
        "method.py", "        return f(x) + self.update(p, x, f, site, drop)\n\n    def update(self, p, x, f, site, drop):\n        dtype",
        "        return f(drop(x)) + self.update(p, x, f, site, drop)\n\n    def update(self, p, x, f, site, drop):\n        dtype", LORA),
    # leaves that are shared or derived, methods that depend on their input
    "a group shares with every other group": Bug(
        "host/slot.py", """return {"model": "", "shape": size,""", """return {"model": "", "shape": "",""",
        ("test_shared.py::test_a_shared_tensor_exists_once_everywhere[lotr]",)),
    "VeRA's key ignored": Bug("host/adapters.py", "number = seed if m.shared_seed is None else m.shared_seed", "number = seed",
                              ("test_shared.py::test_vera_is_its_formula_and_its_key_tells_the_projections",)),
    "a serial adapter in front of the bias": Bug(
        "host/slot.py", "if a not in behind}, self.bias(active))", "if a not in behind}, None)", ("test_shared.py::test_a_bottleneck_is_its_formula[relu]",)),
    "what depends on its input is merged as if it did not": Bug(
        "host/adapters.py", """slot.methods[a].mergeable == "no":""", """slot.methods[a].mergeable == "never":""",
        ("test_shared.py::test_what_depends_on_its_input_is_saved_verified_and_not_merged[hydralora]",)),
    "derived leaves written to files": Bug(
        "formats/folder.py", "if leaf not in method.leaves or method.leaves[leaf].derived or", "if leaf not in method.leaves or",
        ("test_transforms.py::test_svdiff_writes_the_shift_alone",)),
    "the tasks of a batch ignored": Bug(
        "host/slot.py", "out[name] = self.state.given[name]", "pass", ("test_shared.py::test_poly_mixes_skills_for_each_rows_task",)),
    # geometry
    "Conv1D not transposed": Bug("sites/layers.py", "stored (in, out).\"\"\"\n\n    transposed = True", "stored (in, out).\"\"\"\n\n    transposed = False",
                                 cells("lora-hf-conv1d-float32")),
    "grouped convolution: filters not repeated": Bug(
        "sites/layers.py", "A if self.g == 1 else A.repeat(self.g, *[1] * (self.n + 1))", "A", cells("lora-conv2d-groups-float32")),
    "bias of a convolution added along the last axis": Bug(
        "sites/layers.py", "y + b.to(y.dtype).view(-1, *[1] * self.n)", "y + b.to(y.dtype)", cells("magnitude(lora)-conv2d-float32")),
    "padding_mode ignored": Bug("sites/layers.py", 'if m.padding_mode != "zeros":', "if False:", cells("lora-conv1d-circular-float32")),
    "padding row of an embedding trains": Bug("sites/layers.py", "return F.embedding(x, A.mT, self.module.padding_idx)", "return F.embedding(x, A.mT)",
                                              ("test_recipes.py::test_an_embeddings_padding_row_does_not_train",)),
    "factors of a convolution unpacked transposed": Bug(
        "sites/layers.py", "return t.flatten(len(names) - 1) if", "return t.transpose(1, -1).flatten(len(names) - 1) if",
        cells("lora-conv1d-float32")),
    "grouped convolution written as if PEFT could read it": Bug(
        "sites/layers.py", 'return self.g == 1 and m.padding_mode == "zeros" and set(m.dilation) == {1}', "return True",
        ("test_peft_parity.py::test_convolutions_that_peft_gets_wrong[{'groups': 2}]",)),
    "embedding starts as a linear layer does": Bug(
        "method.py", "begin = leaf.lookup[1] if origin.lookup and leaf.lookup else leaf.start", "begin = leaf.start",
        ("test_recipes.py::test_an_embedding_starts_mirrored",)),
    # hosting
    "merge writes in place": Bug(
        "stores/dense.py",
        "self.put(nn.Parameter(W, requires_grad=False) if self.name in self.module._parameters else W)", "was.data.copy_(W)", LORA),
    "merging an offloaded weight is lost": Bug("stores/dense.py", 'if was.device.type == "meta":', "if False:",
                                               ("test_host.py::test_an_offloaded_model_is_adapted_as_one_in_memory[lora]",)),
    "unmerge forgets to put the weight back": Bug("host/adapters.py", "        slot.site.store.put(was.weight)\n", "", LORA),
    "unmerge puts back a copy": Bug("host/adapters.py", "        slot.site.store.put(was.weight)\n", "        slot.site.store.write(was.weight)\n", LORA),
    "merging one tied side is not told to the config": Bug(
        "api.py", "        config.tie_word_embeddings = False\n", "        pass\n",
        ("test_host.py::test_tied_weights_stay_tied_until_one_side_is_merged[embed_tokens]",)),
    "frozen leaf left trainable": Bug("host/adapters.py", "trains = method.leaves[k].trains and k not in freeze", "trains = k not in freeze",
                                      cells("offset(lora)-linear-float32")),
    "freeze ignored": Bug("host/adapters.py", "trains = method.leaves[k].trains and k not in freeze", "trains = method.leaves[k].trains", LORA),
    "leaf kept in bfloat16": Bug("host/adapters.py", "keep = torch.promote_types(site.dtype, torch.float32)  # adapters", "keep = site.dtype  # adapters",
                                 cells("lora-linear-bfloat16")),
    "shared leaf copied for each layer": Bug(
        "host/slot.py", "out[leaf] = t if own is None else t.to(own.device)", "out[leaf] = t.clone().detach()",
        cells("probe-shared-trained-linear-float32")),
    "a changed base not made good while its adapter is off": Bug(
        "host/slot.py", "if self.absorbed and self.absorbed.adapter not in here:", "if False:", LORA),
    "deepcopy shares the leaves": Bug(
        "host/slot.py", "    def extra_repr(self) -> str:", "    def __deepcopy__(self, memo):\n        return self\n\n    def extra_repr(self) -> str:", LORA),
    "a failed attach leaves half of it": Bug("host/adapters.py", "        _strip(modules, name, done)\n        raise", "        raise",
                                             ("test_host.py::test_nothing_stays_behind_when_an_attach_fails[plain]",)),
    "accelerate's hook calls the old forward": Bug("host/hooked.py", "        setattr(module, k, MethodType(cls.forward, module))\n", "        pass\n",
                                                   ("test_host.py::test_a_hook_that_was_there_first_calls_the_adapter",)),
    "a process saves its part of a sharded adapter": Bug("stores/shards.py", "t.to(t.device_mesh.device_type).full_tensor() if scattered(t)",
                                                         "t.to_local() if scattered(t)",
                                                         ("test_distributed.py::test_a_sharded_adapter_is_saved_as_a_whole_one",)),
    "leaves offloaded after adapting do not train": Bug("host/slot.py", 'elif name == "_hf_hook":', 'elif name == "_no_hook":',
                                                        ("test_offload.py::test_an_optimizer_made_before_the_offload_still_trains",)),
    "weights loaded for one call stay": Bug("sites/layers.py", "(weakref.ref(token), now,", "((lambda: token), now,",
                                            ("test_offload.py::test_no_weight_that_was_offloaded_is_kept",)),
    "the change of a start taken out of the base is told wrong": Bug(
        "formats/receipt.py", "None if begun or not matrix or method.two", "None if not matrix or method.two",
        ("test_files.py::test_a_trained_start_out_of_the_base_is_saved",)),
    "every layer starts alike": Bug("host/adapters.py", 'f"{seed}:{path}"', 'f"{seed}"', ("test_host.py::test_starts_depend_on_seed_and_path_alone",)),
    "a fused encoder layer skips its adapter": Bug("sites/__init__.py", "and torch.backends.mha.get_fastpath_enabled():", "and False:",
                                                   ("test_host.py::test_a_fused_encoder_layer_never_skips_its_adapter_silently",)),
    "mixed batch: base rows go through the first adapter": Bug("maps.py", "(self.base if i < 0 else self.calls[i])", "self.calls[max(i, 0)]", LORA),
    "mixed batch: rows shifted by one": Bug("maps.py", "(index == i).nonzero()", "(index.roll(1) == i).nonzero()", LORA),
    "mixed batch: folded tokens in another order": Bug("maps.py", "index.repeat_interleave(n // len(index))", "index.repeat(n // len(index))",
                                                       ("test_host.py::test_rows_follow_where_a_model_folds_batch_and_tokens",)),
    "mixed batch: a batch of another size passes": Bug("api.py", "and x.dim() and len(x) != len(names)", "and False",
                                                       ("test_parameters.py::test_a_batch_of_another_size_is_refused_also_when_it_is_a_multiple",)),
    "mixed batch: a choice of tokens is taken for rows": Bug("host/slot.py", "if NO_ROWS.search(self.path):", "if False:",
                                                             ("test_parameters.py::test_rows_are_refused_where_a_layer_gets_a_choice_of_tokens",)),
    # parameters that are read
    "a module reads the base's values": Bug("host/module.py", "        where.update(mine)\n", "        pass\n", cells("lora-experts-float32")),
    "rows of an attention joined as they came": Bug("sites/rows.py", "order = torch.cat(rows).argsort()", "order = torch.cat(rows)",
                                                    ("test_parameters.py::test_rows_of_an_attention_bring_their_masks[True]",)),
    "rows of an attention with others' masks": Bug("sites/rows.py", "(0, module.num_heads)}", "(0, 1)}",
                                                   ("test_parameters.py::test_rows_of_an_attention_bring_their_masks[True]",)),
    "all experts start alike": Bug("host/adapters.py", "torch.stack([q[k] for q in p])", "torch.stack([p[0][k] for q in p])",
                                   ("test_parameters.py::test_every_expert_has_its_own_matrices",)),
    "experts' factors in another order than PEFT's": Bug("sites/parameters.py", "t.permute(1, 2, 0).flatten(1)", "t.permute(1, 0, 2).flatten(1)",
                                                         (there_and_back("experts"),)),
    "PEFT's doubled out-projection taken once": Bug("sites/parameters.py", 'return t * 2 if axes == "o r"', 'return t if axes == "o r"',
                                                    (there_and_back("attention"),)),
    "PEFT's nested parameters in another order": Bug("formats/peft.py", "NEST * (len(order) - 1 - n)", "NEST * n",
                                                     (there_and_back("experts"),)),
    "scaled embedding: the update is not scaled": Bug("sites/layers.py", "return h * torch.as_tensor(self.module.embed_scale).to(h)", "return h",
                                                      (there_and_back("bart scaled embedding"),)),
    # beside the targets
    "lora_bias not scaled": Bug("methods/lora.py", 'd = p["d"] * self.s', 'd = p["d"]', (there_and_back("lora_bias"),)),
    "bias=all forgets the norms": Bug("spec.py", 'if t is not None and "bias" in k', 'if t is not None and adaptable(m) and "bias" in k',
                                      ("test_parameters.py::test_biases_belong_to_their_adapter",)),
    "trained tokens one row off": Bug("methods/tokens.py", "hit = x[..., None] == self.at(x.device)", "hit = x[..., None] + 1 == self.at(x.device)",
                                      (there_and_back("tokens"),)),
    "a tied head does not follow": Bug("spec.py", "if source in ties or not (self.tie or plan[source].follows):", "if True:",
                                       (there_and_back("tokens, tied"), there_and_back("ensure_weight_tying"))),
    "merging parts what is tied": Bug("host/adapters.py", "            _keep_tied(slot, done)\n", "            pass\n",
                                      ("test_parameters.py::test_a_tied_head_follows_the_embedding_through_everything",)),
    "a buffer's copy trains": Bug("methods/full.py", "trains=self.trains)}", "trains=True)}",
                                  ("test_parameters.py::test_norms_are_trained_whole_with_their_running_statistics",)),
    # files
    "field lost in the config": Bug("method.py",
                                    "for f in dataclasses.fields(self):\n            v =", "for f in dataclasses.fields(self)[:1]:\n            v =",
                                    LORA),
    "tensors rounded on loading": Bug("formats/folder.py", "here.copy_(cut(value, here))", "here.copy_(cut(value.bfloat16(), here))", LORA),
    "PEFT's alpha_pattern ignored": Bug(
        "formats/peft.py", "for what, (_, field) in method.core.varies.items():", "for what, (_, field) in list(method.core.varies.items())[:1]:",
        (there_and_back("rank_pattern and alpha_pattern"),)),
    "patterns match whole paths only": Bug("spec.py", "for end in suffixes(name)", "for end in [name]",
                                           (there_and_back("rank_pattern and alpha_pattern"),)),
    "patterns match the beginning of a name": Bug("spec.py", "(?:.*\\\\.)?(?:{k})$)\"", "(?:.*\\\\.)?(?:{k}))\"",
                                                  ("test_targets.py::test_every_error_names_what_is_near",)),
    "receipt: digests not compared": Bug(
        "formats/folder.py", "if sha256(self.path / f) != was), None)", "if False), None)",
        ("test_proof.py::test_one_changed_byte_is_found[-1]",)),
    "fingerprint compares only shapes": Bug(
        "formats/receipt.py", 'and was[n][which] != now[n][which]:', "and False:",
        ("test_files.py::test_another_base_is_refused_and_the_tensors_that_differ_are_named",)),
    "journal not replayed": Bug("formats/files.py", "    while True:\n        if (folder", "    while True:\n        yield\n        return\n        if (folder",
                                ("test_files.py::test_a_crash_between_journal_and_each_rename_recovers",)),
    "files renamed without a journal": Bug(
        "formats/files.py", "            os.replace(ready, folder / JOURNAL)\n            recover(folder)\n",
        "            for name in out.names:\n                os.replace(folder / f\"{PREFIX}{name}\", folder / name)\n            ready.unlink()\n",
        ("test_files.py::test_a_kill_at_every_step_of_a_write_leaves_the_old_or_the_new",)),
    "NaN let in": Bug("formats/folder.py", "if not torch.isfinite(value).all():", "if False:",
                      ("test_files.py::test_what_is_wrong_is_named_and_the_model_stays_as_it_was[nan]",)),
    "a failed load switches the active adapter off": Bug(
        "host/adapters.py", "        if state:\n            state.active = active\n        raise", "        raise",
        ("test_files.py::test_what_is_wrong_is_named_and_the_model_stays_as_it_was[nan]",)),
    # proof
    "verify does not run the probe": Bug(
        "proof.py", "    same, gap = _same_logits(was, now, folder, model)\n", "    same, gap = True, 0.0\n",
        ("test_proof.py::test_what_keeps_every_norm_is_found_by_the_probe",)),
    "verify takes the base for merged": Bug(
        "proof.py", "if moved > 2 * step and float((have - W).norm()) < 0.05 * moved:", "if False:",
        ("test_proof.py::test_a_merge_that_forgot_some_modules_is_found",)),
}


def _package(folder: Path, bug: Bug | None) -> None:
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    if bug:
        path = folder / PACKAGE.name / bug.file
        text = path.read_text(encoding="utf-8")
        if text.count(bug.old) != 1:
            raise LorakitError(f"{bug.file}: the text of a seeded bug occurs {text.count(bug.old)} times, not once: {bug.old!r}")
        text = text.replace(bug.old, bug.new)
        compile(text, bug.file, "exec")  # a bug that does not even import would be caught by anything
        path.write_text(text, encoding="utf-8")


def _pytest(bug: Bug | None, guards: Iterable[str]) -> tuple[int, str]:
    """pytest's exit code on a copy of the package, and the first failure (or the end of what it said)."""
    with tempfile.TemporaryDirectory() as tmp:
        _package(Path(tmp), bug)
        paths = os.pathsep.join(p for p in (tmp, os.environ.get("PYTHONPATH")) if p)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", *guards], cwd=TESTS, text=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, timeout=600, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, next((line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED")), "\n".join([*lines[-5:], done.stderr[-500:]]))


def run(names: Iterable[str] | None = None) -> dict[str, str]:
    """Bug -> the test that caught it, "" where none did. LorakitError if the guards fail without any bug, or do not run."""
    names = list(BUGS if names is None else names)
    for n in names:
        if n not in BUGS:
            raise LorakitError(f"there is no seeded bug `{n}`{near(n, BUGS)}")
    if not TESTS.is_dir():
        raise LorakitError(f"seeded bugs need the tests of a source checkout; there is no {TESTS}")
    code, said = _pytest(None, dict.fromkeys(g for n in names for g in BUGS[n].guards))
    if code:
        raise LorakitError(f"the guards fail on the package as it is, so they can prove nothing: {said}")
    out = {}
    for n in names:
        code, said = _pytest(BUGS[n], BUGS[n].guards)
        if code not in (0, 1):
            raise LorakitError(f"{n}: the tests did not run: {said}")
        out[n] = said if code else ""
        print(f"{'caught' if code else 'MISSED':7s} {n:60s} {out[n][:110]}", flush=True)
    return out


def main() -> None:
    found = run(sys.argv[1:] or None)
    print(f"{sum(map(bool, found.values()))} of {len(found)} caught")
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    main()
