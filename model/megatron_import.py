"""Prepare megatron-core for this machine when it is first imported, by any module.

Until then nothing of it is imported, nor is torch: `--help` and most errors in a configuration come within a second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MEGATRON = "megatron.core"


def prepare_megatron_when_imported() -> None:
    """Prepare it before and after its first import; at once where it is imported already."""
    if MEGATRON in sys.modules:
        _before()
        _after()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds megatron-core as the other finders do, and replaces its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MEGATRON:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (spec for finder in others if (spec := finder.find_spec(fullname, path, target)))
        spec = next(found, None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Prepares megatron-core around the work of its own loader."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._own  # what asks the module for its source needs that one
        _before()
        self._own.exec_module(module)
        _after()


def _before() -> None:
    from model.cpu import hide_transformer_engine_without_cuda, prepare_torch_without_cuda
    from model.installed import refuse_broken_installations

    hide_transformer_engine_without_cuda()
    refuse_broken_installations()
    prepare_torch_without_cuda()


def _after() -> None:
    from model.cpu import (
        complete_megatron_without_apex,
        complete_megatron_without_transformer_engine,
        let_megatron_run_without_cuda,
    )

    let_megatron_run_without_cuda()
    complete_megatron_without_transformer_engine()
    complete_megatron_without_apex()
