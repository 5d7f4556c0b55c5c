"""Adapters of a checkpoint, read by rows: as PEFT's files have them, or added to the weights of their base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.checkpoint import TRAIN_STATE
from model.checkpoint_metadata import ADAPTERS
from model.config import GlmvConfig
from model.errors import CheckpointError, ConfigError
from model.lora_config import LoraConfig
from model.lora_targets import Site, selected_sites
from model.lora_weights import change, peft_names, peft_shapes
from model.weights.source import WeightSource, check_names_and_shapes, some
from model.weights.table import hf_shapes, sizes
from streaming.names import Place
from streaming.stored_parameters import StoredParameters, Wanted

# Rows of a matrix whose change is computed together. Products of other heights could differ in their last bits, and the
# blocks of a conversion have any height: every product has this one, from a multiple of it on, filled up with zeros.
TILE = 64


class StoredAdapters:
    """The adapters of a step folder, saved at any layout.

    Raises:
        CheckpointError: It is damaged, has other adapters than its train_state.json says, or is not safe to read.
    """

    def __init__(self, folder: Path, config: GlmvConfig, lora: LoraConfig) -> None:
        self.config, self.lora = config, lora
        self._size = sizes(config)
        try:
            self.sites = selected_sites(config, lora.targets)
        except ConfigError as error:
            raise CheckpointError(f"{folder / TRAIN_STATE} is of another model: {error}") from None
        shapes = {_key(site, "a"): (lora.rank, site.width) for site in self.sites}
        for site in self.sites:
            shapes |= {_key(site, f"b{block}"): (rows, lora.rank) for block, rows in enumerate(site.rows)}
        wanted = {key: Wanted(shape, Place(key)) for key, shape in shapes.items()}
        self._stored = StoredParameters(folder, wanted, f"{folder / TRAIN_STATE} (lora.rank and lora.targets)")
        if unknown := sorted(key for key in self._stored.keys - shapes.keys() if key.startswith(ADAPTERS)):
            raise CheckpointError(
                f"{folder} holds adapters that the lora.targets of its {TRAIN_STATE} do not name: {some(unknown)}"
            )

    def dtype(self, site: Site) -> torch.dtype:
        """Return the dtype of an adapter."""
        return self._stored.dtype(_key(site, "a"))

    def where(self, site: Site) -> str:
        """Return the files of an adapter."""
        return self._stored.where(_key(site, "a"))

    def a(self, site: Site, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of A [rank, in].

        Raises:
            CheckpointError: A value is NaN or infinite, or a file is damaged.
        """
        return self._stored.rows(_key(site, "a"), start, self.lora.rank if stop is None else stop)

    def b(self, site: Site, start: int, stop: int) -> Tensor:
        """Read rows of B [out, rank], in the order of transformers. Raises CheckpointError as `a`."""
        places = site.transform.places([sum(site.rows)], self._size, 0, start, stop)
        pieces = [piece for place in places for piece in self._rows_of_blocks(site, *place)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _rows_of_blocks(self, site: Site, start: int, stop: int) -> Iterator[Tensor]:
        """Yield rows of the blocks of B, which are one above the other."""
        above = 0
        for block, rows in enumerate(site.rows):
            first, last = max(start, above), min(stop, above + rows)
            if first < last:
                yield self._stored.rows(_key(site, f"b{block}"), first - above, last - above)
            above += rows


def _key(site: Site, factor: str) -> str:
    """Return the name under which a checkpoint has `a` or a block of B."""
    return f"{ADAPTERS}{site.adapter}.{factor}"


# --- PEFT's tensors ---------------------------------------------------------------------------------------------------


class PeftWeights:
    """Adapters by the names of PEFT (model.lora_weights): routed experts share a pair of tensors per parameter."""

    def __init__(self, adapters: StoredAdapters) -> None:
        self._adapters = adapters
        self._shapes = peft_shapes(adapters.config, adapters.lora)
        names = peft_names(adapters.sites)
        self._sites: dict[str, list[Site]] = {name: [] for name in names.values()}
        for site in adapters.sites:
            self._sites[names[site.module]].append(site)  # those of routed experts in the order of the experts

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._adapters.dtype(self._sites_of(name)[0])

    def where(self, name: str) -> str:
        """Return the files of one tensor."""
        return ", ".join(dict.fromkeys(self._adapters.where(site) for site in self._sites_of(name)))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor. Raises CheckpointError as `StoredAdapters.a`."""
        sites = self._sites_of(name)
        if name.endswith(".lora_A.weight"):
            rank = self._adapters.lora.rank
            pieces = [
                self._adapters.a(site, max(0, start - number * rank), min(rank, stop - number * rank))
                for number, site in enumerate(sites)
                if start < (number + 1) * rank and stop > number * rank
            ]
            return torch.cat(pieces)
        return torch.stack([self._adapters.b(site, start, stop) for site in sites], dim=-1).flatten(1)

    def _sites_of(self, name: str) -> list[Site]:
        return self._sites[name.removesuffix(".weight").rpartition(".")[0]]


# --- merged weights ---------------------------------------------------------------------------------------------------


class Adapted(NamedTuple):
    """The adapter of a tensor, and its first row in the adapter's matrix."""

    site: Site
    first_row: int


class MergedWeights:
    """The weights of a base model with adapters added to them, as PEFT's `merge_and_unload`.

    The sum is computed in float32 and rounded to the base model's dtype. Tensors without an adapter are the base
    model's.

    Args:
        base: The base model.
        adapters: The adapters.
        dtype_of: Returns the dtype of a tensor in the base model.

    Raises:
        WeightsError: The base model has other tensors than the model that the adapters are of.
    """

    def __init__(self, base: WeightSource, adapters: StoredAdapters, dtype_of: Callable[[str], torch.dtype]) -> None:
        check_names_and_shapes(base, hf_shapes(adapters.config))
        self._base, self._adapters, self._dtype_of = base, adapters, dtype_of
        self._shapes = hf_shapes(adapters.config)
        self._adapted = {name: adapted for site in adapters.sites for name, adapted in _tensors_of(site)}
        self._last_a: tuple[str, Tensor] | None = None  # the next block of rows needs it again

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._dtype_of(name)

    def where(self, name: str) -> str:
        """Return where one tensor comes from."""
        return self._base.where(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor.

        Raises:
            WeightsError: A value of the base model is bad, or its file is damaged.
            CheckpointError: Likewise, of the adapters.
        """
        weight = self._base.rows(name, start, stop).to(self.dtype(name))
        if name not in self._adapted:
            return weight
        merged = weight.to(torch.float32, copy=True)
        del weight
        self._add(merged, name, start)
        return merged.to(self.dtype(name))

    def _add(self, merged: Tensor, name: str, start: int) -> None:
        """Add what an adapter changes to the rows from `start` on."""
        site, first_row = self._adapted[name]
        stop = start + merged.size(0)
        begin, end = start // TILE * TILE, min(-(-stop // TILE) * TILE, self._shapes[name][0])
        a, b = self._a(site), self._adapters.b(site, first_row + begin, first_row + end)
        for top in range(begin, end, TILE):
            factor = torch.zeros(TILE, b.size(1))
            rows = b[top - begin : top - begin + TILE]
            factor[: rows.size(0)] = rows
            added = change(a, factor, self._adapters.lora.scale)
            first, last = max(start, top), min(stop, top + TILE)
            merged[first - start : last - start] += added[first - top : last - top]

    def _a(self, site: Site) -> Tensor:
        """Return A in float32."""
        if self._last_a is None or self._last_a[0] != site.adapter:
            self._last_a = None  # frees its memory first
            self._last_a = site.adapter, self._adapters.a(site).float()
        return self._last_a[1]


def _tensors_of(site: Site) -> Iterator[tuple[str, Adapted]]:
    """Yield the Hugging Face tensors that an adapter changes."""
    if site.expert is None:
        yield f"{site.module}.weight", Adapted(site, 0)
        return
    experts, _, leaf = site.module.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    first_row = 0
    for part, rows in zip(parts, site.rows, strict=True):
        yield f"{experts}.{site.expert}.{part}.weight", Adapted(site, first_row)
        first_row += rows


def largest_tile(config: GlmvConfig, lora: LoraConfig) -> int:
    """Return the bytes of the most that is merged at a time: rows of the widest tensor, or its A, in float32."""
    return 4 * max(TILE, lora.rank) * max(prod(shape[1:]) for shape in hf_shapes(config).values())
