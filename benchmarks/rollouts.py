"""Cost of rollouts on one CPU core: the embedded engine, and transformers' `generate` on the same weights.

    python -m benchmarks.rollouts [--prompts 32] [--group 8] [--tokens 48]

Every prompt is a question with an image of 8 x 8 patches, and every response has all its tokens: nothing ends it early.
The embedded engine reads a prompt and its image once for the group. `generate` gets every prompt `group` times, as it
does where it returns several sequences. The weights are random, in float32.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import cheapest, cost
from benchmarks.training_step import random_sample
from data_pipeline.encoding.batch import EncodedSample
from model.config import GlmvConfig
from model.weights.load import RandomWeights
from model.whole_model import build_whole_model
from rl.engines.embedded import EmbeddedEngine
from rl.engines.forcing import ResponseTokens
from rl.rollouts import Request, RolloutPrompt, Sampling, seed_of
from training.distributed import process_group
from training.optimizer_config import OptimizerConfig
from training.pixel_values import pixel_values
from training.step import TrainStep

PRESETS = ("tiny_dense", "tiny_moe")
LIMIT = 5.0  # CPU-ms per rollout of 48 tokens of tiny_dense
GRID = (8, 8)  # patches


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "engine", "CPU-ms per rollout", "publishing, CPU-ms")
    with process_group():
        for preset in PRESETS:
            for row in measure(preset, options.prompts, options.group, options.tokens, options.rounds):
                table.add_row(preset, *row)
    console = Console(width=100)
    console.print(table)
    console.print(f"limit: {LIMIT} for 48 tokens of {PRESETS[0]}")


def measure(preset: str, prompts: int, group: int, tokens: int, rounds: int) -> list[tuple[str, str, str]]:
    """Return a row per engine."""
    config = GlmvConfig.from_preset(preset)
    model = build_whole_model(config, RandomWeights(config, seed=1))
    trainer = TrainStep([model.train()], OptimizerConfig(), steps=1, seq_length=512)
    engine = EmbeddedEngine(config, ResponseTokens(ends=(), media=(), think_end=-1, forced=()), torch.float32)
    requests = make_requests(config, prompts, group)
    sampling = Sampling(1.0, tokens, tokens, force_answer=False)
    engine.publish(trainer, version=0)
    published = cost(partial(engine.publish, trainer, 0))
    own = cheapest(partial(engine.generate, requests, sampling), rounds)
    theirs = cheapest(partial(generate, engine.module, config, requests, tokens), rounds)
    rollouts = prompts * group
    return [
        ("embedded", f"{1000 * own.cpu / rollouts:.1f}", f"{1000 * published.cpu:.1f}"),
        ("transformers' generate", f"{1000 * theirs.cpu / rollouts:.1f}", ""),
    ]


def make_requests(config: GlmvConfig, prompts: int, group: int) -> list[Request]:
    """Return prompts of one image and random text, of unequal length."""
    requests = []
    for number in range(prompts):
        sample: EncodedSample = random_sample(config, [GRID], 34 + number % 8, np.random.default_rng(number))
        prompt = RolloutPrompt(f"benchmark.tar/{number}", sample, (), (), thinks=False)
        requests.append(Request(prompt, tuple(seed_of(0, 1, prompt.id, place) for place in range(group))))
    return requests


@torch.inference_mode()
def generate(module: Any, config: GlmvConfig, requests: list[Request], tokens: int) -> None:
    """Draw the same number of rollouts with transformers' own loop."""
    samples = [request.prompt.sample for request in requests for _ in request.seeds]
    longest = max(len(sample) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample) :] = torch.from_numpy(sample.input_ids)
        mask[row, longest - len(sample) :] = 1
    module.set_attn_implementation("sdpa")
    module.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.cat([pixel_values(sample) for sample in samples]),
        image_grid_thw=torch.tensor([(1, *grid) for sample in samples for grid in sample.grids]),
        mm_token_type_ids=(ids == config.image_token_id).long(),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        eos_token_id=None,
    )


if __name__ == "__main__":
    main()
