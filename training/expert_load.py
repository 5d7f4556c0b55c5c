"""How a step's tokens spread over the experts: highest and lowest load, loads by modality, experts without tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from model.glmv import GlmvModel
from model.megatron_versions import clear_recorded_losses, recorded_loss
from model.moe import BALANCE_LOSS, MODALITIES


class ExpertLoad:
    """Counts the tokens of every expert on this rank, and reports on those of the global batch.

    Args:
        model_chunks: what this rank holds of the model.
        dead_after: an expert without a token in this many steps counts as dead.
    """

    def __init__(self, model_chunks: Sequence[GlmvModel], dead_after: int = 100) -> None:
        self.dead_after = dead_after
        self.config = model_chunks[0].config
        self._routers = [router for chunk in model_chunks for router in chunk.routers()]
        self._counts: Tensor | None = None  # [layers, modalities, experts] of the last forward and backward passes
        self._idle: Tensor | None = None  # [layers, experts], steps since an expert had a token
        if self._routers:
            shape = len(self._routers), self._routers[0].num_experts
            self._idle = torch.zeros(*shape, dtype=torch.int64, device=torch.cuda.current_device())

    def take(self) -> None:
        """Take the counts of a step from the routers, before megatron-core clears its own."""
        if self._routers:
            self._counts = torch.stack([router.local_tokens_by_modality for router in self._routers])
            for router in self._routers:
                router.local_tokens_by_modality.zero_()

    def report(self, micro_batches: int) -> dict[str, float]:
        """Return the loads and the balance loss of the step. Collective.

        The loss is the mean over layers. Loads are of any layer, as multiples of an even share.

        Args:
            micro_batches: packs of a data-parallel rank.
        """
        kinds = len(MODALITIES)
        device = torch.cuda.current_device()
        highest = torch.full(
            (kinds + 2,), -math.inf, device=device
        )  # of each modality, of all; minus the lowest of all
        dead = torch.zeros(2, dtype=torch.int64, device=device)  # in this step, and for `dead_after` steps
        if self._counts is not None:
            assert self._idle is not None
            dist.all_reduce(self._counts, group=_same_stage())
            of_all = self._counts.sum(1)
            load = torch.cat([_shares(self._counts).amax((0, 2)), _shares(of_all).amax()[None]])
            highest = torch.cat([load, -_shares(of_all).amin()[None]])
            self._idle = torch.where(of_all > 0, 0, self._idle + 1)
            dead = torch.stack([(self._idle > 0).sum(), (self._idle >= self.dead_after).sum()])
            self._counts = None
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=_stages())
        dist.all_reduce(dead, group=_stages())
        loads, counts = highest.tolist(), dead.tolist()
        report = {"expert_load/max": loads[kinds], "expert_load/min": -loads[kinds + 1]}
        report |= {f"expert_load/{name}/max": load for name, load in zip(MODALITIES, loads, strict=False) if load > 0}
        report |= {"dead_experts": counts[0], "dead_experts/window": counts[1]}
        if self.config.moe_aux_loss_coeff:
            report["balance_loss"] = self._balance_loss(micro_batches)
        return report

    def _balance_loss(self, micro_batches: int) -> float:
        values = torch.zeros((), device=torch.cuda.current_device())
        if (recorded := recorded_loss(BALANCE_LOSS)) is not None:
            values = recorded.sum()
        dist.all_reduce(values, group=_same_stage())
        dist.all_reduce(values, group=_stages())
        clear_recorded_losses()
        layers = sum(self.config.moe_layer_freq)
        return values.item() / (layers * micro_batches * parallel_state.get_data_parallel_world_size())

    def state(self) -> dict[str, list[int]]:
        """Return the steps since each expert had a token, by layer of the whole model. Collective."""
        own = {}
        if self._idle is not None:
            own = {str(r.layer_number): idle for r, idle in zip(self._routers, self._idle.tolist(), strict=True)}
        stages: list[dict[str, list[int]]] = [
            {} for _ in range(parallel_state.get_pipeline_model_parallel_world_size())
        ]
        dist.all_gather_object(stages, own, group=_stages())
        return {layer: idle for stage in stages for layer, idle in stage.items()}

    def load_state(self, state: dict[str, list[int]]) -> None:
        """Resume from `state`; of layers that it does not name, every expert counts as just used."""
        if self._idle is not None:
            for router, idle in zip(self._routers, self._idle, strict=True):
                if str(router.layer_number) in state:
                    idle.copy_(torch.tensor(state[str(router.layer_number)]))


def _shares(counts: Tensor) -> Tensor:
    """Return counts [..., experts] as multiples of an even share."""
    return counts / counts.mean(dim=-1, keepdim=True).clamp(min=1 / counts.size(-1))


def _same_stage() -> dist.ProcessGroup:
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def _stages() -> dist.ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()
