"""Models made of AIMv2 and a language model: each half computes what it computed in transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from data_pipeline.encoding.batch import Batch
from model.config import GlmvConfig
from model.errors import ConfigError, WeightsError
from model.glmv import GlmvModel
from model.image_constants import PIXEL_MEAN, PIXEL_STD
from model.parallel import ParallelConfig
from model.vision import VisionEncoder, patch_coordinates
from model.weights.load import RandomWeights, SafetensorsFolder, load_weights
from tests.aimv2_folders import HUGE, edit_config, save_aimv2, save_decoder
from tests.reference import Text, forward_inputs, make_sample, pack
from tools.assembly import plan_assembly, write_assembly
from tools.hf_output import ConvertError

FEATURES = 1e-5  # largest difference, at features of scale 1


class Made(NamedTuple):
    aimv2: nn.Module
    language: Any  # transformers' model
    vision: Path
    decoder: Path
    out: Path


@pytest.fixture(scope="module", params=[("glm4_moe", "Apple"), ("glm4", "transformers")], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An assembled folder, and what it is made of."""
    decoder, naming = request.param
    root = tmp_path_factory.mktemp(decoder)
    aimv2 = save_aimv2(root / "aimv2", naming=naming)
    language = save_decoder(decoder, root / "decoder")
    write_assembly(plan_assembly(root / "aimv2", root / "decoder", seed=3), root / "out", max_shard_bytes=1_000_000)
    return Made(aimv2, language, root / "aimv2", root / "decoder", root / "out")


def our_model(folder: Path) -> GlmvModel:
    model = GlmvModel(GlmvConfig.from_hf(folder), ParallelConfig())
    load_weights([model], SafetensorsFolder(folder))
    return model


# --- the vision tower -------------------------------------------------------------------------------------------------


