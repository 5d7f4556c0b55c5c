"""What FP8 kernels need: which matrices they compute, of which sizes, for how many tokens, and on which GPUs.

megatron-core 0.16.1 checks none of it. Transformer Engine stops in the middle of the first step, and where it is not
installed, megatron-core computes without FP8.

Sizes: a matrix product in FP8 needs every dimension that it sums over, or that its operands are stored along, to be a
multiple of 16, or 32 with mxfp8. In the forward pass and the gradients of inputs and weights, these are both dimensions
of the matrix on a tensor rank, and the rank's tokens. Routed experts get their tokens padded by Transformer Engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import GlmvConfig
from model.errors import ConfigError
from model.fp8 import Fp8Config
from model.parallel import ParallelConfig
from model.weights.table import weights

LINEAR = re.compile(r"\.linear_(qkv|proj|fc1|fc2)\.weight$")
SPLITS_COLUMNS = re.compile(r"\.linear_(proj|fc2)\.weight$")
DECODER_LAYER = re.compile(r"^language_model\.decoder\.layers\.(\d+)\.")
BLOCK = 128  # values that share a scale of blockwise


@dataclass(frozen=True)
class Matrix:
    """A weight that FP8 kernels multiply with, as one tensor rank holds it."""

    name: str
    rows: int
    columns: int
    ranks: int  # tensor ranks that share it
    split_by: str  # key of the parallel size that splits it


def is_quantised(name: str, fp8: Fp8Config, layers: int) -> bool:
    """Return whether a parameter's matrix product is computed in FP8.

    Args:
        name: Its canonical name.
        fp8: The recipe.
        layers: Number of decoder layers.
    """
    if not fp8.enabled or not LINEAR.search(name):
        return False
    if layer := DECODER_LAYER.match(name):
        return fp8.covers_layer(int(layer[1]), layers)
    return fp8.vision  # all other linear layers of this kind belong to the tower and the adapter


def quantised_matrices(fp8: Fp8Config, model: GlmvConfig, parallel: ParallelConfig) -> Iterator[Matrix]:
    """Yield the matrices that are multiplied with in FP8, as a tensor rank holds them."""
    for weight in weights(model):
        if is_quantised(weight.name, fp8, model.decoder.num_hidden_layers):
            shapes = list(weight.hf.values())
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
            ranks, key = 1, "tensor_model_parallel_size"
            if ".experts." in weight.name:
                ranks, key = parallel.expert_tensor_parallel_size, "expert_tensor_parallel_size"
            elif DECODER_LAYER.match(weight.name) or parallel.vision == "tensor":
                ranks = parallel.tensor_model_parallel_size
            if SPLITS_COLUMNS.search(weight.name):
                yield Matrix(weight.name, rows, columns // ranks, ranks, key)
            else:
                yield Matrix(weight.name, rows // ranks, columns, ranks, key)


# --- sizes ------------------------------------------------------------------------------------------------------------


def check_sizes(fp8: Fp8Config, model: GlmvConfig, parallel: ParallelConfig, seq_length: int) -> None:
    """Check layers, matrices and tokens against what the kernels take.

    Args:
        fp8: The recipe.
        model: The model.
        parallel: Its layout, which is possible without FP8.
        seq_length: Tokens per pack.

    Raises:
        ConfigError: A size does not fit; the message names it, and what to change.
    """
    check_layers(fp8, model, parallel.pipeline_model_parallel_size)
    for matrix in quantised_matrices(fp8, model, parallel):
        _check_matrix(fp8, model, matrix)
    if parallel.sequence_parallel and fp8.recipe == "blockwise" and model.decoder.hidden_size % BLOCK:
        raise ConfigError(
            f"fp8.recipe=blockwise gathers blocks of {BLOCK} values under parallel.sequence_parallel, and the model's "
            f"hidden_size {model.decoder.hidden_size} is no multiple of it; set fp8.recipe=tensorwise"
        )
    check_tokens(fp8, parallel, seq_length)


def check_layers(fp8: Fp8Config, model: GlmvConfig, pipeline_size: int) -> None:
    """Check that some decoder layer is left in FP8, and that megatron-core takes the number of layers that are not.

    Raises:
        ConfigError: it is not so.
    """
    kept, layers = fp8.first_last_layers_bf16, model.decoder.num_hidden_layers
    if 2 * kept >= layers:
        raise ConfigError(
            f"fp8.first_last_layers_bf16={kept} leaves none of the {layers} decoder layers in FP8; set it below "
            f"{(layers + 1) // 2}, or fp8.recipe=none"
        )
    if kept > layers // pipeline_size:
        raise ConfigError(
            f"fp8.first_last_layers_bf16={kept} is more than the {layers // pipeline_size} layers of a pipeline stage "
            f"(parallel.pipeline_model_parallel_size={pipeline_size}); set it to that number, or below"
        )


def _check_matrix(fp8: Fp8Config, model: GlmvConfig, matrix: Matrix) -> None:
    wrong = next((size for size in (matrix.rows, matrix.columns) if size % fp8.multiple), None)
    if wrong is None:
        return
    fixes = []
    if matrix.ranks > 1:
        fixes.append(f"a smaller parallel.{matrix.split_by} (now {matrix.ranks})")
    if fp8.recipe == "mxfp8":
        fixes.append("another fp8.recipe (multiples of 16)")
    layer = DECODER_LAYER.match(matrix.name)
    if layer is None:
        fixes.append("fp8.vision=false")
    elif fp8.recipe != "delayed":
        from_end = min(int(layer[1]), model.decoder.num_hidden_layers - 1 - int(layer[1]))
        if from_end < model.decoder.first_k_dense_replace:
            fixes.append(f"fp8.first_last_layers_bf16={from_end + 1}")
    raise ConfigError(
        f"fp8.recipe={fp8.recipe} needs matrices whose sizes on a tensor rank are multiples of {fp8.multiple}, and "
        f"{matrix.name} is {matrix.rows} x {matrix.columns} there; set {' or '.join(fixes) or 'fp8.recipe=none'}"
    )


def token_multiple(fp8: Fp8Config, parallel: ParallelConfig) -> int:
    """Return what the tokens of a pack must be a multiple of, so that every rank's share fits the kernels."""
    shares = parallel.context_parallel_size
    if not fp8.enabled:
        return shares * parallel.tensor_model_parallel_size
    if parallel.sequence_parallel:
        shares *= parallel.tensor_model_parallel_size
    of_a_rank = BLOCK if fp8.recipe == "blockwise" and parallel.sequence_parallel else fp8.multiple
    return of_a_rank * shares


