"""Experts that are stored fused, as transformers 5 has them in memory, under the names of one tensor per expert.

    mlp.experts.gate_up_proj   [experts, 2 * width, hidden]   gate above up
    mlp.experts.down_proj      [experts, hidden, width]

Some models of other families store the same tensors transposed; multiplied the wrong way they would still be numbers.
So the shapes are compared with the hidden size of the embedding.
"""

from __future__ import annotations

import re

from model.errors import WeightsError
from model.weights.folder import SafetensorsFolder
from model.weights.formats.views import Made, Rearranged, Span, whole_tensor
from model.weights.source import WeightSource

FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?(_scale|_scale_inv)?")
EMBEDDING = "embed_tokens.weight"


def fold_experts(folder: SafetensorsFolder) -> int:
    """See every fused tensor of experts, and its scales, as one matrix. Return the number of fused tensors.

    Raises:
        WeightsError: A tensor has another shape than this format has.
    """
    fused = {name: found for name in folder.names() if (found := FUSED.fullmatch(name))}
    tensors = [name for name, found in fused.items() if not found[3]]
    if not tensors:
        return 0
    embedding = next((name for name in folder.names() if name.endswith(EMBEDDING)), None)
    if embedding is None:
        raise WeightsError(f"{folder.folder} has fused experts, but no embedding whose size their shapes could fit")
    hidden = folder.shape(embedding)[1]
    for name in tensors:
        _check_shape(folder, name, fused[name][2], hidden)
    for name in fused:
        if len(folder.shape(name)) == 3:
            folder.fold(name)
    return len(tensors)


def _check_shape(folder: SafetensorsFolder, name: str, kind: str, hidden: int) -> None:
    shape = folder.shape(name)
    axis = 2 if kind == "gate_up_proj" else 1
    expected = f"[experts, 2 * width, {hidden}]" if kind == "gate_up_proj" else f"[experts, {hidden}, width]"
    if len(shape) == 3 and shape[axis] == hidden and (kind == "down_proj" or shape[1] % 2 == 0):
        return
    transposed = len(shape) == 3 and shape[3 - axis] == hidden
    raise WeightsError(
        f"{folder.folder}: {name} is {list(shape)}, not {expected}"
        + (
            ": the experts are stored transposed, which is not read; save the folder again with save_pretrained of "
            "transformers 5"
            if transposed
            else ""
        )
    )


def separate_experts(folder: SafetensorsFolder, source: WeightSource) -> Rearranged:
    """Return a source with one tensor per expert in the place of the folded ones.

    Args:
        folder: Where `fold_experts` was called.
        source: The same tensors, perhaps scaled.
    """
    tensors = {}
    for name in source.names():
        found = FUSED.fullmatch(name)
        if not found:
            tensors[name] = whole_tensor(source, name)
            continue
        experts, height = folder.matrices(name)
        columns = source.shape(name)[1]
        parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
        rows = height // len(parts)
        for expert in range(experts):
            for number, part in enumerate(parts):
                start = expert * height + number * rows
                span = Span(name, start, start + rows)
                tensors[f"{found[1]}.{expert}.{part}.weight"] = Made((span,), (rows, columns))
    return Rearranged(source, tensors)
