"""Where a run starts, what may change when it resumes, and which run folders are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common import storage
from common.storage import StorageError
from model.config import ConfigError
from model.errors import CheckpointError
from tests.model.range_server import RangeServer
from tests.training.run_folders import interrupted_run
from training.config import ModelChoice, RunConfig, load_config
from training.start_point import StartPoint, announce_first_save, find_start_point, make_latest, resolve_model

pytestmark = pytest.mark.fast


def start_point(config_file: Path, *overrides: str) -> StartPoint:
    return find_start_point(load_config(RunConfig, config_file, overrides))


@pytest.fixture
def run(config_file: Path, tmp_path: Path) -> Path:
    """The folder of an interrupted run with a checkpoint of step 3."""
    interrupted_run(config_file, tmp_path / "run")
    return tmp_path / "run"


CHANGES = [
    ("train.global_batch_size=8", "train.global_batch_size was 4 .* and is 8 now"),
    ("data.seed=5", "data.seed was 0 .* and is 5 now"),
    ("data.image_max_tokens=25", "data.image_max_tokens was 16"),
    ("model.preset=tiny_dense", "model.preset was 'tiny_moe'"),
    ("model.max_position_embeddings=256", "model.max_position_embeddings was 0 .* and is 256 now"),
    ("model.rope_theta=5e5", "model.rope_theta was 0.0 .* and is 500000.0 now"),
]


@pytest.mark.parametrize(("override", "message"), CHANGES)
def test_changed_model_or_data_plan_is_refused_on_resume(
    run: Path, config_file: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message + r".*checkpoint.allow_changes=true"):
        start_point(config_file, override)
    assert start_point(config_file, override, "checkpoint.allow_changes=true").resume


def test_message_about_a_changed_list_names_the_changed_item(run: Path, config_file: Path) -> None:
    content = OmegaConf.load(config_file)
    content.data.sources[1].weight = 2
    OmegaConf.save(content, config_file)
    with pytest.raises(ConfigError, match=r"^data\.sources\[1\]\.weight was 1\.0 in the run at .* and is 2\.0 now"):
        start_point(config_file)


def test_checkpoint_from_before_a_key_existed_resumes_with_its_default(run: Path, config_file: Path) -> None:
    file = run / "checkpoints" / "step_0000003" / "train_state.json"
    state = json.loads(file.read_text())
    del state["config"]["model"]["rope_theta"], state["config"]["model"]["max_position_embeddings"]
    file.write_text(json.dumps(state))
    assert start_point(config_file).resume
    with pytest.raises(ConfigError, match=r"model.rope_theta was 0.0"):
        start_point(config_file, "model.rope_theta=5e5")


def test_moved_sources_and_tokenizer_are_accepted_on_resume(run: Path, config_file: Path) -> None:
    """Their content is compared when the loader takes up its counters; see test_resume.py."""
    content = OmegaConf.load(config_file)
    content.data.tokenizer = "/elsewhere/tokenizer"
    content.data.sources[0].path = "/elsewhere/images"
    content.data.sources[2] = {"path": "/elsewhere/films", "name": "videos"}
    OmegaConf.save(content, config_file)
    moved = start_point(config_file).moved
    assert [line.split(" has moved from ")[0] for line in moved] == [
        "data.tokenizer",
        "source 'images'",
        "source 'videos'",
    ]
    assert moved[1].endswith(" to /elsewhere/images: the same samples")


def test_source_at_another_path_and_with_another_name_is_refused_on_resume(run: Path, config_file: Path) -> None:
    content = OmegaConf.load(config_file)
    content.data.sources[0].path = "/elsewhere/photos"
    OmegaConf.save(content, config_file)
    with pytest.raises(
        ConfigError, match=r"^data.sources\[0\].path was '.*/images' in the run at .* '/elsewhere/photos'"
    ):
        start_point(config_file)


@pytest.mark.parametrize("override", ["freeze=[vision]", "freeze=[adapter,decoder]"])
def test_another_freeze_is_refused_even_where_changes_are_allowed(
    config_file: Path, tmp_path: Path, override: str
) -> None:
    """The checkpoint has no optimizer state of frozen parts."""
    interrupted_run(config_file, tmp_path / "run", "freeze=[adapter]")
    message = rf"freeze was \['adapter'\] in the run at .* and is .* now.*model.init_from={tmp_path}/run"
    for overrides in ([], ["checkpoint.allow_changes=true"]):
        with pytest.raises(ConfigError, match=message):
            start_point(config_file, override, *overrides)


def test_order_of_frozen_parts_does_not_matter(config_file: Path, tmp_path: Path) -> None:
    interrupted_run(config_file, tmp_path / "run", "freeze=[adapter,vision]")
    assert start_point(config_file, "freeze=[vision,adapter]").resume


def test_fewer_steps_than_taken_are_refused(run: Path, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.steps=2 is below step 3, which the run at .* has reached"):
        start_point(config_file, "train.steps=2", "optimizer.warmup_steps=1")


@pytest.mark.parametrize("name", ["config.json", "state"])
def test_model_folder_is_refused_as_output_folder(config_file: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is the folder of a model, not of a run; choose another"):
        start_point(config_file)


def test_output_folder_that_is_not_writable_is_refused(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train.output_dir=.* cannot be written: .*/file is not a writable folder"):
        start_point(config_file, f"train.output_dir={tmp_path}/file/run")


def test_run_resumes_although_its_init_from_is_gone(config_file: Path, tmp_path: Path) -> None:
    interrupted_run(config_file, tmp_path / "run", "model.init_from=/archived")
    found = start_point(config_file, "model.init_from=/archived")
    assert found.resume == tmp_path / "run" / "checkpoints" / "step_0000003"
    assert found.weights is None


def test_url_of_a_folder_is_a_start_point(
    config_file: Path, tmp_path: Path, hf_folder: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ("model.preset=", "lora.rank=4")
    local = start_point(config_file, *options, f"model.init_from={hf_folder[0]}")
    with RangeServer(hf_folder[0]) as server:
        server.signature = "sig=first"
        found = start_point(config_file, *options, f"model.init_from='{server.url}/?sig=first'")
        choice = ModelChoice(preset="")
        assert resolve_model(choice, found) == resolve_model(choice, local)
        assert found.base == local.base
        [line] = found.formats()
        assert line.startswith(f"weights are read from {server.url}; its other files are copied to {tmp_path}/cache/")
        with pytest.raises(ConfigError, match=rf"model.preset=glm41v_9b is another .* the one in {server.url};"):
            resolve_model(ModelChoice(preset="glm41v_9b"), found)
        with pytest.raises(ConfigError, match=r"model.init_optimizer=true, but .* holds weights alone"):
            start_point(config_file, f"model.init_from='{server.url}?sig=first'", "model.init_optimizer=true")
        with pytest.raises(ConfigError, match=rf"{server.url}/none has no config.json: a URL must"):
            start_point(config_file, f"model.init_from='{server.url}/none?sig=first'")


def test_another_signature_is_the_same_start_and_in_no_message(config_file: Path, tmp_path: Path) -> None:
    interrupted_run(config_file, tmp_path / "run", "model.init_from='https://host/model?sig=first'")
    found = start_point(config_file, "model.init_from='https://host/model?sig=second'")
    assert found.resume is not None
    assert not found.moved
    with pytest.raises(ConfigError, match=r"model.init_from was 'https://host/model' .* is 'https://host/other' now"):
        start_point(config_file, "model.init_from='https://host/other?sig=second'")


def test_existing_run_is_refused_with_resume_never(run: Path, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a run and checkpoint.resume=never; choose another folder"):
        start_point(config_file, "checkpoint.resume=never")


def test_latest_that_names_a_missing_folder_is_refused(run: Path, config_file: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_0000003")
    with pytest.raises(CheckpointError, match=r"latest names 'step_0000003', which does not exist"):
        start_point(config_file)


def test_step_folders_without_latest_are_refused(run: Path, config_file: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step_0000001").mkdir()
    message = (
        rf"train.output_dir={run}: checkpoints/ holds step_0000003 but no latest: write its name there to "
        "resume from it, or choose another folder"
    )
    with pytest.raises(ConfigError, match=message):
        start_point(config_file)
    with pytest.raises(ConfigError, match=rf"model.init_from={run} has no checkpoints/latest: give one of its step fo"):
        start_point(config_file, f"model.init_from={run}", f"train.output_dir={tmp_path}/other")
    (run / "checkpoints" / "latest").write_text("step_0000003\n")
    assert start_point(config_file).resume == run / "checkpoints" / "step_0000003"


def test_unfinished_step_folder_alone_starts_a_new_run(run: Path, config_file: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step_0000003").rename(run / "checkpoints" / ".unfinished_step_0000003")
    assert start_point(config_file) == StartPoint()


def test_run_killed_between_its_first_save_and_latest_resumes_from_that_save(config_file: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_0000003"
    announce_first_save(step)
    assert start_point(config_file) == StartPoint()
    interrupted_run(config_file, tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_0000003", step)
    assert start_point(config_file).resume == step
    make_latest(step)
    assert sorted(path.name for path in step.parent.iterdir()) == ["latest", "step_0000003"]
    announce_first_save(step.with_name("step_0000006"))
    assert sorted(path.name for path in step.parent.iterdir()) == ["latest", "step_0000003"]


def test_length_and_rope_base_of_the_configuration_replace_those_of_the_model(config_file: Path) -> None:
    config = load_config(RunConfig, config_file, ["model.max_position_embeddings=999", "model.rope_theta=5e5"])
    unchanged, changed = (
        resolve_model(load_config(RunConfig, config_file).model, StartPoint()),
        resolve_model(config.model, StartPoint()),
    )
    assert (changed.decoder.max_position_embeddings, changed.decoder.rope_theta) == (999, 5e5)
    assert changed.vision == unchanged.vision
    assert unchanged.decoder.rope_theta == 10000.0


def test_damaged_newest_checkpoints_are_skipped(run: Path, config_file: Path) -> None:
    steps = [run / "checkpoints" / f"step_000000{number}" for number in (3, 4, 5, 6)]
    for step in steps[1:]:
        shutil.copytree(steps[0], step)
    (run / "checkpoints" / "latest").write_text("step_0000005\n")  # of a run that was set back from step 6
    (steps[1] / "manifest.json").write_text(
        json.dumps({"block_bytes": 2**30, "files": {"hf/config.json": {"bytes": 2, "xxh3_64": ["0"]}}})
    )
    (steps[2] / "train_state.json").write_bytes(b"\x00" * 40)
    found = start_point(config_file)
    assert found.resume == steps[0]
    assert [path for path, _ in found.damaged] == [steps[2], steps[1]]
    reasons = [reason for _, reason in found.damaged]
    assert re.match(rf"{steps[2]}/train_state.json is damaged", reasons[0])
    assert reasons[1] == f"{steps[1]}/hf/config.json is missing; use another step, or copy the checkpoint again"
    (steps[0] / "train_state.json").unlink()
    with pytest.raises(
        CheckpointError, match=rf"no checkpoint of the run at {run} can be used: .*step_0000003 holds only"
    ):
        start_point(config_file)


def test_moved_root_is_accepted_on_resume(run: Path, config_file: Path) -> None:
    [line] = start_point(config_file, "data.root=/elsewhere").moved
    assert line == "data.root has moved from '' to '/elsewhere': the same samples"


def test_newest_checkpoint_on_failing_storage_is_neither_damaged_nor_skipped(
    run: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the begin of /proc/self/mem is an input/output error."""
    monkeypatch.setattr(storage, "DELAYS", (0.1,))
    steps = [run / "checkpoints" / f"step_000000{number}" for number in (3, 4)]
    shutil.copytree(steps[0], steps[1])
    (run / "checkpoints" / "latest").write_text("step_0000004\n")
    for name in ("manifest.json", "train_state.json"):
        (steps[1] / name).rename(tmp := run / name)
        (steps[1] / name).symlink_to("/proc/self/mem")
        with pytest.raises(StorageError, match=rf"step_0000004/{name} cannot be read \(Input/output error\)"):
            start_point(config_file)
        tmp.rename(steps[1] / name)
    assert start_point(config_file).resume == steps[1]
    assert not start_point(config_file).damaged
