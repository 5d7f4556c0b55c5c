"""Let torchvision be imported beside torch for CPUs; `make` copies this file into .venv-engines, for all its processes.

torchvision's wheel is built against CUDA: its compiled part does not load. Its Python part, which the processors of
transformers and vLLM use, then fails only because two operators are not known. They are defined here when torchvision
is imported, and nothing calls them.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class DefineOperators(MetaPathFinder):
    """Finds nothing, but is asked first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            LIBRARIES.append(Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                LIBRARIES[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


LIBRARIES: list[Any] = []  # operators exist as long as their library does
sys.meta_path.insert(0, DefineOperators())
