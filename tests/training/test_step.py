"""Optimizer steps against transformers and torch.optim.AdamW; the balance loss against its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import get_wsd_schedule

from model.glmv import GlmvModel
from model.moe import SegmentRouter
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step, samples_of_step
from tests.processes import Processes
from tests.reference import forward_inputs, pack, parameter_distance, transformers_loss
from tests.training import step_cases
from tests.training.step_cases import case_of, train_alike
from training.adam import GroupStepAdamW
from training.optimizer import set_step
from training.optimizer_config import OptimizerConfig
from training.step import TrainStep
from training.step_errors import NonFiniteStep, NonFiniteWeights, NoSamples, NothingToLearn


def test_three_steps_equal_transformers_and_adamw(
    build: Callable[..., GlmvModel], reference: nn.Module, hf_folder
) -> None:
    model = build()
    variant = model.glmv_config.variant
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    trainer = TrainStep([model.train()], OPTIMIZER, steps=3, seq_length=SEQ_LENGTH)
    decayed = [p for p in reference.parameters() if p.dim() > 1]
    undecayed = [p for p in reference.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": undecayed, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    try:
        for step in (1, 2, 3):
            report = trainer.run(step, packs_of_step(variant, step))
            optimizer.zero_grad(set_to_none=False)  # in a step without images the vision tower moves by its momentum
            loss = transformers_loss(reference, chain(*samples_of_step(variant, step)))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), OPTIMIZER.clip_grad)
            optimizer.step()
            assert report.loss == pytest.approx(loss.item(), rel=1e-5)
            assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        trainer.synchronize_weights()
        assert parameter_distance(model, reference) <= 1e-5
    finally:
        reference.load_state_dict(before)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_overlapped_communication_changes_nothing(hf_folder, tmp_path: Path) -> None:
    """Two data-parallel ranks overlap communication and computation by default; here they do not."""
    kept = str(tmp_path / "parameters.pt")
    apart = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    with Processes(1) as process:
        one = process.run(step_cases.train, keep_in=kept, **case_of(hf_folder))[0]
    with Processes(2) as processes:
        two = processes.run(step_cases.train, optimizer=apart, compare_with=kept, **case_of(hf_folder))
        overlapped = processes.run(step_cases.train, **case_of(hf_folder))
    train_alike(two, one)
    assert [answer["reports"] for answer in two] == [answer["reports"] for answer in overlapped]


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_packs_without_samples_change_nothing(hf_folder, tmp_path: Path) -> None:
    """The last step of the data may have empty packs.

    One process gets them between others. Of two data-parallel or expert-parallel ranks, one gets only empty packs.
    """
    kept = str(tmp_path / "parameters.pt")
    with Processes(1) as process:
        one = process.run(step_cases.train, keep_in=kept, **case_of(hf_folder))[0]
        with_empty = process.run(step_cases.train, with_empty=True, compare_with=kept, **case_of(hf_folder))
    train_alike(with_empty, one)
    with Processes(2) as processes:
        for layout in ("", "EP2"):
            two = processes.run(
                step_cases.train, layout=layout, with_empty=True, compare_with=kept, **case_of(hf_folder)
            )
            train_alike(two, one)


@pytest.mark.fast
def test_group_step_adamw_equals_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(7, 5, generator=generator)
    parameter, expected = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
    optimizers = [GroupStepAdamW([parameter], **settings), torch.optim.AdamW([expected], **settings)]
    for _ in range(5):
        parameter.grad = expected.grad = torch.randn(7, 5, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


# --- the balance loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_balance_loss_is_per_sample_and_per_token_of_the_global_batch(build: Callable[..., GlmvModel]) -> None:
    """Brute force, one sample at a time, in the last layer: the only router that no later balance loss reaches."""
    coefficient = 0.5
    model = build().train()
    batches = packs_of_step("glm4v_moe", 1)
    tokens = sum(batch.num_tokens for batch in batches)
    router = model.routers()[-1]
    assert isinstance(router, SegmentRouter)
    inputs: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    weight = router.weight.detach().clone().requires_grad_()
    expected_loss = torch.zeros(())
    for batch in batches:
        with torch.no_grad():
            model(**forward_inputs(batch))
        hidden = inputs.pop().squeeze(1)
        for begin, length in zip(batch.cu_seqlens.tolist(), batch.segment_lengths.tolist(), strict=False):
            if length:
                scores = torch.sigmoid(hidden[begin : begin + length] @ weight.T)
                share = scores / scores.sum(1, keepdim=True)
                counts = torch.zeros(8).index_add(0, share.topk(2, dim=1).indices.flatten(), torch.ones(2 * length))
                of_sample = 8 / (2 * length) * (counts * share.mean(0)).sum()
                expected_loss = expected_loss + length / tokens * of_sample
    (coefficient * expected_loss).backward()

    with_balance, without = (last_router_gradient(build, c) for c in (coefficient, 0.0))
    torch.testing.assert_close(with_balance - without, weight.grad, rtol=1e-4, atol=1e-6)


def last_router_gradient(build: Callable[..., GlmvModel], coefficient: float) -> torch.Tensor:
    model = build(balance_loss_coeff=coefficient).train()
    trainer = TrainStep([model], OPTIMIZER, steps=1, seq_length=SEQ_LENGTH)
    finalize = model.config.finalize_model_grads_func
    kept: list[torch.Tensor] = []

    def keep(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        kept.append(model.routers()[-1].weight.main_grad.clone())

    model.config.finalize_model_grads_func = keep
    trainer.run(1, packs_of_step("glm4v_moe", 1))
    return kept[0]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            float("inf"),
            NonFiniteWeights,
            r"because weights are not finite: language_model.decoder.final_layernorm.weight\.",
        ),
        (
            float("nan"),
            NonFiniteWeights,
            r"because weights are not finite: language_model.decoder.final_layernorm.weight\.",
        ),
        (3e38, NonFiniteStep, r"step 1: the loss is (nan|inf)$"),
    ],
)
def test_step_that_is_not_finite_changes_nothing_and_names_weights_that_are_not(
    build: Callable[..., GlmvModel], value: float, error: type[Exception], message: str
) -> None:
    model = build().train()
    trainer = TrainStep([model], OPTIMIZER, steps=1, seq_length=SEQ_LENGTH)
    with torch.no_grad():
        model.language_model.decoder.final_layernorm.weight[0] = value
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=message) as caught:
        trainer.run(1, packs_of_step(model.glmv_config.variant, 1))
    assert type(caught.value) is error
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_weights_that_are_not_finite_are_named_on_every_rank(hf_folder) -> None:
    """Also by ranks that do not hold them: the second of two pipeline stages has the last norm."""
    with Processes(2) as processes:
        messages = processes.run(step_cases.train_with_nan, layout="PP2", **case_of(hf_folder))
    assert len(set(messages)) == 1
    assert "because weights are not finite: language_model.decoder.final_layernorm.weight." in messages[0]


@pytest.mark.fast
def test_step_without_a_loss_token_is_an_error(build: Callable[..., GlmvModel]) -> None:
    """A pack without loss tokens is no error if other packs of its step have some."""
    model = build().train()
    trainer = TrainStep([model], OPTIMIZER, steps=1, seq_length=SEQ_LENGTH)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, *others = packs_of_step(model.glmv_config.variant, 1)
    without = replace(first, loss_mask=torch.zeros_like(first.loss_mask))
    with pytest.raises(
        NothingToLearn, match=rf"step 1: none of the {first.num_tokens} tokens of the global batch carr"
    ):
        trainer.run(1, [without])
    with pytest.raises(NoSamples, match=r"step 1: no sample of the global batch could be read; see quarantine.jsonl"):
        trainer.run(1, [pack([], SEQ_LENGTH)])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert trainer.run(1, [without, *others]).loss > 0


@pytest.mark.fast
@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_learning_rate_warms_up_and_decays(hf_folder: object, build: Callable[..., GlmvModel]) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=2, decay_style="linear")
    scheduler = TrainStep([build()], config, steps=5, seq_length=SEQ_LENGTH)
    rates = [set_step(scheduler.scheduler, step) for step in (1, 2, 3, 4, 5)]
    assert rates == pytest.approx([0.5, 1.0, 0.7, 0.4, 0.1])


@pytest.mark.fast
@pytest.mark.parametrize("style", ["linear", "cosine", "minus_sqrt"])
def test_wsd_schedule_equals_that_of_transformers(style: str, build: Callable[..., GlmvModel]) -> None:
    names = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "1-sqrt"}
    config = OptimizerConfig(
        lr=2e-3, min_lr=2e-4, warmup_steps=3, decay_style="wsd", cooldown_steps=4, cooldown_style=style
    )
    trainer = TrainStep([build()], config, steps=12, seq_length=SEQ_LENGTH)
    expected = get_wsd_schedule(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr),
        num_warmup_steps=3,
        num_decay_steps=4,
        num_training_steps=12,
        min_lr_ratio=config.min_lr / config.lr,
        decay_type=names[style],
    )
    after_warmup = range(3, 13)  # transformers warms up from min_lr
    rates = [set_step(trainer.scheduler, step) for step in after_warmup]
    assert rates == pytest.approx([config.lr * expected.lr_lambdas[0](step) for step in after_warmup])
    assert rates[0] == rates[5] == config.lr
    assert rates[-1] == pytest.approx(config.min_lr)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_bf16_gradients_are_float32_gradients_to_rounding(hf_folder: object, build: Callable[..., GlmvModel]) -> None:
    norms = {}
    for main_grads, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = build(dtype=torch.bfloat16).train()
        trainer = TrainStep([model], replace(OPTIMIZER, main_grads=main_grads), 2, SEQ_LENGTH, check_determinism=1)
        assert {p.main_grad.dtype for p in model.parameters()} == {dtype}
        norms[main_grads] = [trainer.run(step, packs_of_step("glm4v_moe", step)).grad_norm for step in (1, 2)]
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=2**-8)
    assert norms["bf16"] != norms["fp32"]
