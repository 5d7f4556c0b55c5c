"""Rollouts by vLLM of a policy that is trained meanwhile, and what goes wrong without each of the precautions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from rl.engines.dispatch import check_prompt
from rl.engines.prompt_media import ServedPrompt, served_prompt
from rl.engines.server import Draw, Drawn, JsonApi
from rl.engines.servers import ServersEngine
from rl.engines.vllm import VllmServer
from rl.engines.vllm_process import VllmProcess
from rl.errors import EngineError
from rl.publishing import write_policy
from rl.rollouts import Rollout, RolloutPrompt
from tests.engines.engine_folders import ENGINES, exported_folder
from tests.engines.rollout_cases import (
    MAX_LENGTH,
    OPTIONS,
    SAMPLING,
    TOLERANCE,
    files_of,
    gap,
    image_prompts,
    make_engine,
    requests_of,
    server_processes,
    train,
)
from tests.engines.run_cases import requests_running
from tests.model.layout_cases import make_trainer
from tests.reference import small_config
from training.step import TrainStep

pytestmark = pytest.mark.timeout(1800)  # two servers start, and machines may be busy

MODELS = {"glm4v_moe": "GLM-4.5V", "glm4v": "GLM-4.1V"}
UPDATES = 5


@dataclass
class Case:
    """A policy, its engine with one server, and prompts with real images."""

    variant: str
    folder: Path  # an export: the tokenizer and the processors
    run: Path
    trainer: TrainStep
    engine: ServersEngine
    prompts: list[RolloutPrompt]

    @property
    def server(self) -> VllmServer:
        (address,) = server_processes()
        return VllmServer(address)

    def weights(self, version: int) -> Path:
        return self.run / f"weights/version_{version:07d}"

    def draw(self, iteration: int, prompts: list[RolloutPrompt], group: int = 4) -> list[Rollout]:
        return self.engine.generate(requests_of(prompts, iteration, group), SAMPLING)


@pytest.fixture(scope="module", params=MODELS)
def case(
    request: pytest.FixtureRequest,
    single_process: None,
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    variant, root = request.param, tmp_path_factory.mktemp(request.param)
    folder = exported_folder(MODELS[variant], tokenizer_folder, root)
    trainer = make_trainer(variant, str(folder), "", steps=100)
    engine = make_engine(variant, folder, root / "run", start=1)
    try:
        yield Case(variant, folder, root / "run", trainer, engine, image_prompts(variant, folder))
    finally:
        engine.close()


def biases(case: Case) -> torch.Tensor:
    (chunk,) = case.trainer.model_chunks
    found = [values for name, values in chunk.named_buffers() if name.endswith("expert_bias")]
    return torch.cat(found).clone() if found else torch.empty(0)


def test_rollouts_are_of_the_policy_before_and_after_updates(case: Case, tmp_path: Path) -> None:
    """The engine reads the tokens of training, and its log-probabilities are the policy's, for every version.

    `generate` has compared the prompts' tokens.
    """
    assert sum(bool(each.images) for each in case.prompts) >= 40
    assert len({len(each.sample) for each in case.prompts}) >= 20
    case.engine.publish(case.trainer, 0)
    rollouts = case.draw(0, case.prompts)
    largest, mean, tokens = gap(case.trainer, case.prompts, rollouts)
    print(f"{case.variant}: {len(rollouts)} rollouts, {tokens} tokens: largest {largest:.2g}, mean {mean:.2g}")
    assert len(rollouts) == 4 * len(case.prompts)
    assert tokens >= 3000
    assert largest <= TOLERANCE
    assert mean <= TOLERANCE / 10
    some, moved = case.prompts[::6], biases(case)
    for version in range(1, UPDATES + 1):
        train(case.trainer, case.variant, version)
        assert gap(case.trainer, case.prompts, rollouts[::4])[0] > 100 * TOLERANCE  # those of the version before
        case.engine.publish(case.trainer, version)
        rollouts = case.draw(version, some)
        largest, mean, tokens = gap(case.trainer, case.prompts, rollouts)
        print(f"{case.variant}, version {version}: {tokens} tokens: largest {largest:.2g}, mean {mean:.2g}")
        assert {each.version for each in rollouts} == {version}
        assert largest <= TOLERANCE
    if case.variant == "glm4v_moe":
        assert (biases(case) != moved).all()
    served = case.server.checksums()
    fresh = VllmProcess(str(ENGINES), case.weights(UPDATES), MAX_LENGTH, OPTIONS, tmp_path / "fresh.log")
    try:
        fresh.wait(400, lambda: None)
        assert fresh.server.checksums() == served
    finally:
        fresh.close()


# --- the precautions, each omitted ------------------------------------------------------------------------------------


def call_worker(server: VllmServer, method: str, **arguments: str) -> None:
    JsonApi(server.address).post("/collective_rpc", {"method": method, "kwargs": arguments}, 60)


def set_version(server: VllmServer, version: int) -> None:
    JsonApi(server.address).post("/update_weight_version", {"new_version": str(version)})


def named(case: Case, name: str) -> RolloutPrompt:
    (prompt,) = (each for each in case.prompts if each.id == name)
    return prompt


def drawn_alone(case: Case, prompt: RolloutPrompt, seed: int, most: int, stops: tuple[int, ...]) -> Rollout:
    """Return what the server draws in one request, without what `generate` checks."""
    served = served_prompt(prompt, GlmTokenizer(case.folder))
    drawn = case.server.draw(Draw(served, (), most, seed, 1.0, stops), 120)
    is_media = drawn.tokens[-1] in small_config(case.variant).token_ids.values()
    return Rollout(
        prompt_id=prompt.id,
        number=0,
        seed=seed,
        tokens=np.array(drawn.tokens),
        log_probs=np.array(drawn.log_probs, np.float32),
        inserted=np.zeros(len(drawn.tokens), bool),
        finish="media" if is_media else "truncated",
        forced=False,
        version=int(drawn.versions[-1].split()[0]),
    )


def test_experts_that_are_not_packed_again_are_noticed(case: Case) -> None:
    """With vLLM's own method to load weights, and everything else as it should be."""
    some = case.prompts[::8]
    case.engine.publish(case.trainer, 10)
    right = case.server.checksums()
    call_worker(case.server, "reload_weights", weights_path=str(case.weights(10)))
    wrong = case.server.checksums()
    different = sorted(name.rpartition(":")[2] for name in right if right[name] != wrong[name])
    largest = gap(case.trainer, case.prompts, case.draw(10, some))[0]
    print(f"{case.variant}: {len(different)} of {len(right)} tensors differ; largest {largest:.2g}")
    if case.variant == "glm4v":
        assert not different
        assert largest <= TOLERANCE
    else:
        assert len(different) == 6
        assert {name.rpartition(".")[2] for name in different} == {"w13_weight", "w2_weight"}
        assert largest > 100 * TOLERANCE
    case.engine.publish(case.trainer, 11)
    assert case.server.checksums() == right
    assert gap(case.trainer, case.prompts, case.draw(11, some))[0] <= TOLERANCE


