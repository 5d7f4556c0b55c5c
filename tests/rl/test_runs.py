"""Runs of reinforcement learning, started as a user does: what they write, any layout, and kill -9 at any moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.index import read_index
from data_pipeline.shards.prompt_facts import add_grades
from model.checkpoint import read_train_state
from model.config import ConfigError
from rl.config import RlConfig
from rl.setup import open_prompts, prepare
from tests.launch import finish, metrics, process_of_rank, start, train, wait_until
from tests.rl.run_files import ENTRY, assert_same, has_rollouts, kill_and_resume, lasting
from tools.plan_rollouts import read_rl_workload
from training.config import load_config
from training.dry_run import dry_run


@pytest.fixture(scope="module")
def whole_run(rl_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(rl_config(run), entry=ENTRY, processes=1)
    return run


def test_run_writes_rewards_rollouts_and_validation(whole_run: Path) -> None:
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    learned = [line for line in lines if line["groups/kept"]]
    assert learned
    for line in learned:
        assert 0 < line["reward"] < 1
        assert line["samples"] == 4 * line["groups/kept"]
        assert line["rollout/mismatch"] < 1e-5
        assert line["updates"] == min(2, line["groups/kept"])
    validation = [json.loads(line) for line in (whole_run / "validation.jsonl").open()]
    assert [line["step"] for line in validation] == [0, 2, 4]
    assert {line["validation/samples"] for line in validation} == {16}
    for line in lines:
        rollouts = [json.loads(row) for row in (whole_run / "rollouts" / f"step_{line['step']:07d}.jsonl").open()]
        assert len(rollouts) == 4 * line["groups/drawn"]
        assert np.mean([row["score"] for row in rollouts]) == pytest.approx(line["reward"])
        assert {row["version"] for row in rollouts} == {line["step"] - 1}
        for row in rollouts:
            right = f"<|begin_of_box|>{row['reference']}<|end_of_box|></answer>" in row["response"]
            assert right or not row["score"], row


def test_counted_are_prompts_and_not_rollouts(whole_run: Path) -> None:
    drawn = sum(line["groups/drawn"] for line in metrics(whole_run))
    tally = read_train_state(whole_run / "checkpoints" / "step_0000004").data["tally"]
    assert tally == {"samples": drawn, "reasons": {}}


def test_held_out_prompts_are_answered_in_parts(whole_run: Path, rl_config, tmp_path: Path) -> None:
    """Without expansion six at a time; together they get the rewards that they get at once."""
    config = rl_config(tmp_path / "run", train={"steps": 1}, expansion={"enabled": False})
    train(config, entry=ENTRY, processes=1)
    first, expected = (
        lasting(json.loads((run / "validation.jsonl").read_text().splitlines()[0]))
        for run in (tmp_path / "run", whole_run)
    )
    assert first == pytest.approx(expected)


def test_killed_run_continues_bit_for_bit(whole_run: Path, rl_config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = rl_config(run)
    after_rollouts = lambda launcher: wait_until(has_rollouts, launcher, run, step=3)  # noqa: E731
    kill_and_resume(config, after_rollouts)
    assert_same(run, whole_run)
    assert metrics(run)[2]["rollout/reused"] == 1
    assert metrics(whole_run)[2]["rollout/reused"] == 0


def test_run_that_is_stopped_between_rollouts_and_update_continues_bit_for_bit(
    whole_run: Path, rl_config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = rl_config(run)
    launcher = start(config, entry=ENTRY, processes=1)
    wait_until(has_rollouts, launcher, run, step=3)
    process_of_rank(launcher, 0).send_signal(signal.SIGTERM)
    assert "stopped at step" in finish(launcher)
    train(config, entry=ENTRY, processes=1)
    assert_same(run, whole_run)


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ["parallel.pipeline_model_parallel_size=2"],
        ["parallel.context_parallel_size=2", "data.segment_multiple=8"],
    ],
    ids=["DP2", "TP2 SP", "PP2", "CP2"],
)
def test_two_processes_draw_and_learn_the_same(whole_run: Path, rl_config, tmp_path: Path, layout) -> None:
    run = tmp_path / "run"
    config = rl_config(run, train={"steps": 2})
    train(config, layout, entry=ENTRY, processes=2)
    for got, want in zip(metrics(run), metrics(whole_run), strict=False):
        for key in ("reward", "groups/kept", "rollout/tokens", "samples", "policy/max_ratio_deviation"):
            assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-6), key
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)


NEEDS_EXPERTS = "rollout.router_replay=engine needs an engine that tells which experts it chose"
JUDGE = ["reward.judge.url=http://localhost:1/v1", "reward.judge.model=m"]
REFUSED = [
    (["train.global_batch_size=8"], "train.global_batch_size=8 has no meaning in rl.train"),
    (["rl.group=1"], "rl.group=1: the rollouts of a prompt are compared; give 2 or more"),
    (["rl.advantage=ppo"], "rl.advantage='ppo': choose one of grpo, centred"),
    (["rl.updates=7"], "rl.updates=7 is above rl.prompts=6"),
    (["rollout.engine=tgi"], "rollout.engine='tgi': choose one of embedded, vllm, sglang"),
    (["rollout.tis=0.5"], "rollout.tis=0.5 would shrink every token's weight"),
    (["rollout.max_answer_tokens=1024"], "leave no room for the prompt"),
    (["health.spike_factor=3"], "health.spike_factor=3: a policy loss is near 0"),
    (["validation.steps=3"], "validation.steps has no meaning in rl.train"),
    (["validation.samples_max_tokens=3"], "validation.samples_max_tokens has no meaning in rl.train"),
    (
        ["model.init_from=", "model.preset=tiny_dense"],
        "model.init_from is empty: reinforcement learning starts from a model",
    ),
    (["rl.clip_hi=0.3"], "unknown key 'rl.clip_hi'"),
    (["rollout.addresses=[http://localhost:8000]"], "rollout.addresses=['http://localhost:8000'] is of servers"),
    (["rollout.engine=vllm"], "rollout.engine=vllm needs servers: give rollout.addresses"),
    (
        ["rollout.engine=vllm", "rollout.addresses=[http://localhost:8000]", "rollout.embedded_rows=8"],
        "rollout.embedded_rows=8 is of the embedded engine, and rollout.engine=vllm",
    ),
    (["lora.rank=4", "lora.dropout=0.1"], "lora.dropout=0.1: rollouts are drawn without dropout"),
    (
        ["rollout.router_replay=engine"],
        "rollout.router_replay=engine: the model is dense and has no routers; set it to none",
    ),
    (["rollout.router_replay=trainer"], "rollout.router_replay='trainer': choose one of none, engine"),
    (
        ["rollout.engine=vllm", "rollout.addresses=[http://localhost:8000]", "rollout.router_replay=engine"],
        f"{NEEDS_EXPERTS}, and rollout.engine=vllm does not",
    ),
    (
        ["rollout.engine=sglang", "rollout.addresses=[http://localhost:8000]", "rollout.router_replay=engine"],
        f"{NEEDS_EXPERTS}, and rollout.engine=sglang does not",
    ),
    (
        ["rollout.router_replay=engine", "moe.expert_bias_update_rate=0.001"],
        "moe.expert_bias_update_rate=0.001: with rollout.router_replay=engine the biases take no part in training",
    ),
    (["reward.judge.url=localhost:1"], "reward.judge.url is 'localhost:1'"),
    (["reward.judge.samples=3"], "reward.judge.url is ''"),
    ([*JUDGE, "reward.judge.temperature=nan"], "reward.judge.temperature is nan"),
    ([*JUDGE, "reward.judge.timeout=inf"], "judge.timeout and judge.max_tokens must be positive"),
    ([*JUDGE, "reward.judge.samples=3", "reward.judge.temperature=0"], "at which all replies are the same"),
    (["reward.processes=100000"], "reward.processes=100000: give a number from 1 to 1024"),
    (["reward.registry=missing.yaml"], "reward.registry: missing.yaml: No such file"),
    (["rollout.embedded_rows=2"], "rollout.embedded_rows=2 is below rl.group=4"),
    (["rollout.max_answer_tokens=3"], "rollout.max_answer_tokens=3: give 4 or more"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[" ".join(keys) for keys, _ in REFUSED])
def test_contradiction_is_refused_before_anything_is_written(
    rl_config, tmp_path: Path, keys: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(load_config(RlConfig, rl_config(tmp_path / "run"), keys))
    assert not (tmp_path / "run").exists()


IGNORED = [
    (["data.prefetch=7"], "data.prefetch has no effect in rl.train"),
    (["expansion.enabled=false", "expansion.decay=0.5"], "expansion.decay has no effect with expansion.enabled=false"),
    (
        ["rollout.engine=vllm", "rollout.addresses=[http://a:8000]", "rollout.request_deadline=5000"],
        "rollout.request_deadline=5000 has no effect, because rollout.deadline=1800 ends all requests before",
    ),
    (
        ["curriculum.sampler=uniform", "curriculum.kind_floor=1"],
        "curriculum.kind_floor has no effect with curriculum.sampler=uniform",
    ),
]


@pytest.mark.parametrize(("keys", "message"), IGNORED, ids=[keys[-1] for keys, _ in IGNORED])
def test_key_without_effect_is_named(rl_config, tmp_path: Path, keys: list[str], message: str) -> None:
    file = rl_config(tmp_path / "run")
    assert not list(load_config(RlConfig, file).warnings_of_domains(()))
    [warning] = load_config(RlConfig, file, keys).warnings_of_domains(())
    assert warning.startswith(message)


DOUBTFUL = [
    (["rl.prompts=100"], "rl.prompts=100 is more than the 64 prompts of data.sources"),
    (["rollout.embedded_cache_gb=1e-9"], "rollout.embedded_cache_gb=1e-09: the 4 responses to a prompt may need"),
    (["reward.no_judge_score=0.8"], "reward.no_judge_score=0.8: an answer that nobody decides counts as a pass"),
    ([*JUDGE, "reward.judge.fallback=0.8"], "reward.judge: an answer without a verdict gets fallback=0.8"),
    ([*JUDGE, "reward.judge.key_variable=NOWHERE"], "reward.judge: the environment has no NOWHERE"),
]


@pytest.mark.parametrize(("keys", "message"), DOUBTFUL, ids=[keys[-1] for keys, _ in DOUBTFUL])
def test_value_that_is_hardly_meant_is_named(rl_config, tmp_path: Path, keys: list[str], message: str) -> None:
    file = rl_config(tmp_path / "run")
    assert not prepare(load_config(RlConfig, file)).warnings
    [warning] = prepare(load_config(RlConfig, file, keys)).warnings
    assert warning.startswith(message)


def test_grades_by_another_pass_score_are_named(rl_config, digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits / "shards" / "prompts", tmp_path / "prompts")
    [tar] = folder.glob("*.tar")
    add_grades(tar, {read_index(tar).table.column("key")[0].as_py(): (1, 2)}, {"model": "m", "pass_score": 0.5})
    file = rl_config(tmp_path / "run", data={"sources": [{"path": str(folder)}]})
    [warning] = prepare(load_config(RlConfig, file)).warnings
    assert "from a score of 0.5 on, and this run from curriculum.pass_score=0.75" in warning
    assert not prepare(load_config(RlConfig, file, ["curriculum.pass_score=0.5"])).warnings


def test_labels_of_other_tiers_than_the_curriculums_are_refused(rl_config, digits: Path, tmp_path: Path) -> None:
    """With two tiers `hard` would be the easiest."""
    record = json.loads((digits / "records" / "prompts.jsonl").read_text().splitlines()[0])
    (digits / "records" / "labelled.jsonl").write_text(json.dumps({**record, "tier": "hard"}))
    build_shards(
        [digits / "records" / "labelled.jsonl"],
        tmp_path / "labelled",
        tokenizer=digits / "tokenizer",
        chat_form="glm41v",
    )
    file = rl_config(tmp_path / "run", data={"sources": [{"path": str(tmp_path / "labelled")}]})
    prepare(load_config(RlConfig, file))
    two_tiers = ["curriculum.edges=[0.5]", "curriculum.weights=[1,1]"]
    with pytest.raises(DataError, match="1 prompts are labelled with one of the 5 tiers "):
        prepare(load_config(RlConfig, file, two_tiers))


@pytest.mark.parametrize("mark", ["</think>", "<|begin_of_box|>"])
def test_tokenizer_without_the_marks_of_an_answer_is_refused(
    mark: str, rl_config, digits: Path, tmp_path: Path
) -> None:
    tokenizer = shutil.copytree(digits / "tokenizer", tmp_path / "tokenizer")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != mark]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    prompts = shutil.copytree(digits / "shards" / "prompts", tmp_path / "prompts")
    index_shards(list(prompts.glob("*.tar")), tokenizer=tokenizer, chat_form="glm41v")
    data = {"tokenizer": str(tokenizer), "sources": [{"path": str(prompts)}]}
    with pytest.raises(DataError, match=re.escape(f"lacks the special tokens {mark}, by which")):
        prepare(load_config(RlConfig, rl_config(tmp_path / "run", data=data)))


def test_response_that_could_not_end_is_refused(rl_config, tmp_path: Path) -> None:
    config = load_config(RlConfig, rl_config(tmp_path / "run"))
    model = prepare(config).model
    other = replace(model, decoder=replace(model.decoder, eos_token_id=(0,)))
    with pytest.raises(
        ConfigError, match=r"eos_token_id .* is \[0\], without <\|user\|> \(7\), by which an answer ends"
    ):
        open_prompts(config, other)


def test_tokenizer_without_the_chat_template_of_the_prompts_is_named(rl_config, digits: Path, tmp_path: Path) -> None:
    tokenizer = shutil.copytree(digits / "tokenizer", tmp_path / "tokenizer")
    (tokenizer / "chat_template.jinja").unlink()
    file = rl_config(tmp_path / "run", data={"tokenizer": str(tokenizer)})
    [warning] = prepare(load_config(RlConfig, file)).warnings
    assert warning.startswith(
        f"data.tokenizer {tokenizer}: there is no chat template (this run asks in the form glm41v)"
    )


def test_resumed_run_names_the_keys_that_have_changed(
    whole_run: Path, rl_config, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["train.steps=6", "curriculum.pass_score=0.5", "reward.no_judge_score=0.1", "checkpoint.resume=auto"]
    dry_run(load_config(RlConfig, rl_config(whole_run), keys), 1, False, prepare)
    named = [line for line in capsys.readouterr().out.splitlines() if " in the checkpoint and is " in line]
    assert named == [
        "curriculum.pass_score was 0.75 in the checkpoint and is 0.5 now",
        "reward.no_judge_score was 0.0 in the checkpoint and is 0.1 now",
        "train.steps was 4 in the checkpoint and is 6 now",
    ]


def test_held_out_prompts_must_not_be_training_prompts(rl_config, digits: Path, tmp_path: Path) -> None:
    same = [f"validation.sources=[{{path: {digits}/shards/prompts}}]"]
    config = rl_config(tmp_path / "run")
    with pytest.raises(DataError, match="is also a training shard"):
        prepare(load_config(RlConfig, config, same))
    prepare(load_config(RlConfig, config, [*same, "validation.allow_overlap=true"]))


@pytest.mark.slow
def test_run_that_can_use_no_held_out_prompt_ends(rl_config, digits: Path, tmp_path: Path) -> None:
    """Every image has a byte that is not as it was indexed."""
    folder = shutil.copytree(digits / "shards" / "held_out", tmp_path / "held_out")
    [tar] = folder.glob("*.tar")
    content, kept = bytearray(tar.read_bytes()), tar.stat()
    with tarfile.open(tar) as members:
        for member in members:
            if member.name.endswith(".png"):
                content[member.offset_data + 60] ^= 255
    tar.write_bytes(content)
    os.utime(tar, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    file = rl_config(tmp_path / "run", validation={"sources": [{"path": str(folder)}]})
    launcher = start(file, entry=ENTRY, processes=1)
    assert "validation.sources: 16 held-out prompts could not be used (checksum 16), such as held_out-" in finish(
        launcher
    )
    assert not (tmp_path / "run" / "validation.jsonl").exists()


def test_dry_run_prints_what_a_step_takes(rl_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(load_config(RlConfig, rl_config(tmp_path / "run")), 2, False, prepare)
    output = capsys.readouterr().out
    assert "as few of 1,024 tokens as hold 6 prompts x 4 rollouts, in 2 updates per step" in output
    assert "validation: 16 samples in 1 shards are held out" in output
    assert not (tmp_path / "run").exists()


def test_plan_takes_the_prompts_of_the_run(rl_config, digits: Path, tmp_path: Path) -> None:
    """Three prompts of 35 tokens, four responses to each, in packs of 1,024 tokens: one pack, with an image in each."""
    config = load_config(RlConfig, rl_config(tmp_path / "run"))
    planned = read_rl_workload(config, 2, False)
    assert planned.config.train.global_batch_size == 1
    assert planned.fullest.patches == [64] * 12
    assert sorted(planned.typical.lengths) == sorted(planned.fullest.lengths)
    assert "3 of the run's prompts" in planned.source
    assert planned.rollouts is not None
    assert planned.rollouts.engine is not None
    assert not (tmp_path / "run").exists()
