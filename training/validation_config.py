"""The keys of validation: held-out data, and prompts to which the model's answers are shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.config import SourceConfig, check_sources
from model.errors import ConfigError
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds


@dataclass
class PromptConfig:
    """One prompt, with its images and videos before it or where it says <image> and <video>."""

    prompt: str = ""  # the question; of a document, its beginning, which may be empty if there is an image
    images: list[str] = field(default_factory=list)  # image files
    videos: list[str] = field(default_factory=list)  # video files
    answer: str = ""  # the expected answer, shown beside the model's
    document: bool = False  # continue a document, as in pretraining, instead of answering a chat
    thinking: bool = True  # whether the model thinks before it answers a chat

    def check(self, where: str) -> None:
        """Check the keys together.

        Raises:
            ConfigError: there is nothing to continue, or two keys contradict each other. The message begins with
                `where`.
        """
        if not (self.prompt or self.images or self.videos):
            raise ConfigError(f"{where} has no prompt, image or video: give prompt")
        if self.document and not self.thinking:
            raise ConfigError(f"{where}: a document has no thinking; remove thinking=false, or document=true")


@dataclass
class ValidationConfig:
    """Held-out data, and prompts to which the model's answers are shown."""

    sources: list[SourceConfig] = field(default_factory=list)  # held-out shards, in the form of data.sources
    interval: int = 0  # steps between validations, and one after the last step; 0: never
    # packs of a validation, in steps of train.global_batch_size packs; 0: as few as use each held-out sample once
    steps: int = 0
    allow_overlap: bool = False  # accept held-out shards that are also training shards
    samples: list[PromptConfig] = field(default_factory=list)  # prompts: a list of {prompt, images, answer, ...}
    samples_file: str = ""  # JSON Lines file of more prompts, with paths relative to its folder
    samples_interval: int = 0  # steps between pages of answers, and one after the last step; 0: never
    samples_max_tokens: int = 64  # longest answer; each token costs a forward pass of all prompts

    def check(self) -> None:
        """Check the keys together.

        Raises:
            ConfigError, DataError: two of them contradict each other, or a source or prompt cannot work.
        """
        at_least_0 = ("interval", "steps", "samples_interval")
        check_bounds("validation", self, {**dict.fromkeys(at_least_0, NOT_NEGATIVE), "samples_max_tokens": POSITIVE})
        if self.interval or self.sources:
            check_sources("validation.sources", self.sources)
        if self.samples_interval and not self.samples and not self.samples_file:
            raise ConfigError(
                f"validation.samples_interval={self.samples_interval}, but there are no prompts: give "
                "validation.samples or validation.samples_file, or set it to 0"
            )
        for number, prompt in enumerate(self.samples):
            prompt.check(f"validation.samples[{number}]")