def image_of_336(seed: int = 0) -> Tensor:
    """Return uint8 [336, 336, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (336, 336, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def features_without_rope(tower: VisionEncoder, image: Tensor) -> Tensor:
    """Return what the tower gives to its downsample, [576, width] row by row, for rotary angles of zero."""
    grid = torch.tensor([[1, 24, 24]])
    rows, columns = patch_coordinates(grid)
    patches = image.view(24, 14, 24, 14, 3).transpose(1, 2)[rows, columns].reshape(576, 588)
    found: list[Tensor] = []
    hook = tower.downsample.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0]))
    frequencies = tower.inv_freq
    tower.inv_freq = torch.zeros_like(frequencies)
    tower(patches, grid, torch.tensor([1], dtype=torch.int32))
    tower.inv_freq = frequencies
    hook.remove()
    in_rows = torch.empty_like(found[0])
    in_rows[rows * 24 + columns] = found[0]
    return in_rows


@torch.no_grad()
def features_of_transformers(aimv2: nn.Module, image: Tensor) -> Tensor:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
    pixels = (image.permute(2, 0, 1).float() / 255 - mean) / std
    return aimv2(pixels[None]).last_hidden_state[0]


@pytest.mark.fast
def test_features_equal_those_of_aimv2(made: Made, single_process: None) -> None:
    expected = features_of_transformers(made.aimv2, image_of_336())
    found = features_without_rope(our_model(made.out).vision_model, image_of_336())
    assert 0.5 < expected.std() < 5
    assert (found - expected).abs().max() <= FEATURES


@pytest.mark.fast
def test_features_differ_where_a_frame_has_the_whole_weight(made: Made, single_process: None) -> None:
    model = our_model(made.out)
    with torch.no_grad():
        model.vision_model.patch_embed.weight.mul_(2)
    found = features_without_rope(model.vision_model, image_of_336())
    assert (found - features_of_transformers(made.aimv2, image_of_336())).abs().max() >= 1000 * FEATURES


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["Apple", "transformers"])
def test_features_at_full_size(naming: str, single_process: None, tmp_path: Path) -> None:
    """The whole tower beside a decoder of one layer that is as wide as the published ones."""
    aimv2 = save_aimv2(tmp_path / "aimv2", HUGE, naming)
    save_wide_decoder(tmp_path / "decoder")
    assembly = plan_assembly(tmp_path / "aimv2", tmp_path / "decoder")
    tower = [name for name in assembly.source.names() if name.startswith("model.visual.")]
    assert len([name for name in tower if "merger" not in name and "downsample" not in name]) == 173
    model = GlmvModel(assembly.config, ParallelConfig())
    load_weights([model], assembly.source)
    expected = features_of_transformers(aimv2, image_of_336())
    found = features_without_rope(model.vision_model, image_of_336())
    assert (found - expected).abs().max() <= FEATURES


def save_wide_decoder(folder: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 2048}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128}
    config = transformers.Glm4Config(**sizes, **heads, rms_norm_eps=1e-5, pad_token_id=0)
    model: Any = transformers.Glm4ForCausalLM(config)
    model.save_pretrained(folder)
    save_decoder("glm4", folder / "tiny")
    (folder / "tiny" / "tokenizer.json").rename(folder / "tokenizer.json")


# --- the decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_logits_of_text_equal_those_of_the_language_model(made: Made, single_process: None) -> None:
    model = our_model(made.out)
    one = make_sample(model.glmv_config, [Text(60)], seed=4)
    batch: Batch = pack([one], seq_length=len(one.encoded), segment_multiple=1)
    with torch.no_grad():
        found = model(**forward_inputs(batch))
        expected = made.language(torch.from_numpy(one.encoded.input_ids)[None]).logits[0]
    assert 0.1 < expected.std() < 5
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.fast
def test_the_rope_base_is_the_decoders_unless_it_is_chosen(made: Made) -> None:
    kept = plan_assembly(made.vision, made.decoder)
    assert kept.config.decoder.rope_theta == made.language.config.rope_parameters["rope_theta"]
    assert kept.config.decoder.max_position_embeddings == made.language.config.max_position_embeddings
    assert "the decoder's; --rope-theta changes it; GLM-4" in kept.notes[0]
    chosen = plan_assembly(made.vision, made.decoder, rope_theta=10_000, max_positions=65_536)
    assert chosen.config.decoder.rope_theta == 10_000
    assert chosen.config.decoder.max_position_embeddings == 65_536
    assert chosen.notes[0].startswith("rope base 10,000 (as given")


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_transformers_loads_every_tensor(made: Made) -> None:
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(made.out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == json.loads((made.out / "config.json").read_text())["architectures"][0]
    assert model.dtype == torch.float32
    assert (made.out / "tokenizer.json").read_bytes() == (made.decoder / "tokenizer.json").read_bytes()
    files = {path.name for path in made.out.iterdir()}
    assert files >= {"preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"}


@pytest.mark.fast
def test_new_tensors_depend_on_the_seed_alone(made: Made) -> None:
    folder = SafetensorsFolder(made.out)
    expected = RandomWeights(GlmvConfig.from_hf(made.out), seed=3)
    new = [name for name in folder.names() if "merger" in name or "downsample" in name]
    assert len(new) == 8
    for name in new:
        assert torch.equal(folder.tensor(name), expected.rows(name, 0, expected.shape(name)[0])), name


@pytest.mark.fast
def test_the_report_says_what_came_from_where(made: Made) -> None:
    report = json.loads((made.out / "assembly.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["vision tower", "adapter", "decoder"]
    total = sum(part["tensors"] for part in report["parts"])
    assert total == len(SafetensorsFolder(made.out).names())
    assert report["seed"] == 3
    if made.language.config.model_type == "glm4_moe":
        assert len(report["dropped"]) == 38 + 6  # a layer with 8 experts, and six tensors of its own
        assert all(name.startswith("model.layers.4.") for name in report["dropped"])
        assert "MTP" in report["choices"][2]
    else:
        assert report["dropped"] == []


def convert(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.convert", "assemble", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        **options,
    )


def test_the_command_says_what_it_does(made: Made, tmp_path: Path) -> None:
    halves = ("--vision", str(made.vision), "--decoder", str(made.decoder))
    done = convert(*halves, "--out", str(tmp_path / "out"), "--seed", "3", "--rope-theta", "10000", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "rope base 10,000 (as given; GLM-4" in done.stdout
    assert "random, seed 3" in done.stdout
    written, expected = SafetensorsFolder(tmp_path / "out"), SafetensorsFolder(made.out)
    assert sorted(written.names()) == sorted(expected.names())
    for name in written.names():
        assert torch.equal(written.tensor(name), expected.tensor(name).to(written.dtype(name))), name
        assert written.dtype(name) == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["rope_theta"] == 10_000
    again = convert(*halves, "--out", str(tmp_path / "out"))
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "is not empty" in again.stderr


@pytest.mark.slow
def test_a_killed_assembly_leaves_no_folder(made: Made, tmp_path: Path) -> None:
    """It is killed at a moment when some of its files are there, and the same command works afterwards."""
    halves = ("--vision", str(made.vision), "--decoder", str(made.decoder), "--out", str(tmp_path / "out"))
    command = [sys.executable, "-m", "tools.convert", "assemble", *halves, "--max-shard-size", "200kB"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(tmp_path.glob(".unfinished_out/*safetensors*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / ".unfinished_out")
    assert convert(*halves).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- full size, without the values ------------------------------------------------------------------------------------

# Keys of the published files, and the values of their weights.
AIR = {
    "head_dim": 128,
    "attention_bias": True,
    "rope_theta": 1_000_000,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
}
FULL_SIZE: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "glm4_moe": ("Glm4MoeForCausalLM", AIR, 18_106, 107_710_933_120),
    "glm4": ("Glm4ForCausalLM", {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}, 704, 10_292_777_472),
}
AIR_WITH_MTP = 110_468_824_832


def write_without_values(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """Write a safetensors file that has a header and a hole in the place of its values."""
    header: dict[str, Any] = {}
    position, width = 0, {"BF16": 2, "F32": 4}[dtype]
    for name, shape in shapes.items():
        stop = position + width * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def on_disk(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


@pytest.mark.fast
@pytest.mark.parametrize("model_type", FULL_SIZE)
def test_names_and_shapes_at_full_size(model_type: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    architecture, changes, tensors, values = FULL_SIZE[model_type]
    config = transformers.AutoConfig.for_model(model_type, **changes)
    with torch.device("meta"):
        shapes = on_disk(getattr(transformers, architecture)(config))
        sizes = {"image_size": 336, "use_head": False, **HUGE}
        aimv2 = on_disk(transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**sizes)))
    if model_type == "glm4_moe":
        shapes |= mtp_layer(shapes, 46)
        assert sum(map(prod, shapes.values())) == AIR_WITH_MTP
    assert len(aimv2) == 24 * 9 + 5
    write_without_values(tmp_path / "decoder", shapes)
    write_without_values(tmp_path / "aimv2", aimv2, dtype="F32")
    config.save_pretrained(tmp_path / "decoder")
    assembly = plan_assembly(tmp_path / "aimv2", tmp_path / "decoder", tokenizer=tokenizer_folder)
    found = {name: assembly.source.shape(name) for name in assembly.source.names()}
    assert (len(found), sum(map(prod, found.values()))) == (tensors, values)
    content = assembly.config.to_hf()
    with torch.device("meta"):
        model = getattr(transformers, content["architectures"][0])(transformers.AutoConfig.for_model(**content))
        assert found == on_disk(model)
    preset = GlmvConfig.from_preset("glm45v" if model_type == "glm4_moe" else "glm41v_9b")
    assert assembly.config.vision == preset.vision
    same: dict[str, Any] = {
        "rope_theta": 1e4,
        "max_position_embeddings": 65536,
        "eos_token_id": (0,),
        "pad_token_id": 0,
    }
    assert replace(assembly.config.decoder, **same) == replace(preset.decoder, **same)
    assert assembly.dtype == torch.bfloat16


def mtp_layer(shapes: dict[str, tuple[int, ...]], layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of GLM-4.5-Air's layer for a further token."""
    before = f"model.layers.{layer - 1}."
    own = {
        "embed_tokens.weight": (151552, 4096),
        "enorm.weight": (4096,),
        "hnorm.weight": (4096,),
        "eh_proj.weight": (4096, 8192),
        "shared_head.norm.weight": (4096,),
        "shared_head.head.weight": (151552, 4096),
    }
    block = {name.removeprefix(before): shape for name, shape in shapes.items() if name.startswith(before)}
    return {f"model.layers.{layer}.{name}": shape for name, shape in {**block, **own}.items()}


