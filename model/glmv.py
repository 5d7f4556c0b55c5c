"""The whole model: embed tokens, put image embeddings in their places, decode, per-token loss.

tokens:   [gMASK] <sop> <|begin_of_image|> <|image|> x n <|end_of_image|> a cat
                                           ^ replaced by the adapter's n embeddings, in order
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from model.adapter import PatchMerger, adapter_transformer_config
from model.backend import TorchSpecProvider, select_backend
from model.config import GlmvConfig
from model.decoder import decoder_block_spec, decoder_transformer_config
from model.moe import SegmentRouter
from model.parallel import ParallelConfig, slice_for_tensor_rank, whole_on_every_rank
from model.recompute import RecomputeConfig, recompute_fields
from model.rope import DecoderRope
from model.vision import VisionEncoder, vision_transformer_config


class GlmvModel(MegatronModule):
    """GLM-4.5V or GLM-4.1V on megatron-core. Parameters are uninitialised: `model.hf_weights.load_weights` fills them.

    Args:
        config: what the model is.
        parallel: its layout; megatron-core's process groups must exist.
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
        dtype: torch.dtype = torch.float32,
        balance_loss_coeff: float = 0.0,
        expert_bias_update_rate: float = 0.0,
        recompute: RecomputeConfig | None = None,
        backend: TorchSpecProvider | None = None,
    ) -> None:
        backend = backend or select_backend()
        recompute = recompute or RecomputeConfig()
        transformer = decoder_transformer_config(
            config.decoder,
            dtype=dtype,
            balance_loss_coeff=balance_loss_coeff,
            expert_bias_update_rate=expert_bias_update_rate,
            **recompute_fields(recompute.decoder),
            **parallel.transformer_fields,
            **backend.config_fields,
        )
        super().__init__(transformer)
        self.glmv_config = config
        self.backend = backend
        decoder = config.decoder
        self.language_model = GPTModel(
            transformer,
            decoder_block_spec(decoder, transformer, backend),
            vocab_size=decoder.vocab_size,
            max_sequence_length=decoder.max_position_embeddings,
            position_embedding_type="mrope",
            rotary_percent=decoder.partial_rotary_factor,
            rotary_base=int(decoder.rope_theta),
            scatter_embedding_sequence_parallel=False,  # images are spliced into the whole sequence first
        )
        self.language_model.rotary_pos_emb = DecoderRope(
            decoder.rotary_dim, decoder.rope_theta, interleaved=transformer.rotary_interleaved
        )
        groups = whole_on_every_rank()
        vision_config = vision_transformer_config(
            config.vision, dtype=dtype, **recompute_fields(recompute.vision), **backend.config_fields
        )
        adapter_config = adapter_transformer_config(config.vision, dtype=dtype, **backend.config_fields)
        self.vision_model = VisionEncoder(config.vision, vision_config, backend, groups)
        self.adapter = PatchMerger(adapter_config, backend, groups)
        self.cuda(torch.cuda.current_device())  # megatron-core leaves the routers' weights in main memory
        self._mark_parameters()
        # What megatron-core's schedules and gradient reduction ask of a model.
        self.model_type = self.language_model.model_type
        self.pre_process, self.post_process = self.language_model.pre_process, self.language_model.post_process
        self.share_embeddings_and_output_weights = False

    def _mark_parameters(self) -> None:
        """Tell megatron-core what its linear layers cannot know about where they stand."""
        for module in (self.vision_model, self.adapter):
            for parameter in module.parameters():
                # Whole on every tensor-parallel rank: count it once in the gradient norm, and average what kernels
                # that are not deterministic make of it, lest the copies drift apart.
                parameter.tensor_model_parallel = False
                parameter.average_gradients_across_tp_domain = True
        for name, parameter in self.named_parameters():
            if ".experts.local_experts." in name:
                # Reduce over the ranks that hold the same experts. megatron-core marks them so only where EP > 1, and
                # with TP alone their gradients would silently be wrong; and one format of optimizer state on disk needs
                # the same two optimizers (experts, the rest) in every layout.
                parameter.allreduce = False

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def routers(self) -> list[SegmentRouter]:
        """The routers of this rank's mixture-of-experts layers, in order."""
        return [layer.mlp.router for layer in self.language_model.decoder.layers if hasattr(layer.mlp, "router")]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        segment_lengths: Tensor,
        pixels: Tensor,
        grid_thw: Tensor,
        frames: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One pack. What says shapes (`cu_seqlens`, `segment_lengths`, `grid_thw`, `frames`) stays in main memory, so
        that no layer waits for the device to know them; the other tensors are on the device.

        Args:
            input_ids: int64 [tokens].
            position_ids: int64 [3, tokens]: time, height, width.
            cu_seqlens: int32 [segments + 1], boundaries of the segments, padding included; the last is `tokens`.
            segment_lengths: int32 [segments], useful tokens of each segment.
            pixels, grid_thw, frames: the images of the pack, as `VisionEncoder.forward` takes them.
            labels: int64 [tokens], the token that each position predicts.

        Returns:
            With labels, the loss of every position, float32 [tokens]; without, logits [tokens, vocabulary (of this
            tensor-parallel rank)].

        Raises:
            ValueError: image tokens and image embeddings do not match in number.
        """
        embeddings = self.language_model.embedding(input_ids=input_ids[None], position_ids=None)  # [tokens, 1, hidden]
        images = self._image_embeddings(pixels, grid_thw, frames)
        embeddings = self._splice(embeddings, input_ids, images, has_images=grid_thw.size(0) > 0)
        members = segment_members(cu_seqlens, segment_lengths).to(input_ids.device, non_blocking=True)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
            members = slice_for_tensor_rank(members)
        out = self.language_model(
            input_ids=None,
            position_ids=position_ids[:, None],
            attention_mask=None,
            decoder_input=embeddings,
            labels=None if labels is None else labels[None],
            packed_seq_params=packed_segments(cu_seqlens, segment_lengths),
            padding_mask=members if self.glmv_config.decoder.is_moe else None,
        )
        return out[0]

    def _image_embeddings(self, pixels: Tensor, grid_thw: Tensor, frames: Tensor) -> Tensor:
        """[image tokens, hidden]. The tower always runs: were it skipped on a rank without images, its gradients there
        would never be ready, and the ranks that reduce them would wait."""
        if grid_thw.size(0):
            return self.adapter(self.vision_model(pixels, grid_thw, frames))
        black = pixels.new_zeros(4, pixels.size(1))  # a picture of 2x2 patches
        return self.adapter(self.vision_model(black, grid_thw.new_tensor([[1, 2, 2]]), frames.new_ones(1))) * 0

    def _splice(self, embeddings: Tensor, input_ids: Tensor, images: Tensor, *, has_images: bool) -> Tensor:
        """Put the image embeddings in the places of the image tokens."""
        places = input_ids == self.glmv_config.image_token_id
        expected, found = int(places.sum()), images.size(0) if has_images else 0
        if expected != found:
            raise ValueError(f"the pack has {expected} image tokens but its images make {found} embeddings")
        if not has_images:
            return embeddings + images.sum()  # zero, but joined to the graph
        return embeddings.masked_scatter(places[:, None, None], images.to(embeddings.dtype))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As megatron-core's, but of what every tensor-parallel rank holds whole, only rank 0's copy is written."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        for name, tensor in state.items():
            if name.startswith((f"{prefix}vision_model.", f"{prefix}adapter.")):
                replica = tensor.replica_id
                tensor.replica_id = (replica[0], tp_rank, replica[2])
        return state


def packed_segments(cu_seqlens: Tensor, segment_lengths: Tensor) -> PackedSeqParams:
    """Segments as megatron-core and Transformer Engine take them: where they begin, and how much of each is useful."""
    useful = F.pad(segment_lengths.cumsum(0), (1, 0)).int()
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=useful,
        cu_seqlens_kv=useful,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def segment_members(cu_seqlens: Tensor, segment_lengths: Tensor) -> Tensor:
    """Which tokens each segment has, padding excluded: bool [segments, tokens].

    >>> segment_members(torch.tensor([0, 4, 6]), torch.tensor([3, 2])).int().tolist()
    [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    """
    begins = cu_seqlens[:-1, None]
    tokens = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)[None]
    return (tokens >= begins) & (tokens < begins + segment_lengths[:, None])
