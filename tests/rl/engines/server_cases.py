"""An engine over stand-ins of servers, and prompts of text for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rl.engines.servers
from common.files import write_json
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from rl.engines.forcing import ResponseTokens
from rl.engines.server import Expected
from rl.engines.servers import ServersEngine
from rl.engines.servers_config import ServersConfig
from rl.errors import EngineError
from rl.rollouts import Request, RolloutPrompt, Sampling
from tests.model.layout_cases import make_trainer
from tests.reference import small_config

QUICK: dict[str, Any] = {"concurrency": 4, "request_deadline": 2.0, "deadline": 60.0, "health_seconds": 2.0}
SAMPLING = Sampling(temperature=1.0, max_thinking_tokens=8, max_answer_tokens=8, force_answer=True)


def text_prompt(name: str, *, thinks: bool = False) -> RolloutPrompt:
    """A prompt of text, whose tokens no server changes."""
    ids = np.array([1, 2, 7, *(60 + ord(letter) for letter in name), 8])
    none = torch.empty(0, 588, dtype=torch.uint8)
    sample = EncodedSample(name, "rl", ids, np.zeros(len(ids), bool), np.tile(np.arange(len(ids)), (3, 1)), none)
    return RolloutPrompt(name, sample, (), (), thinks)


def requests_of(names: Sequence[str], group: int = 4, *, thinks: bool = False) -> list[Request]:
    return [
        Request(text_prompt(name, thinks=thinks), tuple(1000 * n + number for number in range(group)))
        for n, name in enumerate(names)
    ]


def make_engine(
    addresses: Sequence[str],
    tokenizer: Path,
    folder: Path,
    *,
    temperature: float = 1.0,
    on_wait: Callable[[], None] = lambda: None,
    **options: Any,
) -> ServersEngine:
    """Return an engine for stand-ins at addresses; `options` are keys of rollout."""
    model, glm_tokenizer = small_config("glm4v_moe"), GlmTokenizer(tokenizer)
    return ServersEngine(
        "vllm",
        ServersConfig(addresses=list(addresses), **{**QUICK, **options}),
        Expected(model, glm_tokenizer, 2048, temperature),
        ResponseTokens.of(model, glm_tokenizer, "glm45v"),
        folder,
        hf_files=lambda target: write_json(target / "config.json", model.to_hf()),
        on_wait=on_wait,
    )


def draw_on_all(address: str, tokenizer: str, folder: str, policy: str) -> dict[str, Any]:
    """Draw rollouts from a server, on every process: what is drawn, or the error, and how often the process waited."""
    trainer = make_trainer("glm4v_moe", policy, "DP2")
    waits = 0

    def count() -> None:
        nonlocal waits
        waits += 1

    rl.engines.servers.BEAT_SECONDS = 0.3
    engine = make_engine([address], Path(tokenizer), Path(folder), on_wait=count)
    engine.publish(trainer, 7)
    try:
        rollouts = engine.generate(requests_of([f"a.tar/{n}" for n in range(12)]), SAMPLING)
        answer: Any = [(each.prompt_id, each.number, each.tokens.tolist(), each.version) for each in rollouts]
    except EngineError as error:
        answer = str(error)
    return {"answer": answer, "waits": waits}
