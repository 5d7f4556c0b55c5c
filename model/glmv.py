"""The whole model: embed tokens, replace image tokens by image embeddings, decode, per-token loss.

tokens:   [gMASK] <sop> <|begin_of_image|> <|image|> x n <|end_of_image|> a cat
                                           ^ replaced by the adapter's n embeddings, in order
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model.adapter import PatchMerger, adapter_transformer_config
from model.attention import packed_segments
from model.backend import Backend, select_backend
from model.config import DecoderConfig, GlmvConfig, VisionConfig
from model.context_slicing import my_context_tokens, slice_for_tensor_rank
from model.decoder import decoder_block_spec, decoder_transformer_config
from model.embedding_exchange import EmbeddingExchange
from model.fp8 import Fp8Config
from model.image_constants import MERGE_SIZE
from model.image_padding import image_multiple, pad_images
from model.linear_cross_entropy import OutputLayer
from model.lora_config import LoraConfig
from model.lora_dropout import AdapterDropout, PackNumber
from model.moe import MODALITIES, SegmentRouter
from model.parallel import ParallelConfig
from model.parameter_marks import VISION_PARTS, mark_parameters
from model.process_groups import vision_groups
from model.recompute import RecomputeConfig, recompute_fields
from model.rope import DecoderRope
from model.routed_experts import with_routed_experts
from model.to_device import to_device
from model.vision import VisionEncoder, vision_transformer_config


def build_model_chunks(config: GlmvConfig, parallel: ParallelConfig, **options: Any) -> list[GlmvModel]:
    """Build what this rank holds of the model: one chunk per virtual pipeline stage.

    Args:
        config: The model.
        parallel: Its layout; megatron-core's process groups must exist.
        options: Other keyword arguments of `GlmvModel`.
    """
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual > 1 else [None]
    return [GlmvModel(config, parallel, vp_stage=stage, **options) for stage in stages]


class GlmvModel(MegatronModule):
    """GLM-4.5V or GLM-4.1V on megatron-core: the whole model, or one stage of its pipeline.

    Vision tower and adapter belong to the first stage. Parameters are uninitialised until
    `model.weights.load.load_weights` or `model.checkpoint.load_checkpoint` fills them.

    Args:
        config: The model.
        parallel: Its layout; megatron-core's process groups must exist.
        vp_stage: Which of this rank's virtual pipeline stages; None if it has one stage.
        pipeline_layout: Units of each stage (`model.pipeline_layout`); None: equal numbers of layers.
        dtype: Dtype of the parameters, float32 or bfloat16.
        balance_loss_coeff: See `decoder_transformer_config`.
        expert_bias_update_rate: See `decoder_transformer_config`.
        dispatcher: See `decoder_transformer_config`.
        shared_expert_overlap: See `decoder_transformer_config`.
        recompute: Which activations are recomputed; none by default.
        fp8: Which linear layers compute in FP8, and how; none by default.
        backend: Provider of the leaf modules; this machine's default if None.
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
        dispatcher: str = "alltoall",
        shared_expert_overlap: bool = False,
        recompute: RecomputeConfig | None = None,
        fp8: Fp8Config | None = None,
        backend: Backend | None = None,
    ) -> None:
        backend = backend or select_backend(dtype=dtype)
        recompute, fp8 = recompute or RecomputeConfig(), fp8 or Fp8Config()
        kernels = fp8 if backend.has_fp8_kernels else Fp8Config()
        transformer = decoder_transformer_config(
            config.decoder,
            dtype=dtype,
            balance_loss_coeff=balance_loss_coeff,
            expert_bias_update_rate=expert_bias_update_rate,
            dispatcher=dispatcher,
            shared_expert_overlap=shared_expert_overlap,
            pipeline_model_parallel_layout=pipeline_layout and [list(stage) for stage in pipeline_layout],
            **recompute_fields(recompute.decoder),
            **parallel.transformer_fields,
            **backend.config_fields,
            **kernels.decoder_fields,
        )
        super().__init__(transformer)
        self.glmv_config, self.parallel, self.backend, self.fp8 = config, parallel, backend, fp8
        self.fp8_kernels = kernels
        self.image_multiple = image_multiple(kernels)
        # Attributes that megatron-core's schedules and gradient reduction read.
        self.vp_stage = vp_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = False
        self.lora: LoraConfig | None = None  # set by model.lora.add_adapters, as is the next
        self.adapter_dropout = AdapterDropout()

        # Modules in the order of the forward pass, in which weights are gathered.
        if self.pre_process:
            modules = backend.with_fp8(fp8) if fp8.enabled and fp8.vision else backend
            self.vision_model, self.adapter = _vision_modules(
                config.vision, parallel, modules, dtype, recompute.vision, kernels
            )
            self.embedding_exchange = EmbeddingExchange(config.vision, parallel.vision)
        self.language_model = self._build_decoder(config.decoder, transformer)
        for place, router in enumerate(self.routers()):
            router.place, router.places = place, len(self.routers())
        self.model_type = self.language_model.model_type
        self.cuda(torch.cuda.current_device())  # megatron-core leaves the routers' weights in main memory
        mark_parameters(self, parallel.vision)

    def _build_decoder(self, decoder: DecoderConfig, transformer: TransformerConfig) -> HiddenStateGPT:
        """Build this stage's part of the decoder, with this model's rope."""
        language_model = HiddenStateGPT(
            transformer,
            decoder_block_spec(decoder, transformer, self.backend, self.vp_stage, self.fp8),
            vocab_size=decoder.vocab_size,
            max_sequence_length=decoder.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            position_embedding_type="mrope",
            rotary_percent=decoder.partial_rotary_factor,
            rotary_base=int(decoder.rope_theta),
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            language_model.output_layer.__class__ = OutputLayer  # the same parameters, another forward pass
        language_model.rotary_pos_emb = DecoderRope(
            decoder.rotary_dim, decoder.rope_theta, interleaved=transformer.rotary_interleaved
        )
        return language_model

    @property
    def description(self) -> str:
        """What computes the model, for the log."""
        return (self.backend.with_fp8(self.fp8) if self.fp8.enabled else self.backend).description

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the previous stage; megatron-core's schedules call it."""
        self.language_model.set_input_tensor(input_tensor)

    def routers(self) -> list[SegmentRouter]:
        """Return the routers of this stage's mixture-of-experts layers, in order."""
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
        pack: PackNumber | None = None,
        routed_experts: Tensor | None = None,
    ) -> Tensor:
        """Run one pack.

        Every rank gets the whole pack, in main memory, so that no layer waits for the device to learn a shape. It works
        on its own part of the tokens. Only the first stage reads `patches`.

        Args:
            input_ids: int64 [tokens].
            position_ids: int64 [3, tokens], time, height and width.
            cu_seqlens: int32 [segments + 1], boundaries of the segments with padding; the last is `tokens`.
            segment_lengths: int32 [segments], useful tokens of each segment.
            patches: uint8 [slices, 588], as `VisionEncoder.forward` takes them, but may be in main memory.
            grid_thw: int64 [images, 3], each (1, h, w) in patches.
            frames_per_image: int32 [images].
            labels: int64 [tokens], the token that each position predicts.
            pack: Which pack of the run it is. It decides what `lora.dropout` drops in training; None: nothing.
            routed_experts: uint8 [tokens, layers with experts, experts per token], for `model.routed_experts`, or None.

        Returns:
            On the last stage with labels: the losses of this context rank's tokens (`my_context_tokens`), float32
            [tokens / CP]. On the last stage without labels: their logits [tokens / CP, vocabulary / TP]. On other
            stages: the hidden states for the next stage.

        Raises:
            ImageTokenError: An image has more or fewer image tokens than its grid needs (first stage only).
        """
        tokens = my_context_tokens(cu_seqlens)
        self.adapter_dropout.begin(pack if self.training else None)
        hidden_states = None
        if self.pre_process:
            hidden_states = self._embed(input_ids, tokens, cu_seqlens, patches, grid_thw, frames_per_image)
        members = None
        if self.config.num_moe_experts:
            modalities = token_modalities(input_ids, self.glmv_config.image_token_id, grid_thw, frames_per_image)
            members = self._members(cu_seqlens, segment_lengths, tokens, modalities, routed_experts)
        self.adapter_dropout.work_on(tokens)
        hidden_states = self.language_model(
            input_ids=None,
            position_ids=to_device(position_ids[:, None]),
            attention_mask=None,
            decoder_input=hidden_states,
            packed_seq_params=packed_segments(cu_seqlens, segment_lengths),
            padding_mask=members,
        )
        if not self.post_process:
            return hidden_states
        labels = None if labels is None else to_device(labels[tokens])
        return self.language_model.output_layer(hidden_states, labels)

    def _embed(
        self,
        input_ids: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor,
        patches: Tensor,
        grid_thw: Tensor,
        frames_per_image: Tensor,
    ) -> Tensor:
        """Return the embeddings of this rank's tokens, image embeddings included.

        Returns:
            [tokens / CP, 1, hidden]; under sequence parallelism [tokens / CP / TP, 1, hidden].
        """
        table = self.embedding_exchange.table(input_ids, self.glmv_config.image_token_id, grid_thw, cu_seqlens)
        computed = self.embed_images(table.images, patches, grid_thw, frames_per_image)
        received = self.embedding_exchange.send(table, computed)
        embeddings = self.language_model.embedding(input_ids=to_device(input_ids[None, tokens]), position_ids=None)
        if not self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        positions = to_device(table.received_positions)
        embeddings = embeddings.index_copy(0, positions, received[:, None].to(embeddings.dtype))
        if not self.config.sequence_parallel:
            embeddings = gather_from_sequence_parallel_region(embeddings, tensor_parallel_output_grad=False)
        return embeddings

    def embed_images(self, images: Tensor, patches: Tensor, grid_thw: Tensor, frames_per_image: Tensor) -> Tensor:
        """Run tower and adapter on some images of a pack.

        The tower runs even for no images. Otherwise its gradients would never be ready on a rank without images, and
        the ranks that reduce them would wait.

        Args:
            images: int64 [images to embed], indices of rows of `grid_thw`.
            patches: All patches of the pack, as `forward` takes them.
            grid_thw: As `forward` takes it.
            frames_per_image: As `forward` takes it.

        Returns:
            [rows, hidden], the embeddings of `images`, one after the other.
        """
        if len(images):
            slices = patches.split((grid_thw.prod(dim=1) * frames_per_image).tolist())
            own = torch.cat([slices[image] for image in images.tolist()])
            shapes, frames_per_image = grid_thw[images], frames_per_image[images]
        else:
            own = patches.new_zeros(MERGE_SIZE**2, patches.size(1))  # a black image of one token
            shapes, frames_per_image = torch.tensor([[1, MERGE_SIZE, MERGE_SIZE]]), frames_per_image.new_ones(1)
        useful = int(shapes.prod(dim=1).sum()) // MERGE_SIZE**2 if len(images) else 0
        own, shapes, frames_per_image = pad_images(own, shapes, frames_per_image, self.image_multiple)
        places = places_of_patches(images, grid_thw) if len(images) else torch.arange(MERGE_SIZE**2)
        places = F.pad(places, (0, int(shapes.prod(dim=1).sum()) - len(places)))
        self.adapter_dropout.work_on(places)
        rows = self.vision_model(to_device(own), shapes, frames_per_image)
        self.adapter_dropout.work_on(places[:: MERGE_SIZE**2] // MERGE_SIZE**2)
        return self.adapter(rows)[:useful]

    def _members(
        self,
        cu_seqlens: Tensor,
        segment_lengths: Tensor,
        tokens: Tensor,
        modalities: Tensor,
        routed_experts: Tensor | None,
    ) -> Tensor:
        """Return the table of members of this rank's tokens, for the routers of this stage (model.moe)."""
        if self.config.sequence_parallel:
            tokens = slice_for_tensor_rank(tokens)
        experts = None
        if routed_experts is not None:
            first = self.glmv_config.decoder.first_k_dense_replace + 1  # layers are numbered from 1
            layers = torch.tensor([router.layer_number - first for router in self.routers()], dtype=torch.int64)
            experts = to_device(routed_experts[tokens][:, layers])
        own = (cu_seqlens, segment_lengths, tokens, modalities[tokens])
        cu_seqlens, segment_lengths, tokens, modalities = map(to_device, own)
        members = segment_members(cu_seqlens, segment_lengths, tokens) * modalities
        return members if experts is None else with_routed_experts(members, experts)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return megatron-core's state dict; of parameters that all tensor ranks hold, rank 0 writes the only copy."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.parallel.vision == "images":
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            for name, tensor in state.items():
                if name.removeprefix(prefix).startswith(VISION_PARTS):
                    replica = tensor.replica_id
                    tensor.replica_id = (replica[0], tp_rank, replica[2])
        return state


class HiddenStateGPT(GPTModel):
    """megatron-core's decoder without its head: on every stage it returns hidden states [tokens, 1, hidden].

    The last stage has the output layer, which `GlmvModel.forward` applies.
    """

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def _vision_modules(
    vision: VisionConfig, parallel: ParallelConfig, backend: Backend, dtype: torch.dtype, recompute: str, fp8: Fp8Config
) -> tuple[VisionEncoder, PatchMerger]:
    """Build the vision tower and the adapter; `recompute` is that of the tower, `fp8` what kernels compute."""
    groups = vision_groups(parallel)
    fields: dict[str, Any] = {"tensor_model_parallel_size": groups.tp.size(), **backend.config_fields}
    fields |= fp8.vision_fields
    tower_config = vision_transformer_config(vision, dtype=dtype, **recompute_fields(recompute), **fields)
    adapter_config = adapter_transformer_config(vision, dtype=dtype, **fields)
    return VisionEncoder(vision, tower_config, backend, groups), PatchMerger(adapter_config, backend, groups)


def segment_members(cu_seqlens: Tensor, segment_lengths: Tensor, tokens: Tensor) -> Tensor:
    """Return which of `tokens` belong to each segment, padding excluded: bool [segments, tokens].

    >>> segment_members(torch.tensor([0, 4, 6]), torch.tensor([3, 2]), torch.arange(6)).int().tolist()
    [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    """
    begins = cu_seqlens[:-1, None]
    return (tokens >= begins) & (tokens < begins + segment_lengths[:, None])


def places_of_patches(images: Tensor, grid_thw: Tensor) -> Tensor:
    """Return the places, among all patches of a pack, of the patches of some of its images: int64 [patches].

    >>> places_of_patches(torch.tensor([0, 2]), torch.tensor([[1, 2, 2], [1, 4, 4], [1, 2, 2]])).tolist()
    [0, 1, 2, 3, 20, 21, 22, 23]
    """
    lengths = grid_thw.prod(dim=1)
    of_image = torch.arange(int(lengths.sum())).split(lengths.tolist())
    return torch.cat([of_image[image] for image in images.tolist()])


def token_modalities(input_ids: Tensor, image_token_id: int, grid_thw: Tensor, frames_per_image: Tensor) -> Tensor:
    """Return what each token of a pack stands for: uint8 [tokens], 1 + its index in MODALITIES.

    Args:
        input_ids: int64 [tokens], in main memory.
        image_token_id: Id of the image token.
        grid_thw: int64 [images, 3], each (1, h, w) in patches.
        frames_per_image: int32 [images].

    >>> token_modalities(torch.tensor([7, 9, 7, 9, 7]), 9, torch.tensor([[1, 2, 2], [1, 2, 2]]), torch.tensor([1, 2]))
    tensor([1, 2, 1, 3, 1], dtype=torch.uint8)
    """
    text, image = (1 + MODALITIES.index(name) for name in ("text", "image"))
    modalities = torch.full_like(input_ids, text, dtype=torch.uint8)
    of_image = (frames_per_image - 1 + image).to(torch.uint8)  # a frame pair is a part of a video
    modalities[input_ids == image_token_id] = of_image.repeat_interleave(grid_thw.prod(dim=1) // MERGE_SIZE**2)
    return modalities
