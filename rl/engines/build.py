"""Builds the engine that `rollout.engine` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.encoding.tokenizer import GlmTokenizer
from model.config import GlmvConfig
from rl.config import RlConfig
from rl.engines.embedded import EmbeddedEngine
from rl.engines.engine import Engine
from rl.engines.forcing import ResponseTokens
from rl.engines.server import Expected
from rl.engines.servers import ServersEngine
from training.dtypes import DTYPES

GB = 10**9


def build_engine(
    config: RlConfig,
    model: GlmvConfig,
    tokenizer: GlmTokenizer,
    chat_form: str,
    hf_files: Callable[[Path], None],
    on_wait: Callable[[], None],
) -> Engine:
    """Build the engine of a run. Collective.

    Args:
        config: of the run.
        model: what it trains.
        tokenizer: of the run.
        chat_form: how the model writes chats.
        hf_files: fills a folder with the files beside the weights that servers load.
        on_wait: called while rollouts are drawn, so that the run is not taken to hang; raises Interrupted where it is
            asked to stop.

    Raises:
        EngineError: a server does not answer, or serves something else; the tokenizer lacks a token.
    """
    rollout, special = config.rollout, ResponseTokens.of(model, tokenizer, chat_form)
    if rollout.engine == "embedded":
        return EmbeddedEngine(
            model,
            special,
            DTYPES[config.train.precision],
            rows=rollout.embedded_rows,
            cache_bytes=int(rollout.embedded_cache_gb * GB),
            on_wait=on_wait,
        )
    return ServersEngine(
        rollout.engine,
        rollout,
        Expected(model, tokenizer, max_length=config.train.seq_length, temperature=1.0),
        special,
        Path(config.train.output_dir),
        hf_files,
        on_wait=on_wait,
    )
