"""`lorakit.diff` and `lorakit diff`: what differs between two saved adapters, from their factors."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from test_mix import deltas, saved
from test_mix_rules import Shapes

import lorakit
from lorakit.errors import LorakitError


def test_figures_are_those_of_the_merged_weights(tmp_path):
    a = saved(tmp_path / "a", r=2, lora_alpha=3)
    b = saved(tmp_path / "b", seed=2, r=5, target_modules=["q_proj", "gate_proj"], base=lambda: tiny.llama())
    with Shapes() as shapes:
        found = lorakit.diff(a, b)
    assert not [s for s in shapes.seen if s in ((16, 16), (24, 16), (16, 24))]
    A, B = deltas(a), deltas(b)
    assert found.only_a == [p for p in A if p.endswith("down_proj")] and found.only_b == [p for p in B if p.endswith("gate_proj")]
    assert set(found.modules) == {p for p in A if p.endswith("q_proj")} and not found.same and not found.bases
    for p, row in found.modules.items():
        x, y = A[p].double(), B[p].double()
        assert row["ranks"] == [2, 5]
        assert row["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-4)
        assert row["norm_ratio"] == pytest.approx(float(y.norm() / x.norm()), rel=1e-4)
        assert row["difference"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)
    assert found.config["r"] == (2, 5) and "peft_type" not in found.config
    x, y = (torch.cat([D[p].double().reshape(-1) for p in found.modules]) for D in (A, B))
    assert found.overall["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-4)


def test_a_copy_is_the_same_and_another_base_is_told(tmp_path):
    a = saved(tmp_path / "a")
    shutil.copytree(a, tmp_path / "copy")
    found = lorakit.diff(a, tmp_path / "copy")
    assert found.same and found.overall["cosine"] == 1 and found.overall["difference"] == 0 and "the same update" in str(found)
    other = saved(tmp_path / "other", base=lambda: tiny.llama(seed=4))
    found = lorakit.diff(a, other)
    assert not found.same and "values differ" in found.bases[0]


def test_other_methods_and_the_verb(tmp_path, call):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", "dora", seed=2)
    with pytest.raises(LorakitError, match="the base is needed to mix or compare it"):
        lorakit.diff(a, b)
    row = next(iter(lorakit.diff(a, b, tiny.llama()).modules.items()))
    x, y = deltas(a)[row[0]], deltas(b)[row[0]]
    assert row[1]["norm_ratio"] == pytest.approx(float(y.norm() / x.norm()), rel=1e-3) and row[1]["ranks"] == [3, None]
    tiny.llama().save_pretrained(tmp_path / "base")
    code, out, err = call("diff", a, b, "--base", tmp_path / "base", "--json")
    assert code == 0 and json.loads(out)["config"]["use_dora"] == [False, True], err
    code, out, _ = call("diff", a, a)
    assert code == 0 and "the same update on every target" in out
    code, _, err = call("diff", a, tmp_path / "bb")
    assert code == 1 and "did you mean `b`" in err
    model = tiny.gpt2()
    lorakit.save(lorakit.adapt(model, "lora", r=2, target_modules=["c_attn"]), tmp_path / "gpt2")
    code, out, _ = call("diff", a, tmp_path / "gpt2")
    assert code == 0 and "other base" in out
