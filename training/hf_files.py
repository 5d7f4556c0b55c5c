"""The Hugging Face files kept beside weights: configuration, tokenizer, chat template, preprocessors.

They are gathered when a checkpoint is written and copied unchanged into an export, so that transformers, vLLM and
SGLang preprocess as in training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from common.files import write_json, write_text
from data_pipeline.config import DataConfig
from data_pipeline.encoding.generations import generation_of, named_generation
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import MIN_PIXELS, PIXELS_PER_TOKEN
from model.config import ARCHITECTURES, ConfigError, GlmvConfig
from model.hf_config import CONFIG_FILE, add_old_rope_spelling, remove_quantization
from model.hf_file_names import GENERATION_CONFIG, PREPROCESSORS, PROCESSOR, TOKENIZER_FILES
from model.image_constants import PIXEL_MEAN, PIXEL_STD

CONFIG_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}  # names of dtypes in a config.json
INSIDE = {"image": "image_processor", "video": "video_processor"}
INHERITED = (CONFIG_FILE, GENERATION_CONFIG, *PREPROCESSORS.values(), PROCESSOR)

# Keys for which training has one value. With another, a served model would see other images than in training.
FIXED_PREPROCESSING = (
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def check_tokenizer(model: GlmvConfig, tokenizer: GlmTokenizer, start: Path | None) -> None:
    """Check that a tokenizer fits the model: the ids of the tokens that it gives a meaning to, and its processors.

    Args:
        model: what is trained.
        tokenizer: of the run; its folder decides how videos are sampled.
        start: the Hugging Face files of the run's start point, which checkpoints inherit.

    Raises:
        ConfigError: a token has another id, the vocabulary is larger than the model's, or the processors of the start
            point are those of another generation of models.
    """
    started = named_generation(start) if start else None
    if started and started != tokenizer.generation:
        raise ConfigError(
            f"the run starts from {start}, which has the processors of {started.models}, but data.tokenizer "
            f"{tokenizer.folder} has those of {tokenizer.generation.models}, or names none: videos would be trained on "
            "in another form than they are served in. Use the folder of the start point as data.tokenizer"
        )
    for name, expected in model.token_ids.items():
        if tokenizer.special[name] != expected:
            raise ConfigError(
                f"data.tokenizer {tokenizer.folder}: {name} has id {tokenizer.special[name]}, but the model's "
                f"configuration says {expected}; use the tokenizer that belongs to this model"
            )
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise ConfigError(
            f"data.tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, more than the model's vocab_size "
            f"{model.decoder.vocab_size}"
        )


def read_inherited(folder: Path | None, model: GlmvConfig) -> dict[str, str]:
    """Return the files that the run's checkpoints take over from its start point, by name.

    They are read once, since the folder may be removed during the run. They are not changed here, except for the
    length and the rope base of a `model` that the run has changed.

    Raises:
        ConfigError: a file is damaged, or a preprocessor describes other preprocessing than training does.
    """
    if folder is None:
        return {}
    inherited = {name: _read_object(folder / name) for name in INHERITED if (folder / name).is_file()}
    content = json.loads(inherited.get(CONFIG_FILE, "{}"))
    was_quantised = remove_quantization(content)  # training holds plain weights, whatever they were read from
    if content and (was_quantised or GlmvConfig.from_hf(folder) != model):
        set_positions(content, model)
        inherited[CONFIG_FILE] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    for kind, name in PREPROCESSORS.items():
        if name in inherited:
            _check_preprocessor(folder / name, kind, json.loads(inherited[name]))
        inside = json.loads(inherited.get(PROCESSOR, "{}")).get(INSIDE[kind])
        if isinstance(inside, dict):
            _check_preprocessor(folder / PROCESSOR, kind, inside)
    return inherited


def _read_object(file: Path) -> str:
    """Return the text of a file that holds a JSON object. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
        is_object = isinstance(json.loads(text), dict)
    except ValueError:  # not UTF-8, or not JSON
        is_object = False
    if not is_object:
        raise ConfigError(f"{file} is not a JSON object: restore it, or remove it to have one written")
    return text


def _check_preprocessor(file: Path, kind: str, content: dict[str, Any]) -> None:
    """Check that a preprocessor describes what training does. Raises ConfigError."""
    given = {key: value for key, value in content.items() if key in FIXED_PREPROCESSING}
    expected = preprocessor_config(kind, max_tokens=1)
    for key, value in given.items():
        if value != expected[key]:
            raise ConfigError(
                f"{file}: {key} is {value}, but training uses {expected[key]}; start from a folder of a published "
                "GLM-V model, or remove the file to have one written"
            )


