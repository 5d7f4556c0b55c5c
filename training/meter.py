"""What a trainer reads beside the loss: speed, memory, times, progress. All ranks measure, the main one writes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.domains import DOMAINS
from data_pipeline.encoding.batch import Batch
from model.config import GlmvConfig
from model.lora_targets import adapted_parts
from training.config import RunConfig
from training.fp8_checks import has_kernels
from training.step import StepReport, TrainStep
from training.throughput import StepFlops, device_peak
from training.timers import PARTS

ETA_STEPS = 50  # the time left is estimated from the last steps
GIGA, TERA = 1e9, 1e12


class Meter:
    """Measures steps, on every rank.

    Args:
        config: the run.
        model: what it trains.
        trainer: what trains it.
    """

    def __init__(self, config: RunConfig, model: GlmvConfig, trainer: TrainStep) -> None:
        self.trainer, self.steps = trainer, config.train.steps
        trainer.expert_load.dead_after = config.metrics.dead_expert_steps
        self.peak = device_peak(config.metrics.peak_tflops, config.train.precision, fp8=has_kernels(config)) * TERA
        self.tokens_total = 0
        adapted = adapted_parts(model, config.lora) if config.lora.rank else None
        self._flops = StepFlops(model, config.freeze, adapted)
        self._process = psutil.Process()
        self._on_gpu = torch.accelerator.is_available()
        self._ends = deque([time.perf_counter()], maxlen=ETA_STEPS + 1)

    def measure(
        self, step: int, report: StepReport, batches: Sequence[Batch], data_seconds: float, seconds: float
    ) -> dict[str, float]:
        """Return the measurements of a step. Collective.

        Args:
            step: its number.
            report: what it did.
            batches: its packs on this data-parallel rank.
            data_seconds: time in which this rank waited for them.
            seconds: time of the whole step on this rank.
        """
        times = self.trainer.timers.read()
        highest = torch.tensor(
            [data_seconds, *self._memory(), *(times.get(part, -1.0) for part in PARTS)],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        data, allocated, reserved, *parts = highest.tolist()
        self.tokens_total += report.tokens
        self._ends.append(time.perf_counter())
        eta = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self.steps - step)
        return {
            **self._work(batches, seconds),
            "memory_gb": allocated / GIGA,
            **({"memory_gb/reserved": reserved / GIGA} if self._on_gpu else {}),
            "data_seconds": data,
            **{f"seconds/{part}": value for part, value in zip(PARTS, parts, strict=True) if value >= 0},
            "tokens_total": self.tokens_total,
            "eta_seconds": eta,
        }

    def _work(self, batches: Sequence[Batch], seconds: float) -> dict[str, float]:
        """Return TFLOP/s of a rank, their share of the peak where that is known, and tokens by domain. Collective."""
        tokens = dict.fromkeys(DOMAINS, 0)
        for batch in batches:
            for domain, length in zip(batch.segment_domains, batch.segment_lengths.tolist(), strict=True):
                if domain:
                    tokens[domain] += length
        sums = torch.tensor(
            [self._flops.of(batches), *tokens.values()], dtype=torch.float64, device=torch.cuda.current_device()
        )
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        flops, *counts = sums.tolist()
        per_rank = flops / (seconds * dist.get_world_size())
        return {
            "tflops_per_rank": per_rank / TERA,
            **({"mfu": per_rank / self.peak} if self.peak else {}),
            **{f"tokens/{domain}": int(count) for domain, count in zip(DOMAINS, counts, strict=True) if count},
        }

    def _memory(self) -> tuple[float, float]:
        """Return the bytes of this rank: on a GPU the peaks of the step, allocated and reserved; on a CPU resident."""
        if not self._on_gpu:
            return float(self._process.memory_info().rss), 0.0
        peaks = float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return peaks

    def state(self) -> dict[str, Any]:
        """Return what must survive a crash. Collective."""
        return {"tokens_total": self.tokens_total, "idle_experts": self.trainer.expert_load.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`; from an empty one, of a checkpoint without it, begin to count here."""
        self.tokens_total = state.get("tokens_total", 0)
        self.trainer.expert_load.load_state(state.get("idle_experts", {}))
