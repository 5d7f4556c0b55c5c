"""The rollouts of a run on disk.

RUN/rollouts/step_0000012.npz       the rollouts of an iteration (rl.rollouts), written before anything is scored
RUN/rollouts/step_0000012.jsonl     one line per rollout, to be looked at: text, answer, score and reason

A run that resumes and comes to an iteration whose file is there uses it again, where the same weights would draw the
same: nothing is drawn twice. So what an iteration after the newest checkpoint has drawn stays.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image

from common.files import remove_unfinished, write_text
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.image_files import decode_image
from model.checkpoint import latest_checkpoint, step_of
from rewards.verdict import Verdict
from rl.config import RlConfig
from rl.errors import RolloutError
from rl.reading import Prompt
from rl.rollouts import Rollout, RolloutsHead, fingerprint, read_rollouts, write_rollouts
from rl.scoring import Scorer
from training.metrics import logger, writes_to
from training.samples import decode

ROLLOUTS = "rollouts"  # folder in the run's
SHOWN_PROMPTS, SHOWN_IMAGES, THUMBNAIL = 32, 2, 160  # kept to be looked at: of an iteration, of a prompt; pixels


class RolloutFolder:
    """Finds and keeps rollouts and verdicts.

    Args:
        config: of the run.
        scorer: whose verdicts are kept.
        tokenizer: of the run.
    """

    def __init__(self, config: RlConfig, scorer: Scorer, tokenizer: GlmTokenizer) -> None:
        self.config, self.scorer, self.tokenizer = config, scorer, tokenizer
        self.run = Path(config.train.output_dir)
        self.folder = self.run / ROLLOUTS
        if dist.get_rank() == 0:
            remove_unfinished(self.folder)

    def _file(self, iteration: int, suffix: str = ".npz") -> Path:
        return self.folder / f"step_{iteration:07d}{suffix}"

    def find(self, head: RolloutsHead) -> list[Rollout] | None:
        """Return the rollouts on disk that the same weights have drawn, on all processes. Collective."""
        found: list[Any] = [None]
        file = self._file(head.iteration)
        if dist.get_rank() == 0 and file.is_file():
            try:
                written, rollouts = read_rollouts(file)
                found = [rollouts if written == head else None]
            except RolloutError as error:
                logger.warning("%s; they are drawn again", error)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def find_verdicts(self, head: RolloutsHead, count: int) -> list[Verdict] | None:
        """Return the verdicts on disk on these rollouts, by the same rules and judges, on all processes. Collective."""
        found: list[Any] = [None]
        file = self._file(head.iteration, ".jsonl")
        if dist.get_rank() == 0 and file.is_file():
            with suppress(ValueError, KeyError, TypeError):  # damaged: they are scored again
                with file.open(encoding="utf-8") as text:
                    lines = [json.loads(line) for line in text]
                if len(lines) == count and {line["scored_by"] for line in lines} <= {self._scored_by(head)}:
                    found = [[Verdict(line["score"], line["reason"]) for line in lines]]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _scored_by(self, head: RolloutsHead) -> str:
        """Return a hash of what the verdicts on a file's rollouts depend on."""
        return fingerprint({"drawn": asdict(head), "scored": self.scorer.settings()})

    def keep(self, head: RolloutsHead, rollouts: Sequence[Rollout]) -> None:
        """Write rollouts, before they are scored."""
        if dist.get_rank() == 0:
            with writes_to(self.folder):
                self.folder.mkdir(exist_ok=True)
                write_rollouts(self._file(head.iteration), head, rollouts)

    def keep_verdicts(
        self,
        head: RolloutsHead,
        rollouts: Sequence[Rollout],
        prompts: Sequence[Prompt],
        verdicts: Sequence[Verdict],
        group: int,
    ) -> None:
        """Write what people look at, and remove the files of old iterations. On the main process."""
        if dist.get_rank() > 0:
            return
        scored_by = self._scored_by(head)
        with writes_to(self.folder):
            lines = (
                json.dumps({**line, "scored_by": scored_by}, ensure_ascii=False)
                for line in self._lines(prompts, rollouts, verdicts, group)
            )
            write_text(self._file(head.iteration, ".jsonl"), "".join(f"{line}\n" for line in lines))
            if self.config.rollout.keep_last:
                is_saved = bool(self.config.checkpoint.save_interval)
                first = first_kept(self.run, head.iteration, self.config.rollout.keep_last, is_saved=is_saved)
                remove_before(self.folder, first)

    def _lines(
        self,
        prompts: Sequence[Prompt],
        rollouts: Sequence[Rollout],
        verdicts: Sequence[Verdict],
        group: int,
    ) -> Iterator[dict[str, Any]]:
        for place, ((_, prompt, record), span) in enumerate(zip(prompts, spans(len(prompts), group), strict=True)):
            images = [thumbnail(data) for data in prompt.images[:SHOWN_IMAGES]] if place < SHOWN_PROMPTS else []
            for rollout, verdict in zip(rollouts[span], verdicts[span], strict=True):
                yield {
                    "prompt": prompt.id,
                    "number": rollout.number,
                    "question": record.question,
                    "reference": record.reference,
                    "verifier": record.verifier,
                    "source": record.source,
                    "category": record.category,
                    "response": decode(rollout.tokens.tolist(), self.tokenizer),
                    "tokens": len(rollout.tokens),
                    "finish": rollout.finish,
                    "forced": rollout.forced,
                    "version": rollout.version,
                    "score": verdict.score,
                    "reason": verdict.reason,
                    **({"images": images} if images and rollout.number == rollouts[span][0].number else {}),
                }


def spans(groups: int, size: int) -> Iterator[slice]:
    """Yield the places of each group's rollouts."""
    return (slice(number * size, (number + 1) * size) for number in range(groups))


def first_kept(run: Path, iteration: int, keep_last: int, *, is_saved: bool) -> int:
    """Return the first iteration whose files stay: of the last ones, and of all since the newest checkpoint.

    Args:
        run: the run's folder.
        iteration: the last that was rolled out.
        keep_last: iterations that stay.
        is_saved: whether the run has checkpoints to resume from.
    """
    first = iteration - keep_last + 1
    if not is_saved:
        return first
    newest = latest_checkpoint(run)
    return min(first, step_of(newest) + 1 if newest else 1)


def remove_before(folder: Path, iteration: int) -> None:
    """Remove the files of earlier iterations. Those of later ones, from before a fall back, may be used again."""
    for file in folder.glob("step_*"):
        if file.suffix in (".npz", ".jsonl") and file.stem < f"step_{iteration:07d}":
            file.unlink()


def thumbnail(data: bytes) -> str:
    """Return a small JPEG of an image as base64."""
    buffer = io.BytesIO()
    image = Image.fromarray(decode_image(data))  # as in training, which reads files that Pillow alone would refuse
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