# --- what does not fit ------------------------------------------------------------------------------------------------


def native(root: Path) -> None:
    save_aimv2(root / "aimv2", is_native=True)


def another_width(root: Path) -> None:
    save_aimv2(
        root / "aimv2", {"hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 2}, num_attention_heads=4
    )


def another_image(root: Path) -> None:
    save_aimv2(root / "aimv2", image_size=448)


def with_a_head(root: Path) -> None:
    save_aimv2(root / "aimv2", use_head=True)


def no_aimv2(root: Path) -> None:
    save_decoder("glm4", root / "aimv2")


def older_glm(root: Path) -> None:
    edit_config(root / "decoder", model_type="chatglm")


def older_names(root: Path) -> None:
    path = root / "decoder" / "model.safetensors"
    save_file({f"transformer.encoder.layers.{name}": tensor for name, tensor in load_file(path).items()}, path)


def a_layer_too_many(root: Path) -> None:
    edit_config(root / "decoder", num_hidden_layers=3)


def scaled_rope(root: Path) -> None:
    edit_config(root / "decoder", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})


def a_size_in_words(root: Path) -> None:
    edit_config(root / "decoder", hidden_size="128")


def a_factor_in_words(root: Path) -> None:
    edit_config(root / "decoder", partial_rotary_factor="half", rope_parameters=None)


