"""One expert per token: the weights of transformers, which normalises the weight of a single expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.weights.load import SafetensorsFolder, load_weights
from tests import reference
from tests.reference import (
    forward_inputs,
    make_sample,
    pack,
    save_transformers_model,
    small_config,
    transformers_logits,
)

LOGITS = 5e-6  # largest absolute difference, at logits of scale 1


@pytest.mark.fast
@pytest.mark.parametrize("scaling_factor", [1.0, 1.7])
def test_logits_equal_transformers_with_one_expert_per_token(
    scaling_factor: float, single_process: None, tmp_path: Path
) -> None:
    config = small_config("glm4v_moe")
    decoder = replace(config.decoder, num_experts_per_tok=1, routed_scaling_factor=scaling_factor)
    published = save_transformers_model(replace(config, decoder=decoder), tmp_path)
    model = GlmvModel(GlmvConfig.from_hf(tmp_path), ParallelConfig()).eval()
    load_weights([model], SafetensorsFolder(tmp_path))
    sample = make_sample(config, [reference.Text(40)], seed=4)
    with torch.no_grad():
        expected = transformers_logits(published, sample)
        found = model(**forward_inputs(pack([sample], seq_length=len(sample.encoded), segment_multiple=1)))
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= LOGITS
