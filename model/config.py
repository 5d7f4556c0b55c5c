"""What a GLM-V model is made of, read from and written to a Hugging Face `config.json`.

Two variants are published. They differ in the decoder alone:

    variant      published as   decoder                                         rotary layout
    glm4v_moe    GLM-4.5V       mixture of experts, first layer dense           half-split
    glm4v        GLM-4.1V-9B    dense, norms around and after each sub-layer    interleaved pairs
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PRESETS = Path(__file__).parent.parent / "configs" / "model"

ARCHITECTURES = {
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
}

# Keys of a text_config that only the mixture-of-experts variant has.
MOE_KEYS = (
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace",
    "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob",
)  # fmt: skip

# Values that this implementation computes with and does not vary; a config.json that asks for another is refused.
FIXED_TEXT = {"hidden_act": "silu", "attention_bias": True, "attention_dropout": 0.0, "tie_word_embeddings": False,
              "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "use_qk_norm": False}  # fmt: skip
FIXED_VISION = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "in_channels": 3,
                "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}  # fmt: skip
VISION_ROPE_THETA = 10000.0


class ConfigError(ValueError):
    """A configuration that cannot be right; the message names the option and the mend."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer and its adapter (`vision_config`).

    A block's MLP is `out_hidden_size` wide; `intermediate_size` is the width of the adapter's.
    """

    depth: int = 24
    hidden_size: int = 1536
    num_heads: int = 12
    intermediate_size: int = 10944
    out_hidden_size: int = 4096
    image_size: int = 336
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"vision_config.hidden_size={self.hidden_size} over num_heads={self.num_heads} must give heads whose "
                "size is a multiple of 4 (two axes of rotated pairs)"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_grid(self) -> int:
        """Side of the square table of learned positions, in patches (24 for 336 pixels)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class DecoderConfig:
    """The language decoder (`text_config`). `n_routed_experts == 0` is the dense variant."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 65536
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    mrope_section: tuple[int, ...] = (8, 12, 12)
    pad_token_id: int = 151329
    eos_token_id: tuple[int, ...] = (151329, 151336, 151338)
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text_config.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != self.rotary_dim:
            raise ConfigError(
                f"text_config.mrope_section={list(self.mrope_section)} must add up to half of the rotated "
                f"dimensions, {self.rotary_dim // 2} (head_dim {self.head_dim} x partial_rotary_factor "
                f"{self.partial_rotary_factor})"
            )

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts."""
        return self.is_moe and layer >= self.first_k_dense_replace


@dataclass(frozen=True)
class GlmvConfig:
    """A whole model: vision tower, adapter, decoder and the tokens that join them."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    image_token_id: int = 151363
    video_token_id: int = 151364
    image_start_token_id: int = 151339
    image_end_token_id: int = 151340
    video_start_token_id: int = 151341
    video_end_token_id: int = 151342

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.decoder.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size={self.vision.out_hidden_size} must equal "
                f"text_config.hidden_size={self.decoder.hidden_size}: "
                "image embeddings take the place of token embeddings"
            )

    @property
    def variant(self) -> str:
        """Hugging Face `model_type`: "glm4v_moe" or "glm4v"."""
        return "glm4v_moe" if self.decoder.is_moe else "glm4v"

    @property
    def token_ids(self) -> dict[str, int]:
        """The special tokens that the model gives a meaning to, by their text."""
        return {
            "<|image|>": self.image_token_id,
            "<|video|>": self.video_token_id,
            "<|begin_of_image|>": self.image_start_token_id,
            "<|end_of_image|>": self.image_end_token_id,
            "<|begin_of_video|>": self.video_start_token_id,
            "<|end_of_video|>": self.video_end_token_id,
        }

    # --- presets --------------------------------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str) -> GlmvConfig:
        """Read `configs/model/NAME.yaml`, whose content is laid out as a Hugging Face `config.json`."""
        path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
            raise ConfigError(f"model.preset={name!r} is unknown; choose one of: {known}")
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        return cls.from_hf_dict(content, source=str(path))

    # --- Hugging Face ---------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, folder: str | Path) -> GlmvConfig:
        """Read the `config.json` of a Hugging Face folder. Raises ConfigError for another architecture."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no config.json: it is not a Hugging Face model folder")
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        return cls.from_hf_dict(content, source=str(path))

    @classmethod
    def from_hf_dict(cls, content: dict[str, Any], source: str) -> GlmvConfig:
        """Build from the content of a `config.json`, in the spelling of transformers 4 or 5.

        transformers 4 (and the published files) keep `rope_theta`, `partial_rotary_factor` and
        `rope_scaling.mrope_section` beside the other keys; transformers 5 gathers them in `rope_parameters`.
        """
        model_type = content.get("model_type") if isinstance(content, dict) else None
        if model_type not in ARCHITECTURES:
            raise ConfigError(
                f"{source}: model_type {model_type!r} is not a GLM-V model; "
                f"accepted: {', '.join(f'{k} ({v})' for k, v in ARCHITECTURES.items())}"
            )
        text, vision = dict(content.get("text_config") or {}), dict(content.get("vision_config") or {})
        if not text or not vision:
            raise ConfigError(f"{source}: text_config and vision_config must both be present")
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if missing := [key for key in needed if key not in text]:
            raise ConfigError(f"{source}: text_config lacks {', '.join(missing)}")
        _refuse_other_values(text, FIXED_TEXT, f"{source}: text_config")
        _refuse_other_values(vision, FIXED_VISION, f"{source}: vision_config")

        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        for key in ("rope_theta", "partial_rotary_factor", "mrope_section"):
            if key in rope:
                text[key] = rope[key]
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(f"{source}: rope_type {rope_type!r} is not supported; GLM-V uses 'default'")
        text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
        if isinstance(text.get("eos_token_id"), int):
            text["eos_token_id"] = [text["eos_token_id"]]
        if model_type == "glm4v":
            text = {key: value for key, value in text.items() if key not in MOE_KEYS}
        elif missing := [key for key in MOE_KEYS[:6] if key not in text]:
            raise ConfigError(f"{source}: text_config lacks {', '.join(missing)}")

        top = {f.name: content[f.name] for f in fields(cls) if f.name.endswith("_token_id") and f.name in content}
        return cls(vision=_pick(VisionConfig, vision), decoder=_pick(DecoderConfig, text), **top)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json`, in the published files' spelling, which transformers 4 and 5, vLLM and
        SGLang all read."""
        text = {key: _plain(value) for key, value in asdict(self.decoder).items()}
        if not self.decoder.is_moe:
            for key in MOE_KEYS:
                text.pop(key, None)
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": text.pop("mrope_section")}
        fixed = {k: v for k, v in FIXED_TEXT.items() if self.decoder.is_moe or k not in (*MOE_KEYS, "use_qk_norm")}
        return {
            "architectures": [ARCHITECTURES[self.variant]],
            "model_type": self.variant,
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


def _refuse_other_values(found: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    for key, value in fixed.items():
        if key in found and found[key] != value:
            raise ConfigError(f"{where}.{key}={found[key]!r} is not supported: GLM-V models have {value!r}")


def _pick(cls: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known and v is not None})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