def no_convolution(root: Path) -> None:
    path = root / "aimv2" / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.patch_embed.weight"] = tensors["embeddings.patch_embed.weight"].flatten(1)
    save_file(tensors, path)


def tokenizer_of_text(root: Path) -> None:
    path = root / "decoder" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|image|>"]
    path.write_text(json.dumps(content))


MISFITS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "a native AIMv2": (native, WeightsError, r"no table of positions .* it is a '-native' AIMv2"),
    "an AIMv2 of another width": (another_width, WeightsError, "with an MLP of 112, .*as wide as the decoder, 128"),
    "an AIMv2 for other images": (another_image, WeightsError, "for images of 448 pixels; .* images have 336 pixels"),
    "an AIMv2 with a head": (with_a_head, WeightsError, r"that the vision tower of a GLM-V model has not: head\."),
    "no AIMv2": (no_aimv2, WeightsError, "it is not AIMv2"),
    "an older GLM-4": (older_glm, ConfigError, r"'chatglm' \(glm-4-9b before 0414.* take GLM-4.5-Air"),
    "the names of an older GLM-4": (older_names, WeightsError, "tensors of an older glm-4-9b"),
    "a layer too many": (a_layer_too_many, WeightsError, "there is a layer 3, which lacks enorm.weight"),
    "a size in words": (a_size_in_words, ConfigError, "config.json: hidden_size must be integers"),
    "a factor in words": (a_factor_in_words, ConfigError, "partial_rotary_factor must be numbers"),
    "no convolution": (no_convolution, WeightsError, r"patch_embed.weight is no convolution of images: \(96, 588\)"),
    "another rope": (scaled_rope, ConfigError, "rope_type 'yarn' is not supported"),
    "a tokenizer without images": (
        tokenizer_of_text,
        ConvertError,
        r"lacks the special tokens <\|image\|>.*--tokenizer",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    change, error, message = MISFITS[case]
    save_aimv2(tmp_path / "aimv2")
    save_decoder("glm4", tmp_path / "decoder")
    plan_assembly(tmp_path / "aimv2", tmp_path / "decoder")
    change(tmp_path)
    with pytest.raises(error, match=message):
        plan_assembly(tmp_path / "aimv2", tmp_path / "decoder")


@pytest.mark.fast
def test_a_tokenizer_of_another_folder_may_be_given(tmp_path: Path) -> None:
    save_aimv2(tmp_path / "aimv2")
    save_decoder("glm4", tmp_path / "decoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes((tmp_path / "decoder" / "tokenizer.json").read_bytes())
    tokenizer_of_text(tmp_path)
    assembly = plan_assembly(tmp_path / "aimv2", tmp_path / "decoder", tokenizer=tmp_path / "tokenizer")
    assert assembly.config.token_ids["<|image|>"] == GlmvConfig.from_preset("tiny_moe").image_token_id
