"""Describe a GLM-V model, as a Hugging Face `config.json` does.

Two variants are published. They differ only in the decoder:

    variant      published as                   decoder                                         rotary layout
    glm4v_moe    GLM-4.5V, GLM-4.6V             mixture of experts, first layer dense           half-split
    glm4v        GLM-4.1V-9B, GLM-4.6V-Flash    dense, norms around and after each sub-layer    interleaved pairs

The newer model of a variant differs from the older one in its weights, its rope base and length, and in how videos are
sampled and written (`data_pipeline`). GLM-4.6V-Flash may have a `model_type` of its own in its folder, `glm46v`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from model import hf_config
from model.errors import ConfigError
from model.hf_config import (
    ARCHITECTURES,
    FIXED_TEXT,
    FIXED_VISION,
    MOE_KEYS,
    REQUIRED_TEXT,
    VARIANTS,
    VISION_ROPE_THETA,
)

__all__ = ["ARCHITECTURES", "VISION_ROPE_THETA", "ConfigError", "DecoderConfig", "GlmvConfig", "VisionConfig"]

PRESETS = Path(__file__).parent.parent / "configs" / "model"


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its adapter (`vision_config`)."""

    depth: int = 24  # blocks
    hidden_size: int = 1536
    num_heads: int = 12
    intermediate_size: int = 10944  # width of the adapter's MLP
    out_hidden_size: int = 4096  # width of the image embeddings, and of the MLP in every block
    image_size: int = 336  # pixels per side that the table of learned positions was made for
    patch_size: int = 14  # pixels per side
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches per side that become one embedding
    in_channels: int = 3
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_positive("vision_config", self, (f.name for f in fields(self)))
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"vision_config.hidden_size={self.hidden_size} over num_heads={self.num_heads} must give heads whose "
                "size is a multiple of 4 (two axes of rotated pairs)"
            )
        if self.image_size < self.patch_size:
            raise ConfigError(f"vision_config.image_size={self.image_size} is below patch_size={self.patch_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_grid(self) -> int:
        """Side of the square table of learned positions, in patches (24 for 336 pixels)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class DecoderConfig:
    """The language decoder (`text_config`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the MLP in dense layers
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of random weights
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5  # share of head_dim that is rotated
    mrope_section: tuple[int, ...] = (8, 12, 12)  # rotated pairs for time, height, width
    pad_token_id: int = 151329
    eos_token_id: tuple[int, ...] = (151329, 151336, 151338)
    n_routed_experts: int = 0  # 0: the dense variant
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # width of one expert's MLP
    first_k_dense_replace: int = 0  # dense layers before the first one with experts
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("text_config", self, POSITIVE)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text_config.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.partial_rotary_factor > 1:
            raise ConfigError(
                f"text_config.partial_rotary_factor={self.partial_rotary_factor} must be at most 1: it is the share of "
                "head_dim that is rotated"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.rotary_dim:
            raise ConfigError(
                f"text_config.mrope_section={list(self.mrope_section)} must be three numbers that add up to half of "
                f"the rotated dimensions, {self.rotary_dim // 2} (head_dim {self.head_dim} x partial_rotary_factor "
                f"{self.partial_rotary_factor})"
            )
        if self.is_moe:
            self._check_experts()
        elif self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ConfigError(
                f"text_config.head_dim={self.head_dim} must be hidden_size / num_attention_heads = "
                f"{self.hidden_size / self.num_attention_heads:g} in a dense decoder (glm4v): transformers and the "
                "serving engines derive it, and could not load this model"
            )

    def _check_experts(self) -> None:
        _check_positive("text_config", self, ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok"))
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"text_config.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"n_routed_experts={self.n_routed_experts}"
            )
        if not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            raise ConfigError(
                f"text_config.first_k_dense_replace={self.first_k_dense_replace} must be from 0 to "
                f"{self.num_hidden_layers - 1}, so that a layer with experts is left"
            )

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether decoder layer `layer` (from 0) is a mixture of experts."""
        return self.is_moe and layer >= self.first_k_dense_replace


# Fields of DecoderConfig that must be above zero in both variants.
POSITIVE = (
    *REQUIRED_TEXT,
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "rope_theta",
    "partial_rotary_factor",
    "routed_scaling_factor",
)


@dataclass(frozen=True)
class GlmvConfig:
    """A whole model: vision tower, adapter, decoder and the tokens that join them."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int = 151363
    video_token_id: int = 151364
    image_start_token_id: int = 151339
    image_end_token_id: int = 151340
    video_start_token_id: int = 151341
    video_end_token_id: int = 151342
    hf_type: str = field(default="", compare=False)  # `model_type` of the Hugging Face folder; empty: the variant

    def __post_init__(self) -> None:
        if not self.hf_type:
            object.__setattr__(self, "hf_type", self.variant)
        if VARIANTS[self.hf_type] != self.variant:
            raise ConfigError(f"model_type {self.hf_type!r} has another decoder than a {self.variant}")
        if self.vision.out_hidden_size != self.decoder.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size={self.vision.out_hidden_size} must equal "
                f"text_config.hidden_size={self.decoder.hidden_size}: image embeddings replace token embeddings"
            )

    @property
    def variant(self) -> str:
        """What is computed, by the Hugging Face name of its decoder: "glm4v_moe" or "glm4v"."""
        return "glm4v_moe" if self.decoder.is_moe else "glm4v"

    @property
    def token_ids(self) -> dict[str, int]:
        """Ids of the special tokens that the model gives a meaning to, by their text."""
        return {
            "<|image|>": self.image_token_id,
            "<|video|>": self.video_token_id,
            "<|begin_of_image|>": self.image_start_token_id,
            "<|end_of_image|>": self.image_end_token_id,
            "<|begin_of_video|>": self.video_start_token_id,
            "<|end_of_video|>": self.video_end_token_id,
        }

    @classmethod
    def from_preset(cls, name: str) -> GlmvConfig:
        """Read `configs/model/NAME.yaml`, whose content is laid out as a Hugging Face `config.json`.

        Raises:
            ConfigError: there is no such preset.
        """
        path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
            raise ConfigError(f"model.preset={name!r} is unknown; choose one of: {known}")
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        return cls.from_hf_dict(content, source=str(path))

    @classmethod
    def from_hf(cls, folder: str | Path) -> GlmvConfig:
        """Read the `config.json` of a Hugging Face folder.

        Raises:
            ConfigError: it is missing or damaged, of another architecture, or asks for something that is not supported.
        """
        return cls.from_hf_dict(hf_config.read_config(Path(folder)), source=str(Path(folder) / hf_config.CONFIG_FILE))

    @classmethod
    def from_hf_dict(cls, content: dict[str, Any], source: str) -> GlmvConfig:
        """Build from the content of a `config.json`, in the spelling of transformers 4 or 5.

        Args:
            content: the JSON object.
            source: where it is from, for error messages.

        Raises:
            ConfigError: as for `from_hf`.
        """
        hf_type, variant = hf_config.model_type_of(content, source), hf_config.variant_of(content, source)
        token_ids = _typed(cls, hf_config.top_fields(content, source), source)
        vision = _typed(VisionConfig, hf_config.vision_fields(content, source), f"{source}: vision_config")
        text = _typed(DecoderConfig, hf_config.text_fields(content, source), f"{source}: text_config")
        if variant == "glm4v_moe" and text["n_routed_experts"] < 2:
            raise ConfigError(f"{source}: text_config.n_routed_experts={text['n_routed_experts']} must be at least 2")
        text.setdefault("head_dim", text["hidden_size"] // max(1, text["num_attention_heads"]))
        try:
            return cls(vision=VisionConfig(**vision), decoder=DecoderConfig(**text), **token_ids, hf_type=hf_type)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a `config.json` as the published files spell it.

        transformers 4 and 5, vLLM and SGLang all read it.
        """
        text = {key: _plain(value) for key, value in asdict(self.decoder).items()}
        fixed = dict(FIXED_TEXT)
        if not self.decoder.is_moe:
            for key in (*MOE_KEYS, "use_qk_norm"):
                text.pop(key, None)
                fixed.pop(key, None)
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": text.pop("mrope_section")}
        return {
            "architectures": [ARCHITECTURES[self.hf_type]],
            "model_type": self.hf_type,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_token_id")},
            "tie_word_embeddings": False,
            "text_config": {"model_type": f"{self.variant}_text", **text, **fixed},
            "vision_config": {
                "model_type": f"{self.variant}_vision",
                **asdict(self.vision),
                **FIXED_VISION,
                "initializer_range": self.decoder.initializer_range,
            },
        }


def _check_positive(where: str, config: Any, names: Iterable[str]) -> None:
    for name in names:
        if not 0 < getattr(config, name) < inf:
            raise ConfigError(f"{where}.{name}={getattr(config, name)} must be above zero and finite")


def _typed(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values that are fields of `cls`, in the types of the fields: int, float or a tuple of int."""
    typed: dict[str, Any] = {}
    for key, wanted in get_type_hints(cls).items():
        value = values.get(key)
        if wanted is int and type(value) is int:
            typed[key] = value
        elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
            typed[key] = float(value)
        elif wanted == tuple[int, ...] and type(value) is list and all(type(item) is int for item in value):
            typed[key] = tuple(value)
        elif wanted == tuple[int, ...] and type(value) is int:
            typed[key] = (value,)
        elif value is not None:
            kind = {int: "an integer", float: "a number"}.get(wanted, "a list of integers")
            raise ConfigError(f"{where}.{key}={value!r} must be {kind}")
    return typed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
