"""Launching a kernel text on the GPU that MLX drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ConfigError
from pagedkv.attn.kernels.source import KernelText


class Launcher(Protocol):
    """Runs kernel texts.

    Attributes:
        fetch_ahead: whether tiles go to threadgroup memory while others are worked on.
        together: whether a threadgroup can tell that it is the last one, and see what others have
            stored. Metal has no such fence before version 3.2.
        traceable: whether `mx.compile` can trace a launch.
        trusted: whether kernels are used without a self-check.
    """

    fetch_ahead: bool
    together: bool
    traceable: bool
    trusted: bool

    def launch(
        self,
        text: KernelText,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Run one kernel, lazily.

        Args:
            text: the kernel.
            inputs: row-contiguous arrays (others are copied), one per name in the text.
            groups: threadgroups along x, y and z.
            threads: threads of a threadgroup, a multiple of 32.
            shapes: of the outputs.
            dtypes: of the outputs.

        Returns:
            The outputs.
        """
        ...


def device_words(words: npt.ArrayLike) -> mx.array:
    """A kernel's parameters or table, uint32 words in one dimension.

    The layers of a model ask for the same ones in turn: they get the same array, which only the
    first of them brings to the device.
    """
    return _device_words(np.asarray(words, np.uint32).tobytes())


@lru_cache(maxsize=64)
def _device_words(words: bytes) -> mx.array:
    return mx.array(np.frombuffer(words, np.uint32))


class DeviceLauncher:
    """Runs kernel texts on the GPU, through `mx.fast.metal_kernel` or `mx.fast.cuda_kernel`."""

    def __init__(self) -> None:
        self.target = "metal" if mx.metal.is_available() else "cuda"
        self.fetch_ahead = self.together = self.target == "cuda"
        self.traceable = True
        self.trusted = False
        self._kernels: dict[str, Callable[..., list[mx.array]]] = {}

    def launch(
        self,
        text: KernelText,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """See `Launcher.launch`."""
        kernel = self._kernels.get(text.name)
        if kernel is None:
            kernel = self._kernels[text.name] = self._make(text)
        # The grid counts threads, on both.
        return kernel(
            inputs=inputs,
            output_shapes=shapes,
            output_dtypes=dtypes,
            grid=(groups[0] * threads, groups[1], groups[2]),
            threadgroup=(threads, 1, 1),
        )

    def _make(self, text: KernelText) -> Callable[..., list[mx.array]]:
        make: Any = mx.fast.metal_kernel if self.target == "metal" else mx.fast.cuda_kernel
        options = {"shared_memory": 4 * text.shared_words} if self.target == "cuda" else {}
        kernel: Callable[..., list[mx.array]] = make(
            name=text.name,
            input_names=list(text.inputs),
            output_names=list(text.outputs),
            source=text.body(self.target),
            header=text.header(self.target),
            **options,
        )
        return kernel


@cache
def device_launcher() -> DeviceLauncher:
    """The GPU's launcher, with its compiled kernels; one for the process.

    Raises:
        ConfigError: if MLX drives no GPU here.
    """
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        raise ConfigError(
            "backend 'kernel' needs a GPU that MLX drives, and there is none here: "
            "take backend='auto'"
        )
    return DeviceLauncher()
