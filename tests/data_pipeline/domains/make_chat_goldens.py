"""Make chat_goldens.json: chats with tools, as published chat templates render them.

The templates are not part of this project. Give the folder where you saved them:

    glm46v.jinja    chat_template.jinja of zai-org/GLM-OCR, whose processors are those of GLM-4.6V
    glm45v.jinja    the same, but with what zai-org/GLM-4.5 has for responses (`m.role == "tool"`)

    .venv/bin/python -m tests.data_pipeline.domains.make_chat_goldens FOLDER
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from tests.data_pipeline.domains.tool_chats import as_transformers, random_tool_chat

GOLDENS = Path(__file__).with_name("chat_goldens.json")
CHATS = 12  # of each form


def main() -> None:
    goldens = {}
    for form in ("glm45v", "glm46v"):
        template = (Path(sys.argv[1]) / f"{form}.jinja").read_text(encoding="utf-8")
        chats = []
        for seed in range(CHATS):
            record = random_tool_chat(random.Random(seed), form)
            [text], _ = render_jinja_template(
                conversations=[as_transformers(record["messages"])],
                tools=record.get("tools"),
                chat_template=template,
                enable_thinking=record["thinking"],
            )
            chats.append({"record": record, "rendered": text})
        goldens[form] = {"sha256": hashlib.sha256(template.encode()).hexdigest(), "chats": chats}
    lines = ",\n".join(
        f" {json.dumps(form)}: {json.dumps(golden, ensure_ascii=False)}" for form, golden in goldens.items()
    )
    GOLDENS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