def check_tokens(fp8: Fp8Config, parallel: ParallelConfig, seq_length: int) -> None:
    """Check the tokens of a pack.

    Raises:
        ConfigError: A rank's share of them does not fit the kernels.
    """
    multiple = token_multiple(fp8, parallel)
    if seq_length % multiple:
        fitting = max(multiple, seq_length // multiple * multiple)
        raise ConfigError(
            f"train.seq_length={seq_length} must be a multiple of {multiple} with fp8.recipe={fp8.recipe}, so that the "
            f"tokens of every tensor and context rank fit its kernels; set it to {fitting}"
        )


# --- machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU and the CUDA that torch was built with."""

    capability: tuple[int, int]
    cuda: tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """What a recipe needs of a machine. Source: Transformer Engine 2.11, transformer_engine/pytorch/quantization.py."""

    first: tuple[int, int]  # compute capability
    below: tuple[int, int] = (1000, 0)  # compute capability
    cuda: tuple[int, int] = (0, 0)
    fix: str = "set fp8.recipe=none and train.precision=bf16"


NEEDS = {
    "tensorwise": Needs((8, 9), cuda=(12, 1)),
    "delayed": Needs((8, 9), cuda=(12, 1)),
    "blockwise": Needs((9, 0), cuda=(12, 9), fix="set fp8.recipe=tensorwise"),
    "mxfp8": Needs((10, 0), below=(12, 0), fix="set fp8.recipe=blockwise (Hopper) or tensorwise"),
}


def check_gpu(fp8: Fp8Config, gpu: Gpu) -> None:
    """Check that a GPU has the kernels of the recipe.

    Raises:
        ConfigError: it does not.
    """
    needs = NEEDS[fp8.recipe]
    if not needs.first <= gpu.capability < needs.below:
        until = f" and below {_version(needs.below)}" if needs.below < (1000, 0) else ""
        raise ConfigError(
            f"fp8.recipe={fp8.recipe} needs a GPU of compute capability {_version(needs.first)}{until}, and this one "
            f"has {_version(gpu.capability)}; {needs.fix}"
        )
    if gpu.cuda < needs.cuda:
        raise ConfigError(
            f"fp8.recipe={fp8.recipe} needs a torch built with CUDA {_version(needs.cuda)} or above, and this one has "
            f"{_version(gpu.cuda)}; install another torch, or {needs.fix}"
        )


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
