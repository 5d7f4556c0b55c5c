"""Where the time of a step goes: vision, decoder, communication, optimizer.

    vision         tower and adapter, forward and backward, of the first pipeline stage
    communication  pipeline transfers, and the reduction of gradients that is left after the last backward pass. Waiting
                   for other stages and ranks is a part of it. Transfers that overlap with computation (virtual pipeline
                   stages) are not
    optimizer      gradient norm, clipping, update, and the gathering of weights that does not overlap
    decoder        everything else of the forward and backward passes: embedding, decoder, loss, the exchanges of
                   tensor, context and expert parallelism, recomputation

A CPU reads the clock. A GPU records events, whose times are read after the next step, when they have certainly passed:
nothing waits for the device. So on a GPU `read` returns the seconds of the step before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FORWARD_BACKWARD = "forward_backward"
PARTS = ("vision", "decoder", "communication", "optimizer")


class StepTimers:
    """Collects the seconds of one rank.

    It is also what megatron-core takes as `config.timers`: its pipeline transfers count as communication.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.accelerator.is_available()
        self._begun: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        self._passed: list[tuple[str, Any, Any]] = []  # on a GPU, of the step before

    def begin(self, part: str) -> None:
        """Begin to count for a part."""
        self._begun[part] = self._now()

    def end(self, part: str) -> None:
        """Stop to count for a part."""
        self._spans.append((part, self._begun.pop(part), self._now()))

    @contextmanager
    def count(self, part: str) -> Iterator[None]:
        """Count the body for a part."""
        self.begin(part)
        yield
        self.end(part)

    def read(self) -> dict[str, float]:
        """End a step, and return seconds by part: of this step on a CPU, of the step before on a GPU, if any."""
        spans, self._spans, self._begun = self._spans, [], {}
        if self._on_gpu:
            spans, self._passed = self._passed, spans
        if not spans:
            return {}
        seconds = dict.fromkeys((*PARTS, FORWARD_BACKWARD), 0.0)
        for part, begin, end in spans:
            seconds[part] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        seconds["decoder"] = seconds.pop(FORWARD_BACKWARD) - seconds["vision"] - seconds["communication"]
        return seconds

    def forget(self) -> None:
        """Forget what was counted since the last `read`: it belongs to no step of training."""
        self._spans, self._begun = [], {}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch_vision(self, tower: nn.Module, adapter: nn.Module) -> None:
        """Count the passes through tower and adapter.

        The backward pass of a micro-batch computes their gradients last: they take the time from the gradient of the
        adapter's output to the end of the pass.
        """
        tower.register_forward_pre_hook(lambda *_: self.begin("vision"))
        adapter.register_forward_hook(lambda *arguments: self._after_forward(arguments[-1]))

    def _after_forward(self, embeddings: Tensor) -> None:
        self.end("vision")
        if embeddings.requires_grad:
            embeddings.register_hook(self._before_backward)

    def _before_backward(self, _: Tensor) -> None:
        self.begin("vision")
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self.end("vision"))

    def __call__(self, name: str, log_level: int = 0) -> _MegatronTimer:
        """Return what megatron-core starts and stops under this name."""
        return _MegatronTimer(self, name)


class _MegatronTimer:
    """One named timer of megatron-core. Those of its pipeline transfers have "send" or "recv" in their name."""

    def __init__(self, timers: StepTimers, name: str) -> None:
        self._timers = timers if "send" in name or "recv" in name else None

    def start(self, barrier: bool = False) -> None:
        if self._timers is not None:
            self._timers.begin("communication")

    def stop(self) -> None:
        if self._timers is not None:
            self._timers.end("communication")
