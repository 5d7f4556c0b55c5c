"""The warning about a folder whose chat template is not the one that a chat form follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.encoding.template_check import prompt_difference, template_difference

pytestmark = pytest.mark.fast


def folder_with(template: str, folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("form", ["glm45v", "glm46v"])
def test_own_template_is_the_form(form: str, tmp_path: Path) -> None:
    assert template_difference(tmp_path, form) is None
    assert template_difference(folder_with(CHAT_TEMPLATES[form], tmp_path), form) is None


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("{{- '[gMASK]<sop>' -}}", "{{- '[gMASK]' -}}", "chats"),
        ("{{- '/nothink' -}}", "{{- ' /nothink' -}}", "chats without thinking"),
        ("function.name + '\\n'", "function.name + ' '", "calls of tools"),
        ("'\\n</tool_response>'", "'</tool_response>'", "responses of tools"),
        ("{{- '[gMASK]<sop>' -}}", "{{- raise_exception('no') -}}", "chats"),
        ("{{- '[gMASK]<sop>' -}}", "{% broken", "chats"),
    ],
)
def test_what_differs_is_named(old: str, new: str, what: str, tmp_path: Path) -> None:
    template = CHAT_TEMPLATES["glm45v"]
    assert old in template
    assert template_difference(folder_with(template.replace(old, new), tmp_path), "glm45v") == what


@pytest.mark.parametrize("form", ["glm45v", "glm46v", "glm41v"])
def test_prompt_is_compared_alone(form: str, tmp_path: Path) -> None:
    assert prompt_difference(tmp_path, form) == "there is no chat template"
    assert prompt_difference(folder_with(CHAT_TEMPLATES[form], tmp_path), form) is None
    opened = CHAT_TEMPLATES[form].replace("'<|assistant|>\\n'", "'<|assistant|>\\n<think>'")
    assert opened != CHAT_TEMPLATES[form]
    assert "writes prompts with thinking differently" in str(prompt_difference(folder_with(opened, tmp_path), form))
    without = CHAT_TEMPLATES["glm45v"].replace("'/nothink'", "''")
    expected = None if form == "glm41v" else "the chat template writes prompts without thinking differently"
    assert prompt_difference(folder_with(without, tmp_path), form) == expected


def test_templates_of_the_generations_differ_in_responses(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATES["glm45v"]}))
    assert template_difference(tmp_path, "glm46v") == "responses of tools"
