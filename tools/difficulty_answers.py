"""Models that answer prompts: a Hugging Face folder, run here, or a server with an OpenAI-compatible endpoint."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import Any, Protocol
from zlib import crc32

import requests
import torch

from common.urls import is_final, message, shown, with_retries
from data_pipeline.domains.documents import split_placeholders
from data_pipeline.encoding.encode import encode_record
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.file_types import file_type
from data_pipeline.sample import Image, Text
from data_pipeline.shards.reader import RawSample
from rl.engines.prompt_media import data_url
from rl.scoring import FORMS
from tools.exported import Exported, padded_inputs
from training.prompts import CHAT_FORMS, chat_form_of

DELAYS = (1.0, 5.0, 20.0)  # seconds before the second, third and fourth request
TIMEOUT = (10, 3600)  # seconds to connect, and for an answer


@dataclass(frozen=True)
class Answering:
    """How prompts are answered: from the model's whole distribution."""

    samples: int
    temperature: float
    max_tokens: int
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Return what describes a grading."""
        return asdict(self)

    def seed_of(self, name: str) -> int:
        """Return the seed of a prompt, which does not depend on the other prompts."""
        return crc32(f"{self.seed} {name}".encode())


@dataclass(frozen=True)
class Asked:
    """A prompt with its files."""

    name: str  # "shard.tar/KEY"
    raw: RawSample


class Answerer(Protocol):
    """A model."""

    form: str  # of its responses, one of rewards.answer.FORMS

    def answers(self, asked: Iterator[Asked]) -> Iterator[tuple[Asked, list[str] | BadSample]]:
        """Yield each prompt with its answers, with their special tokens, or why it cannot be asked."""
        ...


class HfModel:
    """A Hugging Face folder, run by transformers."""

    def __init__(self, exported: Exported, answering: Answering) -> None:
        self.exported, self.answering = exported, answering
        variant = exported.model.config.model_type
        tokenizer = exported.glm_tokenizer
        self._chat_form = (
            chat_form_of(variant, tokenizer) if variant in CHAT_FORMS else tokenizer.generation.chat_forms[0]
        )
        self.form = FORMS[self._chat_form]

    def answers(self, asked: Iterator[Asked]) -> Iterator[tuple[Asked, list[str] | BadSample]]:
        """See Answerer."""
        for prompt in asked:
            try:
                yield prompt, self._answers(prompt)
            except BadSample as error:
                yield prompt, error

    @torch.no_grad()
    def _answers(self, prompt: Asked) -> list[str]:
        exported, answering = self.exported, self.answering
        sample = encode_record(
            prompt.raw.record,
            prompt.raw.images,
            prompt.raw.videos,
            tokenizer=exported.glm_tokenizer,
            budget=exported.budget,
            chat_form=self._chat_form,
        )
        model, pad_id = exported.model, exported.glm_tokenizer.pad_id
        inputs = padded_inputs(
            [sample] * answering.samples, model.config.image_token_id, exported.preprocessor, pad_id=pad_id
        )
        ends = model.generation_config.eos_token_id or model.config.text_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        torch.manual_seed(answering.seed_of(prompt.name))
        rows = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=answering.max_tokens,
            do_sample=True,
            temperature=answering.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=ends,
            pad_token_id=pad_id,
        )[:, len(sample) :].tolist()
        return [exported.tokenizer.decode(list(takewhile(lambda token: token not in ends, row))) for row in rows]


class Server:
    """A server with an OpenAI-compatible endpoint for chats. Several prompts are answered at once."""

    form = "either"

    def __init__(self, url: str, model: str, answering: Answering, concurrency: int) -> None:
        self._url, self.model, self.answering, self._concurrency = url.rstrip("/"), model, answering, concurrency
        self._session = requests.Session()

    def answers(self, asked: Iterator[Asked]) -> Iterator[tuple[Asked, list[str] | BadSample]]:
        """See Answerer.

        Raises:
            DataError: The server does not answer, or not as it is asked to.
        """
        with ThreadPoolExecutor(self._concurrency) as pool:
            while batch := list(islice(asked, 4 * self._concurrency)):
                yield from zip(batch, pool.map(self._answers, batch), strict=True)

    def _answers(self, prompt: Asked) -> list[str] | BadSample:
        record, answering = prompt.raw.record, self.answering
        body = {
            "model": self.model,
            "messages": _messages(prompt.raw),
            **({"tools": record["tools"]} if record.get("tools") else {}),
            "n": answering.samples,
            "temperature": answering.temperature,
            "top_p": 1.0,
            "max_tokens": answering.max_tokens,
            "seed": answering.seed_of(prompt.name),
            "skip_special_tokens": False,
            "chat_template_kwargs": {"enable_thinking": record.get("thinking") is not False},
        }
        try:
            choices = with_retries(lambda: self._post(body), DELAYS)
            answers = [_text(choice["message"]) for choice in choices]
        except (KeyError, TypeError) as error:
            raise DataError(f"{shown(self._url)} does not answer as an OpenAI-compatible server ({error!r})") from None
        except requests.RequestException as error:
            if is_final(error) and error.response is not None and error.response.status_code in (400, 413, 422):
                return BadSample("refused_by_server", f"{error}: {error.response.text[:200]}")
            raise DataError(
                f"{shown(self._url)} does not answer ({message(error, self._url)}): start the server"
            ) from None
        if len(answers) != answering.samples:
            raise DataError(
                f"{shown(self._url)} gave {len(answers)} answers where {answering.samples} were asked for (n): "
                "--samples 1 asks for one, or use a server that supports n"
            )
        return answers

    def _post(self, body: dict[str, Any]) -> Any:
        response = self._session.post(f"{self._url}/chat/completions", json=body, timeout=TIMEOUT)
        response.raise_for_status()
        return response.json()["choices"]


def _text(answer: dict[str, Any]) -> str:
    """Return what the model wrote; some servers have its thought in a field of its own."""
    thought = answer.get("reasoning_content") or answer.get("reasoning") or ""
    return f"<think>{thought}</think>{answer.get('content') or ''}" if thought else str(answer["content"] or "")


def _messages(raw: RawSample) -> list[dict[str, Any]]:
    """Return the messages of a prompt in OpenAI's form, with its files as data: URIs."""
    images, videos = iter(raw.images), iter(raw.videos)
    messages = []
    for turn in raw.record["messages"]:
        parts: list[dict[str, Any]] = []
        for part in split_placeholders(turn["content"], loss=False):
            if isinstance(part, Text):
                parts.append({"type": "text", "text": part.text})
            else:
                kind, files = ("image_url", images) if isinstance(part, Image) else ("video_url", videos)
                parts.append({"type": kind, kind: {"url": _data_uri(next(files))}})
        media = any(part["type"] != "text" for part in parts)
        messages.append({"role": turn["role"], "content": parts if media else turn["content"]})
    return messages


def _data_uri(data: bytes) -> str:
    found = file_type(data)
    kind = mimetypes.guess_type(f"file.{found.extension}")[0] if found else None
    return data_url(kind or "application/octet-stream", data)
