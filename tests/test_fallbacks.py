"""Kernels that fail on a user's GPU: the process lives, plain MLX goes on, one warning each.

The failures are of the kinds that MLX has. In a process of its own each, because the worst that can
happen is its end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.attn.backends import KernelBackend
from pagedkv.attn.fused import self_check as kernel_check
from pagedkv.attn.kernels.source import KernelText
from tests import test_fused, test_fused_treated
from tests.emulator import HostLauncher, unavailable
from tests.test_attention import config, queries

ROOT = Path(__file__).parent.parent


def not_computed(like: mx.array) -> mx.array:
    """An array of that kind whose evaluation raises, in the thread that asks for it."""
    leaked: list[mx.array] = []

    def leak(x: mx.array) -> mx.array:
        leaked.append(x)
        return x + 1

    mx.compile(leak)(mx.zeros_like(like))
    return leaked[0]


def lost(like: mx.array) -> mx.array:
    """An array of that kind that another thread of MLX fails to compute: who waits hears of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "array.npy"
        np.save(file, np.zeros(10_000, np.float32))
        array: Any = mx.load(str(file))
        os.truncate(file, 1_000)
        return like + array.sum().astype(like.dtype)


def wrong(like: mx.array) -> mx.array:
    return like ^ 0x11111111 if like.dtype == mx.uint32 else 1.1 * like


FAILURES = {
    "its compilation fails": not_computed,
    "the GPU gives it up": lost,
    "its numbers are wrong": wrong,
}


class Failing(HostLauncher):
    """A GPU's launcher, on which the kernels fail in one of the ways."""

    def __init__(self, failure: str) -> None:
        super().__init__()
        self.trusted = False
        self._failure = failure

    def launch(self, text: KernelText, *rest: Any, **named: Any) -> list[mx.array]:
        if self._failure == "it cannot be launched":
            raise ValueError("[metal_kernel] what a launch says")
        return [FAILURES[self._failure](x) for x in super().launch(text, *rest, **named)]


def live(failure: str) -> None:
    """Fill caches, decode and prefill while all kernels fail, and check what comes out."""
    backend = KernelBackend(Failing(failure))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # those of a second cache are known to fail
            cache = pagedkv.PagedCache.standalone(1, config(kv="K8V4:600,K4V4"))
            cache[0]._backend = backend
            cache[0].append(*test_fused_treated.tokens_of(1400, mx.float16))
            cache[0]._settle()
            treated = test_fused_treated.filled(config(kv="K4V4"), 700, backend=backend)
            for length in (1, 20):
                q = queries(4, length, 64, mx.float16)
                test_fused.check(cache, q)
                test_fused_treated.check(treated, q)
    failed = [name for name, reason in kernel_check.results.items() if reason]
    kinds = {name.split("_")[1] for name in failed}
    assert kinds == {"attend", "expand", "seal", "compensate"}, kernel_check.results
    said = [str(w.message) for w in caught if "is not used on this machine" in str(w.message)]
    assert len(said) == len(failed)
    assert all(any(f"kernel {name} is not used" in text for text in said) for name in failed)


@pytest.mark.parametrize("failure", [*FAILURES, "it cannot be launched"])
def test_a_process_lives_when_kernels_fail(failure: str) -> None:
    if failure in FAILURES and (why := unavailable()):
        pytest.skip(why)
    code = f"from tests.test_fallbacks import live; live({failure!r}); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


@pytest.mark.parametrize("fail", [not_computed, lost])
def test_an_evaluation_that_raises_is_a_failed_check(
    fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "results", {})
    good = mx.ones((2, 3))
    with suppress(RuntimeError):
        mx.eval(fail(good))
        pytest.skip("MLX compiles nothing without a compiler, so nothing fails there")
    difference = kernel_check._difference
    with pytest.warns(UserWarning, match="the GPU kernel broken is not used") as caught:
        answers = [
            kernel_check.works("broken", lambda: difference(fail(good), good), 1) for _ in range(2)
        ]
    assert answers == [False, False]
    assert len(caught) == 1
    assert kernel_check.works("good", lambda: difference(good, good), 1)