def test_image_tokens_that_are_expanded_twice_are_noticed(case: Case) -> None:
    """The server takes them without an error."""
    case.engine.publish(case.trainer, 20)
    right = served_prompt(named(case, "horse.png"), GlmTokenizer(case.folder))
    twice = ServedPrompt(right.id, right.ids, right.ids, right.images, right.videos)
    found = [case.server.draw(Draw(each, (), 4, 1, 1.0, ()), 60) for each in (right, twice)]
    check_prompt(right, [], found[0].prompt_ids)
    message = rf"the engine read {len(found[1].prompt_ids)} prompt tokens for horse\.png, this run {len(right.ids)}"
    with pytest.raises(EngineError, match=message):
        check_prompt(twice, [], found[1].prompt_ids)


def test_keys_and_values_of_old_weights_are_noticed(case: Case) -> None:
    """The weights are loaded without a pause, and what is kept of prompts is used again.

    Of the caches only that of the images' embeddings is reset: without that vLLM 0.32 ends at the next prompt.
    """
    prompt = named(case, "astronaut.png")  # its tokens fill blocks of the cache
    assert len(prompt.sample) > 256
    case.engine.publish(case.trainer, 30)
    assert gap(case.trainer, [prompt], [drawn_alone(case, prompt, 1, 8, ())])[0] <= TOLERANCE
    train(case.trainer, case.variant, 6)
    case.engine.publish(case.trainer, 31)
    case.engine.publish(case.trainer, 32)
    drawn_alone(case, prompt, 1, 8, ())
    train(case.trainer, case.variant, 7)
    folder = case.weights(33)
    write_policy(case.trainer, folder, 33, hf_files=files_of(case.folder))
    call_worker(case.server, "load_policy", folder=str(folder))
    JsonApi(case.server.address).post("/reset_encoder_cache")
    set_version(case.server, 33)
    stale = gap(case.trainer, [prompt], [drawn_alone(case, prompt, 1, 8, ())])[0]
    case.server.load(folder, "33", 60)
    right = gap(case.trainer, [prompt], [drawn_alone(case, prompt, 1, 8, ())])[0]
    print(f"{case.variant}: with the old cache {stale:.2g}, without {right:.2g}")
    assert stale > 100 * TOLERANCE
    assert right <= TOLERANCE


