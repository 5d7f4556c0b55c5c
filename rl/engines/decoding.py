"""Read prompts once and draw their groups of responses, with transformers' module and its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encoding.batch import EncodedSample
from model.routed_experts import NOT_ROUTED
from rl.engines.drawing import draw, uniforms
from rl.engines.forcing import Response, ResponseTokens
from rl.engines.kv_cache import KeyValueCache, PromptCache
from rl.engines.recording import RouterRecorder, recorded_routers
from rl.rollouts import Request, Rollout, RoutedExperts, Sampling
from training.pixel_values import pixel_values

READ_TOKENS = 2**14  # of prompts that are read together, with padding; a longer prompt is read alone
MASK_BYTES = 2**28  # of the mask of prompts that are read together


@dataclass
class _Row:
    """One response that is being drawn."""

    response: Response
    seed: int
    start: int  # position of its first token, on all three axes
    prompt_experts: np.ndarray | None  # uint8 [prompt tokens, layers with experts, experts per token], if recorded
    read: int = 0  # tokens of the response that the module has read
    experts: list[np.ndarray] = field(default_factory=list)  # of each token that was read, if recorded

    @property
    def waits(self) -> bool:
        """Whether the next token is to be drawn: the module has read all others."""
        return self.response.finish is None and self.read == len(self.response.tokens)

    @property
    def routed_experts(self) -> RoutedExperts | None:
        """The experts that were chosen, of a response that has finished; None if they were not recorded."""
        if self.prompt_experts is None:
            return None
        unread = np.full((1, *self.prompt_experts.shape[1:]), NOT_ROUTED, np.uint8)
        return RoutedExperts(self.prompt_experts, np.concatenate([*(each[None] for each in self.experts), unread]))


class Decoding:
    """Draws the responses to some requests together.

    Args:
        module: From `build_module`.
        image_id: <|image|>.
        special: The tokens that end a response.
        sampling: How tokens are drawn.
        on_token: Called after each token of all responses.
    """

    def __init__(
        self,
        module: Any,
        image_id: int,
        special: ResponseTokens,
        sampling: Sampling,
        on_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.module, self.image_id, self.special, self.sampling = module, image_id, special, sampling
        self.on_token = on_token
        self.device = module.device

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], version: int) -> list[list[Rollout]]:
        """Return the rollouts of each request, of weights of this version."""
        with recorded_routers(self.module) if self.sampling.routed_experts else nullcontext() as recorder:
            return self._generate(requests, version, recorder)

    def _generate(
        self, requests: Sequence[Request], version: int, recorder: RouterRecorder | None
    ) -> list[list[Rollout]]:
        samples = [request.prompt.sample for request in requests]
        copies = [len(request.seeds) for request in requests]
        read, experts = [], list[np.ndarray | None]()
        for part in _parts(samples):
            read.append(self._read(part))
            experts += [None] * len(part) if recorder is None else _of_prompts(recorder.take(), part)
        logits = torch.cat([last for _, last in read]).repeat_interleave(torch.tensor(copies, device=self.device), 0)
        cache = KeyValueCache([prompts for prompts, _ in read], copies)
        del read
        groups = [self._rows(request, chosen) for request, chosen in zip(requests, experts, strict=True)]
        self._draw([row for group in groups for row in group], cache, logits, recorder)
        return [
            [
                row.response.rollout(request, number, version, experts=row.routed_experts)
                for number, row in enumerate(group)
            ]
            for request, group in zip(requests, groups, strict=True)
        ]

    def _rows(self, request: Request, experts: np.ndarray | None) -> list[_Row]:
        prompt = request.prompt
        start = int(prompt.sample.position_ids.max()) + 1
        return [
            _Row(Response(self.special, self.sampling, prompt.thinks), seed, start, experts) for seed in request.seeds
        ]

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _read(self, samples: Sequence[EncodedSample]) -> tuple[PromptCache, Tensor]:
        """Return the keys and values of prompts, and the logits after each: float [prompts, vocabulary]."""
        longest = max(len(sample) for sample in samples)
        ids = np.zeros((len(samples), longest), dtype=np.int64)
        valid = np.zeros((len(samples), longest), dtype=bool)
        positions = np.zeros((3, len(samples), longest), dtype=np.int64)
        for row, sample in enumerate(samples):
            own = slice(longest - len(sample), None)
            ids[row, own], valid[row, own], positions[:, row, own] = sample.input_ids, True, sample.position_ids
        token_ids, is_token, places = (torch.from_numpy(each).to(self.device) for each in (ids, valid, positions))
        prompts = PromptCache(is_token)
        hidden = self._decode(self._embeddings(token_ids, samples), places, _reading_mask(is_token), prompts)
        return prompts, self.module.lm_head(hidden[:, -1])

    def _embeddings(self, token_ids: Tensor, samples: Sequence[EncodedSample]) -> Tensor:
        """Return the embeddings of prompts' tokens, image embeddings included: [prompts, tokens, hidden]."""
        model = self.module.model
        embeddings = model.language_model.embed_tokens(token_ids)
        with_images = [sample for sample in samples if sample.grids]
        if with_images:
            pixels = torch.cat([pixel_values(sample) for sample in with_images]).to(self.device)
            grids = torch.tensor([(1, *grid) for sample in with_images for grid in sample.grids], device=self.device)
            images = torch.cat(model.get_image_features(pixels, grids, return_dict=True).pooler_output)
            embeddings[token_ids == self.image_id] = images.to(embeddings.dtype)
        return embeddings

    def _decode(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Return hidden states [rows, tokens, hidden] of tokens at positions [3, rows, tokens]."""
        return self.module.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, past_key_values=cache
        ).last_hidden_state

    # --- responses ----------------------------------------------------------------------------------------------------

    def _draw(
        self, rows: Sequence[_Row], cache: KeyValueCache, logits: Tensor, recorder: RouterRecorder | None
    ) -> None:
        """Draw until every response has finished."""
        while True:
            self._add_tokens(rows, logits)
            self.on_token()
            left = [number for number, row in enumerate(rows) if row.response.finish is None]
            if not left:
                return
            if 2 * len(left) <= len(rows):  # finished rows are removed when they are half of all
                rows = [rows[number] for number in left]
                cache.select(left)
            logits = self._read_tokens(rows, cache)
            if recorder is not None:
                for row, chosen in zip(rows, recorder.take().cpu().numpy(), strict=True):
                    if row.response.finish is None:
                        row.experts.append(chosen)

    def _add_tokens(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Draw a token for every row that waits for one."""
        numbers = uniforms(
            np.array([row.seed for row in rows], np.uint64), np.array([len(row.response.tokens) for row in rows])
        )
        tokens, log_probs = draw(logits, self.sampling.temperature, torch.from_numpy(numbers).to(self.device))
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            if row.waits:
                row.response.add(token, log_prob)

    def _read_tokens(self, rows: Sequence[_Row], cache: KeyValueCache) -> Tensor:
        """Let the module read the next token of every row, and return the logits after it: [rows, vocabulary]."""
        ids, positions = np.zeros((2, len(rows)), np.int64)  # of a finished row it reads any token
        for number, row in enumerate(rows):
            if row.response.finish is None:
                ids[number], positions[number] = row.response.tokens[row.read], row.start + row.read
                row.read += 1
        token_ids, places = (torch.from_numpy(each).to(self.device) for each in (ids, positions))
        embeddings = self.module.model.language_model.embed_tokens(token_ids[:, None])
        cache.begin_token()
        hidden = self._decode(embeddings, places[None, :, None].expand(3, -1, -1), None, cache)
        return self.module.lm_head(hidden[:, 0])


def _reading_mask(valid: Tensor) -> Tensor | None:
    """Return the causal mask of prompts that are padded on the left, bool [prompts, 1, tokens, tokens]; or None.

    A token of padding attends to itself, because attention to nothing is not a number.
    """
    if bool(valid.all()):
        return None
    tokens = valid.size(1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device).tril()
    return (causal & valid[:, None] | torch.eye(tokens, dtype=torch.bool, device=valid.device))[:, None]


def _of_prompts(chosen: Tensor, samples: Sequence[EncodedSample]) -> list[np.ndarray]:
    """Return the experts of each prompt's tokens, of prompts that were read together, padded on the left.

    Args:
        chosen: uint8 [prompts * tokens, layers with experts, experts per token].
        samples: The prompts.

    Returns:
        uint8 [tokens, layers with experts, experts per token] for each prompt.
    """
    of_prompts = chosen.unflatten(0, (len(samples), -1)).cpu().numpy()
    # copied, because a part of an array keeps all of it
    return [experts[len(experts) - len(sample) :].copy() for experts, sample in zip(of_prompts, samples, strict=True)]


def _parts(samples: Sequence[EncodedSample]) -> Iterator[list[EncodedSample]]:
    """Divide prompts into runs that are read together."""
    part: list[EncodedSample] = []
    longest = 0
    for sample in samples:
        longest = max(longest, len(sample))
        if part and ((len(part) + 1) * longest > READ_TOKENS or (len(part) + 1) * longest**2 > MASK_BYTES):
            yield part
            part, longest = [], len(sample)
        part.append(sample)
    yield part
