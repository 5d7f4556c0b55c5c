"""Recognise folders of GLM-4.6V, whose model type may be that of GLM-4.5V (`glm4v_moe`) but which is not supported yet.

Its processors sample videos at other frames and write timestamps as "0.5 seconds", so neither the tokens nor the
patches of a video would be those of GLM-4.5V.
"""

from __future__ import annotations

from pathlib import Path

# The files of a Hugging Face folder that name classes or a model type.
CLASS_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "config.json",
)


def why_glm46v(folder: Path) -> str | None:
    """Return an error message if a file of the folder names a class or the model type of GLM-4.6V, else None."""
    for name in CLASS_FILES:
        path = folder / name
        if path.is_file() and b'"glm46v' in path.read_bytes().lower():
            return (
                f"{path} is of GLM-4.6V, which is not supported yet: it samples video frames and writes their "
                "timestamps differently; use a folder of GLM-4.5V or GLM-4.1V"
            )
    return None
