"""Start anywhere without touching the base: what the inner method starts with is subtracted.

    W' = W - delta(p0) + delta(p)          p0: frozen copies of the inner leaves as they started

So any non-zero start (both factors non-zero: arXiv 2505.23194) leaves W' = W at step 0, and the base stays as it is
on disk. Around a product B A it is exactly a plain LoRA of twice the rank: [B, -B0] [A; A0].
"""

from __future__ import annotations

import dataclasses

import torch

from lorakit.errors import LorakitError
from lorakit.maps import same
from lorakit.method import Additive, Method, Wrapper, method, zeros


@method("offset", title="Offset start", paper="2505.23194", formula="W - delta(p0) + delta(p)", laws=("identity",))
class Offset(Wrapper, Additive):
    plain_in_files = True

    inner: Method

    def __post_init__(self):
        inner = self.inner
        apart = inner.mergeable == "no" or inner.reads_base or inner.asks or not inner.adds
        if apart or any(k.endswith("0") or leaf.shared for k, leaf in inner.leaves.items()):
            raise LorakitError(f"a start that is subtracted means nothing for {inner.name}: it does not simply add to W, shares leaves, or is offset")

    @property
    def leaves(self):
        copies = {f"{k}0": dataclasses.replace(v, start=zeros, trains=False, key=f"{self.inner.name}_{k}0", lookup=None)
                  for k, v in self.inner.leaves.items()}
        return self.inner.leaves | copies

    def key(self, leaf, lookup=False):
        return self.inner.key(leaf, lookup) if leaf in self.inner.leaves else self.leaves[leaf].key

    def settle(self, p, W):
        self.inner.settle(p, W)
        for k, begun in self.begun(p).items():
            begun.copy_(p[k])

    def begun(self, p):  # p0 under the inner method's own names
        return {k: p[f"{k}0"] for k in self.inner.leaves if k in p}

    def delta(self, p, W):
        return self.inner.delta(p, W) - self.inner.delta(self.begun(p), W)

    def update(self, p, x, f, site, drop):
        x = drop(x)  # one mask for both, or they would not cancel
        return self.inner.update(p, x, f, site, same) - self.inner.update(self.begun(p), x, f, site, same)

    def two(self, p):
        now, begun = self.inner.two(p), self.inner.two(self.begun(p))
        return now and begun and (torch.cat([now[0], -begun[0]], 1), torch.cat([now[1], begun[1]], 0))
