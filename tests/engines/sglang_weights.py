"""Load an export with SGLang's own model, in its own environment: sglang_weights.py FOLDER REPORT.

SGLang skips a tensor whose name it does not know, without a message. All parameters are therefore filled with NaN, and
the tensors given to `load_weights` one by one: what each of them changes must be exactly its values, in order.

REPORT becomes a JSON object: `model` is the class, `tensors` counts them, `values` counts their values, `not_taken` and
`different` list names in the folder, `unfilled` lists parameters of SGLang's model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Imported when SGLang is, and not used to build a model or to load weights: its compiled kernels, and notebooks.
REPLACED = ("sgl_kernel", "IPython")


class StandIn(ModuleType):
    """A module, or anything in it, that can be imported and not used."""

    __path__: list[str] = []  # noqa: RUF012 (a package)

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name)


class StandIns(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in REPLACED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def main(folder: str, report: str) -> None:
    """Write the report of a folder."""
    sys.meta_path.insert(0, StandIns())
    model = build_model(folder, store=f"{report}.store")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    content: dict[str, Any] = {
        "model": type(model).__name__,
        "tensors": 0,
        "values": 0,
        "not_taken": [],
        "different": [],
    }
    for name, tensor in tensors(folder):
        content["tensors"] += 1
        content["values"] += tensor.numel()
        found = loaded_values(model, name, tensor)
        if not found.numel():
            content["not_taken"].append(name)
        elif not torch.equal(found, tensor.flatten().float()):
            content["different"].append(name)
    content["unfilled"] = [name for name, parameter in model.named_parameters() if is_empty(parameter).any()]
    Path(report).write_text(json.dumps(content))


def build_model(folder: str, store: str) -> Any:
    """Build the model as SGLang's own loader does, in one process."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    quantised = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
    dtype = "bfloat16" if quantised else "float32"  # FP8 is not served with float32
    arguments = ServerArgs(model_path=folder, device="cpu", dtype=dtype, attention_backend="torch_native")
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    init_distributed_environment(1, 0, f"file://{store}", local_rank=0, backend="gloo")
    initialize_model_parallel()
    initialize_dp_attention(arguments)
    initialize_moe_config()
    torch.set_default_dtype(getattr(torch, dtype))
    config, load = ModelConfig.from_server_args(arguments), LoadConfig()
    return _initialize_model(config, load, _get_quantization_config(config, load))


def tensors(folder: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a folder."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        yield from load_file(file).items()


def loaded_values(model: Any, name: str, tensor: Tensor) -> Tensor:
    """Load one tensor, and return the values that parameters have got of it."""
    before = empty_places(model)
    model.load_weights([(name, tensor)])
    filled = (
        parameter.float()[place & ~is_empty(parameter)]
        for parameter, place in zip(model.parameters(), before, strict=True)
    )
    return torch.cat([values.detach().flatten() for values in filled])


def empty_places(model: nn.Module) -> list[Tensor]:
    return [is_empty(parameter) for parameter in model.parameters()]


def is_empty(parameter: Tensor) -> Tensor:
    return parameter.float().isnan()  # FP8 has no isnan of its own


if __name__ == "__main__":
    main(*sys.argv[1:])
