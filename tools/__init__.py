"""The commands that users call: `python -m tools.NAME` from the root of the clone. Only demo/ may import from here."""

import sys
from pathlib import Path

for _entry in map(Path, filter(None, sys.path)):
    # A checkout of Megatron-LM has a `tools` of its own, and its `megatron` hides the installed megatron-core.
    if (_entry / "pretrain_gpt.py").is_file() and (_entry / "megatron").is_dir():
        print(
            f"error: {_entry} on PYTHONPATH is a checkout of Megatron-LM, which hides this project's `tools` and the "
            "installed megatron-core: remove it from PYTHONPATH",
            file=sys.stderr,
        )
        raise SystemExit(2)
