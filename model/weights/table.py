"""The table of weight names: what each parameter is called in this model and in a Hugging Face folder.

A row has the parameter's name here, the transform, and pairs of a name in the folder and its shape. Import, export, the
check of names and shapes, and random initialisation all read these rows; nothing else knows a Hugging Face name.

`{L}` is a layer and `{E}` an expert, both counted over the whole model. A shape is written in the named sizes of
`sizes(config)`. Most rows copy (COPY); the other transforms are:

QKV         query, key and value of a layer become one matrix. Its rows are stored per key-value group, as megatron-core
            splits it over tensor ranks: 4 queries on 2 groups give q0 q1 k0 v0 | q2 q3 k1 v1, where each symbol stands
            for head_dim rows. Biases likewise.
GATE_UP     the gate and the up projection are stacked, gate first. A tensor rank takes its share of EACH half.
FUSED_UP    the same matrix, which is already stacked in the folder (GLM-4.1V's decoder).
VISION_QKV  the vision tower's fused matrix is [q, k, v][head][head_dim] in the folder and [head][q, k, v][head_dim]
            here: QKV with one query per group.

Shapes and names are those of the published checkpoints, and of `save_pretrained` of transformers'
`Glm4vMoeForConditionalGeneration` and `Glm4vForConditionalGeneration`: one tensor per expert, although transformers
keeps them fused in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from model.config import GlmvConfig
from model.weights.transforms import COPY, FUSED_UP, GATE_UP, QKV, VISION_QKV, Piece, Transform

# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table, with placeholders for layer and expert."""

    name: str  # of the parameter in this model
    transform: Transform
    hf: tuple[tuple[str, str], ...]  # names in the folder, and their shapes in named sizes


def row(name: str, transform: Transform, *hf: tuple[str, str]) -> Row:
    """Return a row, with its tensors of the folder as arguments."""
    return Row(name, transform, hf)


def sizes(config: GlmvConfig) -> dict[str, int]:
    """Return the named sizes that shapes and transforms of the table use."""
    text, vision = config.decoder, config.vision
    return {
        "vocab": text.vocab_size,
        "hidden": text.hidden_size,
        "q": text.num_attention_heads * text.head_dim,
        "kv": text.num_key_value_heads * text.head_dim,
        "groups": text.num_key_value_heads,
        "ffn": text.intermediate_size,
        "2ffn": 2 * text.intermediate_size,
        "expert": text.moe_intermediate_size,
        "experts": text.n_routed_experts,
        "shared": text.moe_intermediate_size * text.n_shared_experts,
        "width": vision.hidden_size,
        "3width": 3 * vision.hidden_size,
        "vision_heads": vision.num_heads,
        "block": vision.out_hidden_size,
        "out": vision.out_hidden_size,
        "merger": vision.intermediate_size,
        "positions": vision.position_grid**2,
        "rgb": vision.in_channels,
        "frames": vision.temporal_patch_size,
        "patch": vision.patch_size,
        "merge": vision.spatial_merge_size,
    }


L, T = "language_model.decoder.layers.{L}.", "model.language_model.layers.{L}."

EMBEDDING = (
    row(
        "language_model.embedding.word_embeddings.weight",
        COPY,
        ("model.language_model.embed_tokens.weight", "vocab hidden"),
    ),
)

ATTENTION = (
    row(L + "input_layernorm.weight", COPY, (T + "input_layernorm.weight", "hidden")),
    row(
        L + "self_attention.linear_qkv.weight",
        QKV,
        (T + "self_attn.q_proj.weight", "q hidden"),
        (T + "self_attn.k_proj.weight", "kv hidden"),
        (T + "self_attn.v_proj.weight", "kv hidden"),
    ),
    row(
        L + "self_attention.linear_qkv.bias",
        QKV,
        (T + "self_attn.q_proj.bias", "q"),
        (T + "self_attn.k_proj.bias", "kv"),
        (T + "self_attn.v_proj.bias", "kv"),
    ),
    row(L + "self_attention.linear_proj.weight", COPY, (T + "self_attn.o_proj.weight", "hidden q")),
    row(L + "pre_mlp_layernorm.weight", COPY, (T + "post_attention_layernorm.weight", "hidden")),
)

# GLM-4.1V norms after each sub-layer too. "post_attention_layernorm" above is, in both models, the norm BEFORE the MLP.
SANDWICH_NORMS = (
    row(L + "self_attn_bda.norm.weight", COPY, (T + "post_self_attn_layernorm.weight", "hidden")),
    row(L + "mlp_bda.norm.weight", COPY, (T + "post_mlp_layernorm.weight", "hidden")),
)

FUSED_MLP = (
    row(L + "mlp.linear_fc1.weight", FUSED_UP, (T + "mlp.gate_up_proj.weight", "2ffn hidden")),
    row(L + "mlp.linear_fc2.weight", COPY, (T + "mlp.down_proj.weight", "hidden ffn")),
)

DENSE_MLP = (
    row(
        L + "mlp.linear_fc1.weight",
        GATE_UP,
        (T + "mlp.gate_proj.weight", "ffn hidden"),
        (T + "mlp.up_proj.weight", "ffn hidden"),
    ),
    row(L + "mlp.linear_fc2.weight", COPY, (T + "mlp.down_proj.weight", "hidden ffn")),
)

