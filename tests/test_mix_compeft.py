"""ComPEFT: an adapter of three values, in few bits, and back."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_mix import saved

import lorakit
from lorakit.errors import LorakitError
from lorakit.merges.compeft import STREAMS, compress, decode, encode, expand, width


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_what_is_decoded_is_what_was_encoded_at_the_size_of_the_formula(density):
    g, d = torch.Generator().manual_seed(1), 40_000
    t = (torch.rand(d, generator=g) < density) * torch.randint(0, 2, (d,), generator=g).mul(2).sub(1) * 0.37
    streams, kept = encode(t, density), int((t != 0).sum())
    assert torch.equal(decode(streams, d, kept, density, 0.37), t.float())
    bits, b = 8 * sum(s.numel() for s in streams.values()) / kept, width(density)
    want = b + (1 / (1 - (1 - density) ** (2**b)) if density < 1 else 1) + 1
    assert bits == pytest.approx(want, rel=0.03)


def test_the_widths_that_the_formula_gives():
    phi = (1 + math.sqrt(5)) / 2
    for density, b in ((0.05, 4), (0.1, 3), (0.2, 2), (0.3, 1), (0.5, 0)):
        assert width(density) == b == max(0, 1 + math.floor(math.log2(math.log(phi - 1) / math.log(1 - density))))


def test_an_adapter_comes_back_as_signs_of_its_largest_numbers(tmp_path):
    a = saved(tmp_path / "a", r=4)
    done = compress(a, tmp_path / "a.compeft", density=0.3, scale=2.0)
    expand(tmp_path / "a.compeft", tmp_path / "b")
    was, now = (load_file(p / "adapter_model.safetensors") for p in (a, tmp_path / "b"))
    assert was.keys() == now.keys()
    flat, small = (torch.cat([t[k].reshape(-1) for k in was]) for t in (was, now))
    top = flat.abs().argsort(descending=True)[: int(0.3 * len(flat))]
    want = torch.zeros_like(flat)
    want[top] = flat[top].sign() * 2 * flat.std()
    assert torch.allclose(small, want) and done.kept == len(top) and done.bits < 1.5
    assert done.error == pytest.approx(float((want - flat).norm() / flat.norm()), abs=1e-5)
    assert not torch.allclose(tiny.logits(lorakit.load(tiny.llama(), tmp_path / "b")), tiny.logits(tiny.llama()), atol=1e-3)


def test_what_is_refused(tmp_path):
    a = saved(tmp_path / "a")
    with pytest.raises(LorakitError, match="density must be above 0"):
        compress(a, tmp_path / "x", density=0)
    compress(a, tmp_path / "x")
    with pytest.raises(LorakitError, match="x is there already"):
        compress(a, tmp_path / "x")
    (tmp_path / "y").write_bytes((tmp_path / "x").read_bytes()[:-20])
    with pytest.raises(LorakitError, match="truncated or not a safetensors file"):
        expand(tmp_path / "y", tmp_path / "b")
    with pytest.raises(LorakitError, match="is no compressed adapter"):
        expand(a / "adapter_model.safetensors", tmp_path / "b")
    with pytest.raises(LorakitError, match="hold 0 positions, not 9"):
        decode({k: torch.zeros(0, dtype=torch.uint8) for k in STREAMS}, 20, 9, 0.2, 1.0)
    assert not (tmp_path / "b").exists()