# --- weights that change during a response ----------------------------------------------------------------------------


def wait_until_running(server: VllmServer, requests: int = 1) -> None:
    deadline = time.monotonic() + 60
    while requests_running(server.address) < requests:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def long_draw(case: Case, prompt: RolloutPrompt, tokens: int) -> Draw:
    return Draw(served_prompt(prompt, GlmTokenizer(case.folder)), (), tokens, 1, 1.0, ())


@contextmanager
def weights_as_they_were(trainer: TrainStep, old: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give the trainer the weights that it had, for a while."""
    held = tensors_of(trainer)
    new = {name: tensor.clone() for name, tensor in held.items()}
    for name, tensor in held.items():
        tensor.copy_(old[name])
    yield
    for name, tensor in held.items():
        tensor.copy_(new[name])


def tensors_of(trainer: TrainStep) -> dict[str, torch.Tensor]:
    (chunk,) = trainer.model_chunks
    return {name: each.detach() for name, each in (*chunk.named_parameters(), *chunk.named_buffers())}


def test_weights_wait_for_the_responses_that_are_being_drawn(case: Case) -> None:
    """All tokens of such a response are of the old weights, and so are their log-probabilities."""
    prompt, trainer = named(case, "horse.png"), case.trainer
    case.engine.publish(trainer, 40)
    old = {name: tensor.clone() for name, tensor in tensors_of(trainer).items()}
    train(trainer, case.variant, 8)
    with ThreadPoolExecutor(1) as thread:
        flight = thread.submit(case.server.draw, long_draw(case, prompt, 1200), 300)
        wait_until_running(case.server)
        assert not flight.done()
        case.engine.publish(trainer, 41)
        drawn = flight.result()
    assert len(drawn.tokens) == 1200
    assert [name.split()[0] for name in drawn.versions] == ["40"]
    rollout = before_first_image(case, prompt, drawn)
    with weights_as_they_were(trainer, old):
        of_old = gap(trainer, [prompt], [rollout])[0]
    of_new = gap(trainer, [prompt], [rollout])[0]
    print(f"{case.variant}: {len(rollout.tokens)} tokens, from the old weights {of_old:.2g}, from the new {of_new:.2g}")
    assert of_old <= TOLERANCE
    assert of_new > 100 * TOLERANCE
    assert gap(trainer, case.prompts, case.draw(41, case.prompts[::8]))[0] <= TOLERANCE


def before_first_image(case: Case, prompt: RolloutPrompt, drawn: Drawn) -> Rollout:
    """Return a response up to the first token of an image, after which it has no meaning."""
    media = small_config(case.variant).token_ids.values()
    end = next((place for place, token in enumerate(drawn.tokens) if token in media), len(drawn.tokens))
    return Rollout(
        prompt_id=prompt.id,
        number=0,
        seed=1,
        tokens=np.array(drawn.tokens[:end]),
        log_probs=np.array(drawn.log_probs[:end], np.float32),
        inserted=np.zeros(end, bool),
        finish="truncated",
        forced=False,
        version=0,
    )


def test_a_response_of_two_weights_is_not_taken(case: Case) -> None:
    """Another client changes the weights without waiting: the server continues the same responses."""
    prompts, server, api = case.prompts[::8], case.server, JsonApi(case.server.address)
    case.engine.publish(case.trainer, 50)
    folder = case.weights(51)
    train(case.trainer, case.variant, 9)
    write_policy(case.trainer, folder, 51, hf_files=files_of(case.folder))
    with ThreadPoolExecutor(2) as threads:
        flight = threads.submit(server.draw, long_draw(case, named(case, "horse.png"), 600), 300)
        drawing = threads.submit(case.draw, 50, prompts, 16)
        wait_until_running(server, 8)
        api.post("/pause?mode=keep", seconds=60)
        call_worker(server, "load_policy", folder=str(folder))
        set_version(server, 51)
        api.post("/resume")
        assert [name.split()[0] for name in flight.result().versions] == ["50", "51"]
        with pytest.raises(EngineError, match=r"it draws with weights of version .*51, not 50 of run-[0-9a-f]{8}: "):
            drawing.result()
    case.engine.publish(case.trainer, 52)
    rollouts = case.draw(52, prompts)
    assert {each.version for each in rollouts} == {52}
    assert gap(case.trainer, case.prompts, rollouts)[0] <= TOLERANCE


# --- tokens of images -------------------------------------------------------------------------------------------------


def test_a_policy_that_draws_images_ends_its_response(case: Case) -> None:
    """Without that, the response has an image token without an image, which cannot be trained on."""
    (chunk,) = case.trainer.model_chunks
    (name,) = (name for name, _ in chunk.named_parameters() if name.endswith("output_layer.weight"))
    image = small_config(case.variant).image_token_id
    case.engine.publish(case.trainer, 59)
    drawn = Counter(
        token for each in case.draw(59, case.prompts[::8]) for token in each.tokens[~each.inserted].tolist()
    )
    (often, _), *_ = drawn.most_common()
    with torch.no_grad():
        weight = chunk.get_parameter(name)
        weight[image] = 6 * weight[often]
    case.engine.publish(case.trainer, 60)
    rollouts = case.draw(60, case.prompts[::4])
    media = set(small_config(case.variant).token_ids.values())
    ended = [each for each in rollouts if each.finish == "media"]
    print(f"{case.variant}: {len(ended)} of {len(rollouts)} responses drew an image or video token")
    assert len(ended) >= 5
    for each in rollouts:
        assert (each.tokens[-1] in media) == (each.finish == "media")
        assert not media & set(each.tokens[:-1].tolist())
    assert gap(case.trainer, case.prompts, rollouts)[0] <= TOLERANCE
    by_id = {each.id: each for each in case.prompts}
    alone = [drawn_alone(case, by_id[each.prompt_id], each.seed, 24, ()) for each in ended[:12]]
    broken = [each for each in alone if image in each.tokens]
    assert len(broken) >= 2
    for each in broken:
        ids = np.concatenate([by_id[each.prompt_id].sample.input_ids, each.tokens])
        with pytest.raises(DataError, match="runs of"):
            rope_positions(ids == image, by_id[each.prompt_id].sample.grids)
