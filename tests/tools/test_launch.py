"""tools.launch: what it checks, and the scripts that it writes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from demo import digits
from tests.launch import ROOT
from tests.training_data import config_file, shards
from tools.launch import app

__all__ = ["config_file", "shards"]

RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/glm4*/*.yaml"))
TINY = [Path(f"configs/tiny/{name}.yaml") for name in ("pretrain", "long_context", "sft")]
UNPLANNED = ["--skip-files", "--no-plan"]  # planning a recipe takes a minute
ON_CPUS = ["--gpus-per-node", "0", "--processes-per-node", "1"]


def launch(*words: object) -> str:
    """Return what tools.launch prints where it succeeds."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refuse(*words: object) -> str:
    """Return the message of tools.launch where it refuses."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def published_nodes(recipe: Path) -> str:
    """Return the number of nodes in the launch command at the head of a recipe."""
    (number,) = re.findall(r"--nnodes (\d+)", (ROOT / recipe).read_text())
    return str(number)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_gives_a_script_that_bash_reads(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    nodes = published_nodes(recipe)
    script = launch("--config", recipe, "--nodes", nodes, *UNPLANNED, "--time", "1-0", "train.seed=5")
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert "#SBATCH --time=1-0\n" in script
    printed = 'printf "%s|" "$CONFIG" "$OUTPUT_DIR" "${OVERRIDES[@]}"'
    settings = script[: script.index("# shellcheck source")] + printed
    done = subprocess.run(["bash", "-c", settings, "bash", "a=b"], capture_output=True, text=True, check=True)
    config, output_dir, *overrides = done.stdout.split("|")[:-1]
    assert Path(config) == ROOT / recipe
    assert Path(output_dir).is_relative_to(ROOT / "runs")
    assert overrides == ["train.seed=5", "a=b"]
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    subprocess.run(["bash", "-n", file], check=True)
    if nodes == "32":
        subprocess.run(["shellcheck", "-x", file], cwd=ROOT, check=True)


def test_script_is_the_shipped_one_but_for_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = (ROOT / "slurm" / "sft.sbatch").read_text().splitlines()
    words = ["--config", TINY[2], "--nodes", 1, *ON_CPUS, "--skip-files", "--container", "/images/a b.sqsh"]
    words += ["--mounts", "/data:/data", "--account", "me", "--sbatch", "qos=high", "--sbatch", "cpus-per-task=8"]
    script = launch(*words, "model.preset=tiny_moe").splitlines()
    changed = [line.split("  ")[0] for line in script if line not in shipped]
    assert changed[0].startswith("# Written from slurm/sft.sbatch by: python -m tools.launch")
    assert changed[1:] == [
        "#SBATCH --nodes=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --account=me",
        "#SBATCH --qos=high",
        f"REPO={ROOT}",
        f"CONFIG={ROOT / TINY[2]}",
        f"OUTPUT_DIR={ROOT / 'demo_out/runs/tiny/sft'}",
        'OVERRIDES=(model.preset=tiny_moe "$@")',
        "CONTAINER_IMAGE='/images/a b.sqsh'",
        "CONTAINER_MOUNTS=/data:/data # FROM:TO,... beside the clone and OUTPUT_DIR: data, models",
        "NPROC_PER_NODE=1",
    ]
    assert [line for line in shipped if line not in script and line.startswith("#SBATCH")] == [
        "#SBATCH --nodes=16",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=64",
    ]


def test_run_that_cannot_start_is_refused_with_what_would_do(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ["--config", "configs/glm45v/pretrain.yaml", "--skip-files"]
    wrong = refuse(*recipe, "--nodes", 30)
    assert "does not divide the 240 processes; suitable numbers of nodes: 24, 32" in wrong
    tiny = ["--config", config_file, "--stage", "pretrain", *ON_CPUS]
    assert "suitable numbers of nodes: 2, 4" in refuse(*tiny, "--nodes", 3)
    assert "init_from" in refuse(*tiny, "--nodes", 2, "model.init_from=nowhere")
    assert "there is no such file" in refuse("--config", "nowhere.yaml", "--stage", "sft", "--nodes", 2)
    assert "give --stage" in refuse("--config", config_file, "--nodes", 2)
    assert "--submit: sbatch is not on this machine" in _without_sbatch(monkeypatch, [*tiny, "--nodes", 2, "--submit"])
    assert f"CONFIG={config_file}" in launch(*tiny, "--nodes", 2)


def _without_sbatch(monkeypatch: pytest.MonkeyPatch, words: list[object]) -> str:
    with monkeypatch.context() as changed:
        changed.setenv("PATH", "/nowhere")
        return refuse(*words)


def test_options_that_contradict_each_other_are_refused(config_file: Path) -> None:
    tiny = ["--config", config_file, "--stage", "pretrain", *ON_CPUS, "--nodes", 2]
    assert "give one of them" in refuse(*tiny, "--submit", "--out", "x")
    assert "--after x" in refuse(*tiny, "--after", "x")
    assert "--mounts has no effect" in refuse(*tiny, "--mounts", "/a:/a")
    assert "give FROM:TO, two absolute paths" in refuse(*tiny, "--container", "org#glm", "--mounts", "data:/data")
    assert "/nowhere is not there" in refuse(*tiny, "--container", "org#glm", "--mounts", "/nowhere:/data")
    assert "there is no such file" in refuse(*tiny, "--container", "nowhere.sqsh")
    assert "--sbatch qos: give an option" in refuse(*tiny, "--sbatch", "qos")
    assert "tools.launch sets nodes itself" in refuse(*tiny, "--sbatch", "nodes=3")
    assert "--processes-per-node" in refuse("--config", config_file, "--nodes", 2, "--gpus-per-node", 0)
    assert "--nodes two" in refuse("--config", config_file, "--nodes", "two")
    assert "give --submit, or a folder" in refuse("--nodes", 2, "--chain", config_file)
    assert "--config, or" in refuse("--nodes", 2)


def test_paths_that_the_container_does_not_see_are_named(config_file: Path, shards: Path) -> None:
    tiny = ["--config", config_file, "--stage", "pretrain", *ON_CPUS, "--nodes", 2, "--container", "org#glm:1"]

    def warnings(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in (*tiny, *words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stderr

    assert f"--mounts does not bring in what {config_file} reads: " in warnings()
    assert str(shards) in warnings()
    assert warnings("--mounts", f"{shards.parent.parent}:{shards.parent.parent}") == ""


def test_chain_is_written_with_the_order_of_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chain = [f"configs/glm45v/{name}.yaml" for name in ("pretrain", "long_context", "sft")]
    said = launch("--nodes", "32,32,16", *UNPLANNED, "--out", tmp_path / "jobs", "--chain", *chain, "train.seed=3")
    names = ["1_pretrain.sbatch", "2_long_context.sbatch", "3_sft.sbatch"]
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == names
    assert said.count("--dependency=afterok:JOB --kill-on-invalid-dep=yes") == 2
    assert "#SBATCH --nodes=16\n" in (tmp_path / "jobs" / names[2]).read_text()
    assert "2 numbers for 3 stages" in refuse("--nodes", "32,16", "--skip-files", "--out", "x", "--chain", *chain)
    twice = refuse("--nodes", 32, "--skip-files", "--out", "x", "--chain", chain[0], chain[0])
    assert "both write to train.output_dir" in twice


def test_error_in_the_data_of_a_chain_names_the_stage(config_file: Path, tmp_path: Path) -> None:
    second = tmp_path / "sft_lost.yaml"
    second.write_text(
        f"base: config.yaml\nmodel: {{init_from: {tmp_path}/run}}\ntrain: {{output_dir: {tmp_path}/sft}}\n"
        "data: {sources: [{path: nowhere}]}\n"
    )
    first = config_file.rename(tmp_path / "pretrain_first.yaml")
    (tmp_path / "config.yaml").symlink_to(first)
    words = ["--nodes", 1, *ON_CPUS, "--out", tmp_path / "jobs", "--chain", first, second]
    assert refuse(*words).startswith(f"error: {second}: nowhere does not exist")


# --- reinforcement learning -------------------------------------------------------------------------------------------

RL = ["--config", "configs/glm45v/rl.yaml", "--nodes", 16, *UNPLANNED]


def test_job_of_reinforcement_learning_has_nodes_that_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    script = launch(*RL, "--server-nodes", 4, "--setting", "SERVERS_PER_NODE=2", "--setting", "MAX_CRASHES=9")
    assert "#SBATCH --nodes=20\n" in script
    settings = script[: script.index("# shellcheck source")]
    names = ("SERVER_NODES", "SERVERS_PER_NODE", "SERVER_MODEL", "MAX_CRASHES")
    printed = settings + "".join(f'echo "${name}"\n' for name in names)
    done = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "2", "models/GLM-4.5V", "9"]


def test_chain_ends_with_reinforcement_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts from the weights of fine-tuning; its settings are not those of the other scripts."""
    monkeypatch.chdir(ROOT)
    chain = [f"configs/glm45v/{name}.yaml" for name in ("sft", "rl")]
    words = ["--nodes", 16, *UNPLANNED, "--out", tmp_path, "--server-nodes", 4, "--setting", "SERVER_PORT=9000"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--chain", *chain)], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    scripts = [(tmp_path / name).read_text() for name in ("1_sft.sbatch", "2_rl.sbatch")]
    assert ["#SBATCH --nodes=20\n" in script for script in scripts] == [False, True]
    assert ["SERVER_PORT" in script for script in scripts] == [False, True]
    assert "rollout.deadline=9: configs/glm45v/sft.yaml draws no rollouts" in refuse(
        *words, "--chain", *chain, "rollout.deadline=9"
    )


def test_model_of_servers_that_their_container_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = ["--setting", "SERVER_IMAGE=org#vllm:1", "--setting", "SERVER_MODEL=/models/GLM-4.5V"]
    words = [*RL, "--server-nodes", 4, "--container", "org#glm:1", *settings]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "does not bring in what configs/glm45v/rl.yaml reads: /models/GLM-4.5V" in done.stderr


def test_servers_that_cannot_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    four = [*RL, "--server-nodes", 4]
    assert "must divide the 8 GPUs of a node" in refuse(*four, "--setting", "SERVERS_PER_NODE=3")
    options = "SERVER_OPTIONS=--max-num-seqs 64 --generation-config=auto"
    assert "SERVER_OPTIONS has --generation-config, which is set already" in refuse(*four, "--setting", options)
    assert "set rollout.engine=vllm" in refuse(*four, "rollout.engine=sglang")
    assert "give one of them" in refuse(*four, "rollout.start=1", "rollout.start_python=python")
    assert "give --container and --setting SERVER_IMAGE" in refuse(*four, "--container", "org#glm:1")
    assert "has no effect without --server-nodes" in refuse(*RL, "--setting", "SERVER_MODEL=x")
    assert "tools.launch sets SERVER_NODES itself" in refuse(*RL, "--setting", "SERVER_NODES=2")
    assert "the scripts have CHECK_NODES, " in refuse(*RL, "--setting", "SERVER_NODE=2")
    assert "no stage draws rollouts" in refuse(
        "--config", "configs/glm45v/sft.yaml", "--nodes", 16, *UNPLANNED, "--server-nodes", 1
    )


def test_servers_that_a_job_does_not_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, [str(word) for word in RL], catch_exceptions=False)
    assert done.exit_code == 0
    assert "draws rollouts from http://server-1:8000, http://server-2:8000: they must answer when" in done.stderr


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.build(folder, chats=2, prompts=4, held_out=2)
    return folder


def test_prompts_of_a_run_are_checked_as_the_run_checks_them(
    digit_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model to start from is not there yet."""
    monkeypatch.chdir(ROOT)
    source = f"data.sources=[{{path: {digit_files}/shards/prompts}}]"
    held_out = f"validation.sources=[{{path: {digit_files}/shards/held_out}}]"
    words = ["--config", "configs/tiny/rl.yaml", *ON_CPUS, "--nodes", 1, f"data.tokenizer={digit_files}/tokenizer"]
    words += [source, held_out, "model.preset=tiny_dense", f"train.output_dir={tmp_path}/run"]
    assert "model.init_from=nowhere: there is no such folder" in refuse(*words, "model.init_from=nowhere")
    words += ["model.init_from=nowhere", "--after", 7]
    assert "rl.train" in launch(*words)
    assert "leave no room for the prompt" in refuse(*words, "rollout.max_thinking_tokens=1000")
    assert "are longer than the" in refuse(*words, "rollout.max_thinking_tokens=980")
    assert "reward.registry: missing.yaml: No such file" in refuse(*words, "reward.registry=missing.yaml")
    chats = f"data.sources=[{{path: {digit_files}/shards/chats}}]"
    assert "samples that are no prompts" in refuse(*words, chats)