MOE_MLP = (
    row(L + "mlp.router.weight", COPY, (T + "mlp.gate.weight", "experts hidden")),
    row(L + "mlp.router.expert_bias", COPY, (T + "mlp.gate.e_score_correction_bias", "experts")),
    row(
        L + "mlp.shared_experts.linear_fc1.weight",
        GATE_UP,
        (T + "mlp.shared_experts.gate_proj.weight", "shared hidden"),
        (T + "mlp.shared_experts.up_proj.weight", "shared hidden"),
    ),
    row(L + "mlp.shared_experts.linear_fc2.weight", COPY, (T + "mlp.shared_experts.down_proj.weight", "hidden shared")),
)

EXPERT = (
    row(
        L + "mlp.experts.local_experts.{E}.linear_fc1.weight",
        GATE_UP,
        (T + "mlp.experts.{E}.gate_proj.weight", "expert hidden"),
        (T + "mlp.experts.{E}.up_proj.weight", "expert hidden"),
    ),
    row(
        L + "mlp.experts.local_experts.{E}.linear_fc2.weight",
        COPY,
        (T + "mlp.experts.{E}.down_proj.weight", "hidden expert"),
    ),
)

HEAD = (
    row("language_model.decoder.final_layernorm.weight", COPY, ("model.language_model.norm.weight", "hidden")),
    row("language_model.output_layer.weight", COPY, ("lm_head.weight", "vocab hidden")),
)

TOWER_START = (
    row(
        "vision_model.patch_embed.weight",
        COPY,
        ("model.visual.patch_embed.proj.weight", "width rgb frames patch patch"),
    ),
    row("vision_model.patch_embed.bias", COPY, ("model.visual.patch_embed.proj.bias", "width")),
    row("vision_model.post_conv_layernorm.weight", COPY, ("model.visual.post_conv_layernorm.weight", "width")),
    row(
        "vision_model.position_embedding.weight",
        COPY,
        ("model.visual.embeddings.position_embedding.weight", "positions width"),
    ),
)

B, V = "vision_model.blocks.layers.{L}.", "model.visual.blocks.{L}."

VISION_BLOCK = (
    row(B + "input_layernorm.weight", COPY, (V + "norm1.weight", "width")),
    row(B + "self_attention.linear_qkv.weight", VISION_QKV, (V + "attn.qkv.weight", "3width width")),
    row(B + "self_attention.linear_proj.weight", COPY, (V + "attn.proj.weight", "width width")),
    row(B + "pre_mlp_layernorm.weight", COPY, (V + "norm2.weight", "width")),
    row(
        B + "mlp.linear_fc1.weight",
        GATE_UP,
        (V + "mlp.gate_proj.weight", "block width"),
        (V + "mlp.up_proj.weight", "block width"),
    ),
    row(B + "mlp.linear_fc2.weight", COPY, (V + "mlp.down_proj.weight", "width block")),
)

TOWER_END = (
    row("vision_model.blocks.final_layernorm.weight", COPY, ("model.visual.post_layernorm.weight", "width")),
    row("vision_model.downsample.weight", COPY, ("model.visual.downsample.weight", "out width merge merge")),
    row("vision_model.downsample.bias", COPY, ("model.visual.downsample.bias", "out")),
)

ADAPTER = (
    row("adapter.proj.weight", COPY, ("model.visual.merger.proj.weight", "out out")),
    row("adapter.norm.weight", COPY, ("model.visual.merger.post_projection_norm.weight", "out")),
    row("adapter.norm.bias", COPY, ("model.visual.merger.post_projection_norm.bias", "out")),
    row(
        "adapter.mlp.linear_fc1.weight",
        GATE_UP,
        ("model.visual.merger.gate_proj.weight", "merger out"),
        ("model.visual.merger.up_proj.weight", "merger out"),
    ),
    row("adapter.mlp.linear_fc2.weight", COPY, ("model.visual.merger.down_proj.weight", "out merger")),
)


# --- the table for one model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model and the tensors of the folder that make it: a row without placeholders."""

    name: str
    transform: Transform
    hf: dict[str, tuple[int, ...]]  # names in the folder, and their shapes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        shapes = list(self.hf.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def hf_rows(self) -> list[int]:
        """Rows of each tensor of the folder."""
        return [shape[0] for shape in self.hf.values()]

    def pieces(self, size: Mapping[str, int], start: int, stop: int) -> Iterator[Piece]:
        """Yield what makes the rows [start, stop) of the parameter, in their order."""
        return self.transform.pieces(self.hf_rows, size, start, stop)


def weights(config: GlmvConfig) -> Iterator[Weight]:
    """Yield every parameter of the whole model, in the order in which an export writes them."""
    size = sizes(config)

    def fill(rows: Sequence[Row], **numbers: int) -> Iterator[Weight]:
        for each in rows:
            hf = {name.format(**numbers): tuple(size[word] for word in shape.split()) for name, shape in each.hf}
            yield Weight(each.name.format(**numbers), each.transform, hf)

    yield from fill(EMBEDDING)
    for layer in range(config.decoder.num_hidden_layers):
        yield from fill(ATTENTION, L=layer)
        if not config.decoder.is_moe:
            yield from fill(SANDWICH_NORMS + FUSED_MLP, L=layer)
        elif not config.decoder.is_moe_layer(layer):
            yield from fill(DENSE_MLP, L=layer)
        else:
            yield from fill(MOE_MLP, L=layer)
            for expert in range(config.decoder.n_routed_experts):
                yield from fill(EXPERT, L=layer, E=expert)
    yield from fill(HEAD)
    yield from fill(TOWER_START)
    for layer in range(config.vision.depth):
        yield from fill(VISION_BLOCK, L=layer)
    yield from fill(TOWER_END + ADAPTER)


def hf_shapes(config: GlmvConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in the model's Hugging Face folder."""
    return {name: shape for weight in weights(config) for name, shape in weight.hf.items()}