def set_positions(content: dict[str, Any], model: GlmvConfig) -> None:
    """Write the model's length and rope base into the content of a config.json, wherever it already has them.

    transformers 4 keeps rope_theta beside the other keys of text_config, transformers 5 in rope_parameters; a file may
    have both, and repeat them at the top.
    """
    text = content["text_config"]
    text["max_position_embeddings"] = model.decoder.max_position_embeddings
    if "max_position_embeddings" in content:
        content["max_position_embeddings"] = model.decoder.max_position_embeddings
    nested = [level[key] for level in (text, content) for key in ("rope_parameters", "rope_scaling") if level.get(key)]
    for level in [level for level in (text, content, *nested) if "rope_theta" in level] or [text]:
        level["rope_theta"] = model.decoder.rope_theta


def write_hf_files(folder: Path, model: GlmvConfig, data: DataConfig, inherited: dict[str, str]) -> None:
    """Write all Hugging Face files into `folder`.

    Args:
        folder: an existing folder.
        model: what is trained.
        data: names the tokenizer's folder and the pixel budgets.
        inherited: content of files to take over; the others are made. Preprocessors get the run's pixel budgets, so
            that images are preprocessed as in training; a file that has them already stays as it is.
    """
    text = model.decoder
    newer = "glm46v" in (model.hf_type, generation_of(Path(data.tokenizer)).classes)
    budgets = {"image": data.image_max_tokens, "video": data.video_max_tokens}
    preprocessors = {kind: preprocessor_config(kind, budget, glm46v=newer) for kind, budget in budgets.items()}
    made = {
        CONFIG_FILE: model.to_hf(),
        "generation_config.json": {"eos_token_id": list(text.eos_token_id), "pad_token_id": text.pad_token_id},
        **{PREPROCESSORS[kind]: content for kind, content in preprocessors.items()},
    }
    sizes = {kind: content["size"] for kind, content in preprocessors.items()}
    kept = {name: _with_budgets(name, text, sizes) for name, text in inherited.items()}
    for name, content in made.items():
        if name not in kept:
            write_json(folder / name, content)
    for name, file_text in kept.items():
        write_text(folder / name, file_text)
    for name in TOKENIZER_FILES:
        if (file := Path(data.tokenizer) / name).is_file():
            shutil.copyfile(file, folder / name)


def config_json(hf_files: Path, config: GlmvConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a folder with the architecture and the dtype of an export.

    Args:
        hf_files: the folder.
        config: the model.
        dtype: of the exported weights.
    """
    content: dict[str, Any] = json.loads((hf_files / CONFIG_FILE).read_text())
    add_old_rope_spelling(content)
    remove_quantization(content)
    content["architectures"] = [ARCHITECTURES[config.hf_type]]
    # transformers 4 calls it torch_dtype, and may repeat it in both sections.
    for section in (content, content["text_config"], content["vision_config"]):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                section[key] = CONFIG_NAMES[dtype]
    if content.get("torch_dtype") is None:
        content["dtype"] = CONFIG_NAMES[dtype]
    return content


def _with_budgets(name: str, text: str, sizes: dict[str, dict[str, int]]) -> str:
    """Return the text of an inherited file with the pixel budgets `sizes`, or unchanged if it has them."""
    content = json.loads(text)
    kinds = {file: kind for kind, file in PREPROCESSORS.items()}
    if name in kinds:
        changed = {**content, "size": sizes[kinds[name]]}
    elif name == PROCESSOR:
        inside = {
            key: (content[key], sizes[kind]) for kind, key in INSIDE.items() if isinstance(content.get(key), dict)
        }
        changed = {**content, **{key: {**own, "size": size} for key, (own, size) in inside.items()}}
    else:
        return text
    return text if changed == content else json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def preprocessor_config(kind: str, max_tokens: int, *, glm46v: bool = False) -> dict[str, Any]:
    """Return the content of a preprocessor_config.json or video_preprocessor_config.json, in transformers' keys.

    Args:
        kind: image or video.
        max_tokens: the pixel budget, in image tokens.
        glm46v: name the processors of GLM-4.6V, which write the timestamps of videos in another way.
    """
    family = "Glm46V" if glm46v else "Glm4v"
    common = {
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": max_tokens * PIXELS_PER_TOKEN},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "processor_class": f"{family}Processor",
    }
    if kind == "image":
        return {**common, "image_processor_type": f"{family}ImageProcessor"}
    return {
        **common,
        "video_processor_type": f"{family}VideoProcessor",
        "fps": 2,
        "do_sample_frames": True,
        "max_duration": 300,
    }
