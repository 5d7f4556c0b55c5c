"""Recognise checkpoints of other trainers, and say how to bring their weights here.

Megatron-Bridge and Megatron-LM write folders `iter_NNNNNNN` of the same format as this project's `state/`, with other
names, beside pickled state. Each of them exports to Hugging Face's format, which is read here.
"""

from __future__ import annotations

from pathlib import Path

TRACKER, RUN_CONFIG = "latest_checkpointed_iteration.txt", "run_config.yaml"
BRIDGE_EXPORT = (
    "./scripts/conversion/convert.sh export --hf-model zai-org/GLM-4.5V --megatron-path ITER_FOLDER --hf-path OUT in "
    "Megatron-Bridge"
)


def how_to_bring(folder: Path) -> str:
    """Return a clause for an error message about a folder of another trainer; empty if it is none."""
    is_tracked = (folder / TRACKER).is_file() or any(folder.glob("iter_*/.metadata"))
    is_distributed = (folder / ".metadata").is_file() and any(folder.glob("*.distcp"))
    if (folder / RUN_CONFIG).is_file() or any(folder.glob(f"iter_*/{RUN_CONFIG}")):
        return f"; it is a checkpoint of Megatron-Bridge, which is not read: export it first, with {BRIDGE_EXPORT}"
    if is_tracked or is_distributed or any(folder.glob("mp_rank_*/model_optim_rng.pt")):
        return (
            "; it is a checkpoint of Megatron-LM or another trainer on Megatron-Core, which is not read: export it to "
            f"a Hugging Face folder with its own tools first, such as {BRIDGE_EXPORT}"
        )
    return ""
