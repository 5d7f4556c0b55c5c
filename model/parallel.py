"""How a model is laid out over processes: the sizes and their checks.

Ranks are numbered as in megatron-core: tensor parallel fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from model.config import ConfigError, DecoderConfig, GlmvConfig, VisionConfig

VISION_SHARDING = ("images", "tensor")
SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass
class ParallelConfig:
    """Sizes of the parallel dimensions. The data-parallel size is the number of processes over TP x CP x PP."""

    tensor_model_parallel_size: int = 1  # processes that share each layer
    pipeline_model_parallel_size: int = 1  # pipeline stages that the layers are divided into, each on other processes
    # virtual stages per pipeline rank, which run in turn; above 1, a rank's packs per step must be a multiple of
    # parallel.pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1  # processes that share each sample's tokens; twice it divides data.segment_multiple
    expert_model_parallel_size: int = 1  # processes that share the routed experts
    expert_tensor_parallel_size: int = 1  # processes that share each routed expert; 1: whole experts, also under TP
    sequence_parallel: bool = False  # split norms and residuals over the tensor ranks; required for MoE under TP
    # what the tensor and context ranks share of a pack's images. images: each runs the whole tower on some of them;
    # tensor: tensor ranks share the tower's layers, context ranks the images
    vision: str = "images"

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.vision not in VISION_SHARDING:
            raise ConfigError(f"parallel.vision={self.vision!r}: choose one of {', '.join(VISION_SHARDING)}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true splits the sequence over tensor-parallel ranks; set "
                "parallel.tensor_model_parallel_size above 1, or sequence_parallel=false"
            )
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} needs "
                "parallel.pipeline_model_parallel_size above 1; or set it to 1"
            )

    # --- checks ---------------------------------------------------------------------------------------------------

    def check(self, model: GlmvConfig, world_size: int, seq_length: int, segment_multiple: int) -> None:
        """Check that the layout is possible and that megatron-core computes it correctly.

        Args:
            model: The model.
            world_size: Number of processes.
            seq_length: Tokens per pack.
            segment_multiple: Tokens to a multiple of which segments are padded.

        Raises:
            ConfigError: It is not; the message names the option and what it must divide.
        """
        self._check_world(world_size)
        self._check_decoder(model.decoder)
        if self.vision == "tensor":
            self._check_vision(model.vision)
        self._check_sequence(seq_length, segment_multiple)

    def _check_world(self, world_size: int) -> None:
        for sizes in (
            ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"),
            ("expert_model_parallel_size", "expert_tensor_parallel_size", "pipeline_model_parallel_size"),
        ):
            if world_size % prod(getattr(self, name) for name in sizes):
                named = " x ".join(
                    f"parallel.{name}={getattr(self, name)}" for name in sizes if getattr(self, name) > 1
                )
                raise ConfigError(f"{named} does not divide the {world_size} processes")

    def _check_decoder(self, decoder: DecoderConfig) -> None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if not decoder.is_moe and getattr(self, name) > 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: this model is dense; set it to 1")
        if decoder.is_moe and self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            raise ConfigError(
                "a mixture of experts under tensor parallelism needs parallel.sequence_parallel=true: without it every "
                "tensor-parallel rank routes every token, and the experts' gradients are wrong"
            )
        divided_by_tp = {
            "num_attention_heads": decoder.num_attention_heads,
            "vocab_size": decoder.vocab_size,
            "num_key_value_heads": decoder.num_key_value_heads,
            "intermediate_size": decoder.intermediate_size,
            "shared expert width": decoder.moe_intermediate_size * decoder.n_shared_experts,
        }
        self._check_divides("tensor_model_parallel_size", divided_by_tp)
        self._check_divides("expert_model_parallel_size", {"number of experts": decoder.n_routed_experts})
        self._check_divides("expert_tensor_parallel_size", {"moe_intermediate_size": decoder.moe_intermediate_size})

    def _check_vision(self, vision: VisionConfig) -> None:
        divided_by_tp = {
            "vision num_heads": vision.num_heads,
            "vision out_hidden_size": vision.out_hidden_size,
            "vision intermediate_size": vision.intermediate_size,
        }
        self._check_divides("tensor_model_parallel_size", divided_by_tp, fix="; or set parallel.vision=images")

    def _check_divides(self, size: str, dimensions: dict[str, int], fix: str = "") -> None:
        value = getattr(self, size)
        for name, dimension in dimensions.items():
            if dimension % value:
                raise ConfigError(f"parallel.{size}={value} does not divide the model's {name} {dimension}{fix}")

    def _check_sequence(self, seq_length: int, segment_multiple: int) -> None:
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        if cp > 1 and segment_multiple % (2 * cp):
            raise ConfigError(
                f"parallel.context_parallel_size={cp} cuts every segment into {2 * cp} equal chunks, but segments are "
                f"multiples of data.segment_multiple={segment_multiple} only; set it to a multiple of {2 * cp}"
            )
        if seq_length % (tp * cp):
            raise ConfigError(
                f"parallel.tensor_model_parallel_size={tp} x context_parallel_size={cp} does not divide "
                f"train.seq_length={seq_length}"
            )

    def check_micro_batches(self, micro_batches: int) -> None:
        """Check the number of packs per data-parallel rank and step.

        Raises:
            ConfigError: The interleaved schedule cannot run this number.
        """
        group = self.micro_batch_multiple
        if micro_batches % group:
            raise ConfigError(
                "virtual pipeline stages run micro-batches in groups of "
                f"parallel.pipeline_model_parallel_size={group}, and a data-parallel rank has {micro_batches}: change "
                "train.global_batch_size, or set parallel.virtual_pipeline_model_parallel_size=1"
            )

    @property
    def micro_batch_multiple(self) -> int:
        """Of which the packs per data-parallel rank and step are a multiple: the interleaved schedule needs groups."""
        return self.pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size > 1 else 1

    # --- derived --------------------------------------------------------------------------------------------------

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that work on the same packs."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of model replicas in `world_size` processes."""
        return world_size // self.model_parallel_size

    def data_parallel_rank(self, rank: int, world_size: int) -> int:
        """Return the data-parallel rank of process `rank` among `world_size`."""
        neighbours = self.tensor_model_parallel_size * self.context_parallel_size
        return rank // neighbours % self.data_parallel_size(world_size)

    @property
    def transformer_fields(self) -> dict[str, object]:
        """This layout as fields of megatron-core's TransformerConfig."""
        virtual = self.virtual_pipeline_model_parallel_size > 1
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size if virtual else None,
            "context_parallel_size": self.context_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
            "sequence_parallel": self.sequence_parallel,
            # The interleaved schedule with batched communication, its default, is silently wrong on gloo.
            "overlap_p2p_comm": virtual,
            "batch_p2p_comm": not virtual,
            "batch_p2p_sync": False,  # waits for the device at every transfer; only an old torch needs it
            "deallocate_pipeline_outputs": True,
        }
