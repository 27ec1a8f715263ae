"""ComPEFT: an adapter of three values, in few bits, and back."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_mix import deltas, saved

import lorakit
from lorakit.errors import LorakitError
from lorakit.formats.base import tensors_of
from lorakit.formats.compeft import STREAMS, decode, encode, width
from lorakit.formats.folder import Folder


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_what_is_decoded_is_what_was_encoded_at_the_size_of_the_formula(density):
    g, d = torch.Generator().manual_seed(1), 40_000
    t = (torch.rand(d, generator=g) < density) * torch.randint(0, 2, (d,), generator=g).mul(2).sub(1) * 0.37
    streams, kept = encode(t), int((t != 0).sum())
    assert torch.equal(decode(streams, d, kept, 0.37), t.float())
    bits, b = 8 * sum(s.numel() for s in streams.values()) / kept, width(kept / d)
    want = b + (1 / (1 - (1 - density) ** (2**b)) if density < 1 else 1) + 1
    assert bits == pytest.approx(want, rel=0.03)


def test_the_widths_that_the_formula_gives():
    phi = (1 + math.sqrt(5)) / 2
    for density, b in ((0.05, 4), (0.1, 3), (0.2, 2), (0.3, 1), (0.5, 0)):
        assert width(density) == b == max(0, 1 + math.floor(math.log2(math.log(phi - 1) / math.log(1 - density))))


def factors(path):
    return {k: t for k, t in load_file(path / "adapter_model.safetensors").items() if "lora_A" in k or "lora_B" in k or "embedding" in k}


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("recipe, kw", [("lora", {}), ("rslora", {"rank_pattern": {"q_proj": 2}}), ("lora", {"target_modules": ["embed_tokens", "up_proj"]})])
def test_an_adapter_comes_back_as_signs_of_its_largest_numbers(tmp_path, recipe, kw, with_base):
    a, base = saved(tmp_path / "a", recipe, r=4, **kw), tiny.llama() if with_base else None
    done = lorakit.convert(a, tmp_path / "a.compeft", "compeft", base, density=0.3, scale=2.0)
    back = lorakit.convert(tmp_path / "a.compeft", tmp_path / "b", "peft", base)
    parts = Folder(a).parts()  # in the order of the file
    was = torch.cat([part.leaves[k].reshape(-1) for part in parts.values() for k in "AB"])
    top = was.abs().argsort(descending=True)[: int(0.3 * len(was))]
    want = torch.zeros_like(was)
    want[top] = was[top].sign() * 2 * was.std()
    now = Folder(tmp_path / "b").parts()
    assert torch.allclose(torch.cat([now[p].leaves[k].reshape(-1) for p in parts for k in "AB"]), want)
    assert all(now[p].method.s == pytest.approx(part.method.s) for p, part in parts.items())
    new, old = deltas(tmp_path / "b"), deltas(a)
    gap = sum(float((new[p] - old[p]).square().sum()) for p in old)
    assert done.rounded["overall"] == pytest.approx((gap / sum(float(t.square().sum()) for t in old.values())) ** 0.5, rel=1e-3)
    assert set(done.rounded["modules"]) == set(parts) and done.error == back.error == 0 and back.rounded is None
    logits = [tiny.logits(lorakit.load(tiny.llama(), p)) for p in (tmp_path / "a.compeft", tmp_path / "b", a)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=1e-2)
    assert (done.rounded_logits is not None) == with_base and (not with_base or (done.logits == 0 < done.rounded_logits))
    assert done.bytes == (tmp_path / "a.compeft").stat().st_size and f"{len(top):,} of {len(was):,} numbers stay" in str(done)
    assert not with_base or any("numbers stay" in n for n in json.loads((tmp_path / "b" / "receipt.json").read_text())["converted"]["notes"])


def test_a_doras_magnitudes_are_kept_as_they_are(tmp_path):
    a = saved(tmp_path / "a", "dora", r=4)
    lorakit.convert(a, tmp_path / "a.compeft", "compeft", density=0.5)
    one, other = Folder(a).parts(), Folder(lorakit.convert(tmp_path / "a.compeft", tmp_path / "b", "peft").output).parts()
    assert all(torch.equal(part.leaves["m"], other[p].leaves["m"]) and not torch.equal(part.leaves["A"], other[p].leaves["A"]) for p, part in one.items())


def test_a_file_is_a_tenth_at_a_fifth_of_the_numbers(tmp_path):
    a = saved(tmp_path / "a", r=8, base=lambda: tiny.llama(layers=8), target_modules="all-linear")
    done = lorakit.convert(a, tmp_path / "a.compeft", "compeft")
    bits = 8 * sum(tensors_of(tmp_path / "a.compeft")[k].numel() for k in STREAMS) / sum(t.numel() for t in factors(a).values())
    assert bits == pytest.approx(0.939, rel=0.1) and f"{bits:.2f} bits a number" in str(done)  # Gaussian gaps are the formula's: 3.69 + 1 bits for one in five


def test_another_method_is_turned_where_that_is_exact_and_refused_otherwise(tmp_path):
    vera, loha = saved(tmp_path / "vera", "vera", r=2), saved(tmp_path / "loha", "loha", r=6)
    done = lorakit.convert(vera, tmp_path / "v.compeft", "compeft", tiny.llama())
    assert "4 of 4 targets turned into plain LoRA" in str(done) and done.rounded["overall"] > 0
    with pytest.raises(LorakitError, match="compeft cannot hold .* LoHa is more than a plain LoRA or DoRA"):
        lorakit.convert(loha, tmp_path / "l.compeft", "compeft", tiny.llama())
    assert lorakit.convert(loha, tmp_path / "l.compeft", "compeft", tiny.llama(), rank=4).left_out["overall"] > 0


def test_the_verb(tmp_path, call):
    a = saved(tmp_path / "a", r=4)
    code, out, err = call("convert", a, "-o", tmp_path / "a.compeft", "--to", "compeft", "--density", 0.5, "--scale", 0.8)
    assert code == 0 and "bits a number" in out and "of the update's norm away from the adapter" in out, err
    code, out, err = call("convert", tmp_path / "a.compeft", "-o", tmp_path / "b", "--to", "peft", "--json")
    assert code == 0 and json.loads(out)["read_as"] == "compeft" and (tmp_path / "b" / "adapter_config.json").is_file(), err
    code, out, err = call("convert", a, "-o", tmp_path / "c", "--to", "peft", "--density", 0.5)
    assert code == 1 and "peft has no option `density`" in err


def test_what_is_refused(tmp_path):
    a = saved(tmp_path / "a")
    for kw, why in (({"density": 0}, "density must be above 0"), ({"scale": -1.0}, "scale above 0"), ({"density": 1e-9}, "nothing of .* numbers stays")):
        with pytest.raises(LorakitError, match=why):
            lorakit.convert(a, tmp_path / "x.compeft", "compeft", **kw)
    head = saved(tmp_path / "head", base=tiny.bert, target_modules=["query"])
    with pytest.raises(LorakitError, match=r"classifier \(Full copy\) cannot be turned into a plain LoRA, as compeft needs it"):
        lorakit.convert(head, tmp_path / "x.compeft", "compeft", tiny.bert())
    with pytest.raises(LorakitError, match="is written as a .compeft file"):
        lorakit.convert(a, tmp_path / "x", "compeft")
    lorakit.convert(a, tmp_path / "x.compeft", "compeft")
    with pytest.raises(LorakitError, match="x.compeft is there already"):
        lorakit.convert(a, tmp_path / "x.compeft", "compeft")
    (tmp_path / "y.compeft").write_bytes((tmp_path / "x.compeft").read_bytes()[:-20])
    with pytest.raises(LorakitError, match="truncated or not a safetensors file"):
        lorakit.convert(tmp_path / "y.compeft", tmp_path / "b", "peft")
    save_file(tensors_of(tmp_path / "x.compeft") | {"quotients": torch.full((2,), 255, dtype=torch.uint8)}, tmp_path / "z.compeft")
    with pytest.raises(LorakitError, match="z.compeft is damaged: the streams hold 0 positions"):
        lorakit.convert(tmp_path / "z.compeft", tmp_path / "b", "peft")
    save_file(tensors_of(tmp_path / "x.compeft") | {"compeft": torch.full((2,), 123, dtype=torch.uint8)}, tmp_path / "z.compeft")
    with pytest.raises(LorakitError, match="z.compeft is damaged: Expecting property name"):
        lorakit.convert(tmp_path / "z.compeft", tmp_path / "b", "peft")
    with pytest.raises(LorakitError, match="hold 0 positions, not 9"):
        decode({k: torch.zeros(0, dtype=torch.uint8) for k in STREAMS}, 20, 9, 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "head", "x.compeft", "y.compeft", "z.compeft"]
