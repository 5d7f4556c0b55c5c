"""The whole model: embed tokens, put image embeddings in their places, decode, per-token loss.

tokens:   [gMASK] <sop> <|begin_of_image|> <|image|> x n <|end_of_image|> a cat
                                           ^ replaced by the adapter's n embeddings, in order
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from model.adapter import PatchMerger, adapter_transformer_config
from model.attention import packed_segments
from model.backend import Backend, select_backend
from model.config import GlmvConfig
from model.decoder import decoder_block_spec, decoder_transformer_config
from model.image_exchange import ImageSharing
from model.moe import SegmentRouter
from model.parallel import ParallelConfig, my_context_tokens, slice_for_tensor_rank, vision_groups
from model.recompute import RecomputeConfig, recompute_fields
from model.rope import DecoderRope
from model.vision import VisionEncoder, vision_transformer_config


def build_model_chunks(config: GlmvConfig, parallel: ParallelConfig, **options: Any) -> list[GlmvModel]:
    """What this rank holds of the model: one chunk, or one for each of its virtual pipeline stages. `options` are those
    of `GlmvModel`."""
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual > 1 else [None]
    return [GlmvModel(config, parallel, vp_stage=stage, **options) for stage in stages]


class GlmvModel(MegatronModule):
    """GLM-4.5V or GLM-4.1V on megatron-core: the whole model, or one stage of its pipeline. The vision tower and the
    adapter belong to the first stage. Parameters are uninitialised: `model.hf_weights.load_weights` fills them.

    Args:
        config: what the model is.
        parallel: its layout; megatron-core's process groups must exist.
        vp_stage: which of this rank's virtual pipeline stages; None where it has but one stage.
        pipeline_layout: what each stage holds (`model.pipeline_layout`); None: equally many layers.
        dtype: of the parameters, float32 or bfloat16.
        balance_loss_coeff, expert_bias_update_rate: see `decoder_transformer_config`.
        recompute: which activations are computed again instead of kept; nothing by default.
        backend: which leaf modules to build from; this machine's by default.
    """

    def __init__(
        self,
        config: GlmvConfig,
        parallel: ParallelConfig,
        *,
        vp_stage: int | None = None,
        pipeline_layout: Sequence[Sequence[str]] | None = None,
        dtype: torch.dtype = torch.float32,
        balance_loss_coeff: float = 0.0,
        expert_bias_update_rate: float = 0.0,
        recompute: RecomputeConfig | None = None,
        backend: Backend | None = None,
    ) -> None:
        backend = backend or select_backend(dtype=dtype)
        recompute = recompute or RecomputeConfig()
        transformer = decoder_transformer_config(
            config.decoder,
            dtype=dtype,
            balance_loss_coeff=balance_loss_coeff,
            expert_bias_update_rate=expert_bias_update_rate,
            pipeline_model_parallel_layout=pipeline_layout and [list(stage) for stage in pipeline_layout],
            **recompute_fields(recompute.decoder),
            **parallel.transformer_fields,
            **backend.config_fields,
        )
        super().__init__(transformer)
        self.glmv_config, self.parallel, self.backend = config, parallel, backend
        # What megatron-core's schedules and gradient reduction ask of a model.
        self.vp_stage = vp_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = False

        # In the order of the forward, in which weights are gathered.
        if self.pre_process:
            groups = vision_groups(parallel)
            fields: dict[str, Any] = {"tensor_model_parallel_size": groups.tp.size(), **backend.config_fields}
            vision_config = vision_transformer_config(
                config.vision, dtype=dtype, **recompute_fields(recompute.vision), **fields
            )
            adapter_config = adapter_transformer_config(config.vision, dtype=dtype, **fields)
            self.vision_model = VisionEncoder(config.vision, vision_config, backend, groups)
            self.adapter = PatchMerger(adapter_config, backend, groups)
            self.image_sharing = ImageSharing(config.vision, parallel.vision)
        decoder = config.decoder
        self.language_model = GPTModel(
            transformer,
            decoder_block_spec(decoder, transformer, backend, vp_stage),
            vocab_size=decoder.vocab_size,
            max_sequence_length=decoder.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            position_embedding_type="mrope",
            rotary_percent=decoder.partial_rotary_factor,
            rotary_base=int(decoder.rope_theta),
            vp_stage=vp_stage,
        )
        self.language_model.rotary_pos_emb = DecoderRope(
            decoder.rotary_dim, decoder.rope_theta, interleaved=transformer.rotary_interleaved
        )
        self.model_type = self.language_model.model_type
        self.cuda(torch.cuda.current_device())  # megatron-core leaves the routers' weights in main memory
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Tell megatron-core what its linear layers cannot know about where they stand."""
        for name, parameter in self.named_parameters():
            if name.startswith(VISION_PARTS):
                if self.parallel.vision == "images":
                    # Whole on every tensor-parallel rank: to be counted once in the gradient norm.
                    parameter.tensor_model_parallel = False
                if not getattr(parameter, "tensor_model_parallel", False):
                    # Each rank has the gradient of its own images, or all have the same but for the noise of kernels
                    # that are not deterministic, and copies must not drift apart.
                    parameter.average_gradients_across_tp_domain = True
            if ".experts." in name:
                # Reduce over the ranks that hold the same experts. megatron-core marks them so only where EP > 1, and
                # with TP alone their gradients would silently be wrong; and one format of optimizer state on disk needs
                # the same two optimizers (experts, the rest) in every layout.
                parameter.allreduce = False

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def routers(self) -> list[SegmentRouter]:
        """The routers of this stage's mixture-of-experts layers, in order."""
        return [layer.mlp.router for layer in self.language_model.decoder.layers if hasattr(layer.mlp, "router")]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        segment_lengths: Tensor,
        patches: Tensor,
        grid_thw: Tensor,
        frames_per_image: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One pack, of which this rank takes its part. Every rank of a layout is given the whole pack, in main memory,
        so that no layer waits for the device to learn a shape. Only the first stage looks at `patches`.

        Args:
            input_ids: int64 [tokens].
            position_ids: int64 [3, tokens]: time, height, width.
            cu_seqlens: int32 [segments + 1], boundaries of the segments, padding included; the last is `tokens`.
            segment_lengths: int32 [segments], useful tokens of each segment.
            patches, grid_thw, frames_per_image: of the images of the pack, as `VisionEncoder.forward` takes
                them; `patches` may be on the device.
            labels: int64 [tokens], the token that each position predicts.

        Returns:
            On the last stage: with labels, the loss of this context rank's positions (`my_context_tokens`), float32
            [tokens / CP]; without, their logits [tokens / CP, vocabulary of this tensor-parallel rank]. On others: the
            hidden states for the next stage.

        Raises:
            ValueError: image tokens and image embeddings do not match in number.
        """
        device = torch.cuda.current_device()
        tokens = my_context_tokens(cu_seqlens)
        hidden_states = None
        if self.pre_process:
            hidden_states = self._embed(input_ids, tokens, cu_seqlens, patches, grid_thw, frames_per_image)
        out = self.language_model(
            input_ids=None,
            position_ids=position_ids[:, None].to(device, non_blocking=True),
            attention_mask=None,
            decoder_input=hidden_states,
            labels=None if labels is None else labels[None, tokens].to(device, non_blocking=True),
            packed_seq_params=packed_segments(cu_seqlens, segment_lengths),
            padding_mask=self._members(cu_seqlens, segment_lengths, tokens) if self.config.num_moe_experts else None,
        )
        return out[0] if self.post_process else out

    def _embed(
        self,
        input_ids: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor,
        patches: Tensor,
        grid_thw: Tensor,
        frames_per_image: Tensor,
    ) -> Tensor:
        """Embeddings of this rank's tokens, with images in the places of image tokens: [tokens / CP, 1, hidden], under
        sequence parallelism [tokens / CP / TP, 1, hidden]."""
        plan = self.image_sharing.plan(input_ids, self.glmv_config.image_token_id, grid_thw, cu_seqlens)
        received = self.image_sharing.exchange(plan, self._run_tower(plan.images, patches, grid_thw, frames_per_image))
        ids = input_ids[None, tokens].to(received.device, non_blocking=True)
        embeddings = self.language_model.embedding(input_ids=ids, position_ids=None)
        if not self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        places = plan.places.to(embeddings.device, non_blocking=True)
        embeddings = embeddings.index_copy(0, places, received[:, None].to(embeddings.dtype))
        if not self.config.sequence_parallel:
            embeddings = gather_from_sequence_parallel_region(embeddings, tensor_parallel_output_grad=False)
        return embeddings

    def _run_tower(self, images: Tensor, patches: Tensor, grid_thw: Tensor, frames_per_image: Tensor) -> Tensor:
        """Embeddings [rows, hidden] of the images of these numbers. The tower always runs: were it skipped on a rank
        without images, its gradients there would never be ready, and the ranks that reduce them would wait."""
        if len(images):
            slices = patches.split((grid_thw.prod(dim=1) * frames_per_image).tolist())
            own = torch.cat([slices[image] for image in images.tolist()])
            shapes, frames_per_image = grid_thw[images], frames_per_image[images]
        else:
            own = patches.new_zeros(4, patches.size(1))  # a black picture of 2x2 patches
            shapes, frames_per_image = torch.tensor([[1, 2, 2]]), frames_per_image.new_ones(1)
        rows = self.adapter(
            self.vision_model(own.to(torch.cuda.current_device(), non_blocking=True), shapes, frames_per_image)
        )
        return rows if len(images) else rows[:0]

    def _members(self, cu_seqlens: Tensor, segment_lengths: Tensor, tokens: Tensor) -> Tensor:
        """Which of this rank's tokens belong to each segment, for the routers (model.moe)."""
        device = torch.cuda.current_device()
        if self.config.sequence_parallel:
            tokens = slice_for_tensor_rank(tokens)
        return segment_members(*(x.to(device, non_blocking=True) for x in (cu_seqlens, segment_lengths, tokens)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As megatron-core's, but of what every tensor-parallel rank holds whole, only rank 0's copy is written."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.parallel.vision == "images":
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            for name, tensor in state.items():
                if name.removeprefix(prefix).startswith(VISION_PARTS):
                    replica = tensor.replica_id
                    tensor.replica_id = (replica[0], tp_rank, replica[2])
        return state


VISION_PARTS = ("vision_model.", "adapter.")


def segment_members(cu_seqlens: Tensor, segment_lengths: Tensor, tokens: Tensor) -> Tensor:
    """Which of `tokens` each segment has, padding excluded: bool [segments, tokens].

    >>> segment_members(torch.tensor([0, 4, 6]), torch.tensor([3, 2]), torch.arange(6)).int().tolist()
    [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    """
    begins = cu_seqlens[:-1, None]
    return (tokens >= begins) & (tokens < begins + segment_lengths[:, None])
