"""Where a response ends, and where the end of a thought is inserted: cases written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from demo.tokenizer import train_tokenizer
from model.config import GlmvConfig
from rl.engines.forcing import Response, ResponseTokens
from rl.errors import EngineError
from rl.rollouts import Request, RolloutPrompt, Sampling
from training.samples import decode

pytestmark = pytest.mark.fast

# Tokens of the cases: t is a thought, a an answer, T </think>, e and E end a turn, m is a media token; the end of a
# thought that is inserted is T followed by n.
SPECIAL = ResponseTokens(ends=(ord("e"), ord("E")), media=(ord("m"),), think_end=ord("T"), forced=(ord("T"), ord("n")))


def response(drawn: str, *, thinking: int = 3, answer: int = 2, force: bool = True, thinks: bool = True) -> Response:
    made = Response(SPECIAL, Sampling(1.0, thinking, answer, force), thinks)
    made.extend([ord(token) for token in drawn], [-float(place) for place in range(len(drawn))])
    return made


def text(made: Response) -> str:
    return "".join(map(chr, made.tokens))


def test_drawn_token_whose_log_probability_is_no_number_is_not_inserted() -> None:
    """A model that fails gives such numbers: they must reach the comparison with the policy."""
    made = response("ttt")
    made.add(ord("a"), float("nan"))
    assert made.inserted == [False, False, False, True, True, False]


@pytest.mark.parametrize(
    ("drawn", "tokens", "finish", "budget"),
    [
        ("", "", None, 3),
        ("tt", "tt", None, 1),
        ("ttt", "tttTn", None, 2),
        ("ttT", "ttT", None, 2),
        ("T", "T", None, 2),
        ("Taa", "Taa", "truncated", 0),
        ("ttTae", "ttTae", "ended", 0),
        ("tE", "tE", "ended", 1),
        ("tte", "tte", "ended", 0),
        ("tm", "tm", "media", 1),
        ("Tm", "Tm", "media", 1),
    ],
)
def test_response_of_a_model_that_thinks(drawn: str, tokens: str, finish: str | None, budget: int) -> None:
    made = response(drawn)
    assert (text(made), made.finish, made.budget) == (tokens, finish, budget)
    assert made.forced == ("n" in tokens)


@pytest.mark.parametrize(("answer", "whole", "finish"), [("e", "tttTne", "ended"), ("aaa", "tttTnaa", "truncated")])
def test_answer_after_an_inserted_end(answer: str, whole: str, finish: str) -> None:
    made = response("ttt")
    made.extend([ord(token) for token in answer], [-9.0] * len(answer))
    assert (text(made), made.finish, made.forced) == (whole, finish, True)


def test_second_end_of_a_thought_is_a_token_as_others_are() -> None:
    assert text(response("TTa")) == "TTa"
    assert response("TTa").finish == "truncated"


@pytest.mark.parametrize(("drawn", "tokens", "finish"), [("aa", "aa", "truncated"), ("aTa", "aT", "truncated")])
def test_response_without_thinking_is_one_answer(drawn: str, tokens: str, finish: str) -> None:
    made = response(drawn, thinks=False)
    assert (text(made), made.finish, made.forced) == (tokens, finish, False)


@pytest.mark.parametrize(
    ("drawn", "tokens", "finish"),
    [
        ("tttt", "tttt", None),
        ("ttttt", "ttttt", "truncated"),
        ("Taaa", "Taa", "truncated"),
        ("ttttTa", "ttttT", "truncated"),
    ],
)
def test_without_force_nothing_is_inserted(drawn: str, tokens: str, finish: str | None) -> None:
    made = response(drawn, force=False)
    assert (text(made), made.finish, made.forced) == (tokens, finish, False)


def test_tokens_drawn_behind_the_end_are_dropped() -> None:
    assert text(response("Taeaaaa")) == "Tae"
    assert text(response("tttaaa")) == "tttTn"  # they were drawn without the inserted tokens


def test_rollout_marks_what_was_inserted() -> None:
    made = response("ttt")
    made.extend([ord("a"), ord("e")], [-0.5, -0.25])
    prompt = RolloutPrompt("a.tar/1", EncodedSample.empty(), (), (), thinks=True)
    rollout = made.rollout(Request(prompt, (5, 6)), number=1, version=4)
    assert (rollout.prompt_id, rollout.number, rollout.seed, rollout.version) == ("a.tar/1", 1, 6, 4)
    assert rollout.inserted.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    np.testing.assert_array_equal(rollout.log_probs, np.array([0, -1, -2, np.nan, np.nan, -0.5, -0.25], np.float32))
    assert (rollout.tokens.dtype, rollout.log_probs.dtype, rollout.inserted.dtype) == (np.int64, np.float32, bool)


@pytest.mark.parametrize(
    ("form", "said"),
    [("glm45v", "</think>\n"), ("glm46v", "</think>\n"), ("glm41v", "</think><answer>")],
)
def test_tokens_of_a_model(tmp_path: Path, form: str, said: str) -> None:
    train_tokenizer(["some text"] * 10, tmp_path, vocab_size=300)
    tokenizer = GlmTokenizer(tmp_path)
    tokens = ResponseTokens.of(GlmvConfig.from_preset("tiny_moe"), tokenizer, form)
    assert decode(tokens.forced, tokenizer) == said
    assert tokenizer.names[tokens.think_end] == "</think>"
    assert [tokenizer.names[token] for token in tokens.ends] == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    media = {f"<|{kind}|>" for kind in ("image", "video")} | {
        f"<|{side}_of_{kind}|>" for side in ("begin", "end") for kind in ("image", "video")
    }
    assert {tokenizer.names[token] for token in tokens.media} == media
    assert set(tokens.stops) == {*tokens.ends, *tokens.media}


def test_tokenizer_without_an_end_of_thoughts_is_refused(tmp_path: Path) -> None:
    train_tokenizer(["some text"] * 10, tmp_path, vocab_size=300)
    tokenizer = GlmTokenizer(tmp_path)
    del tokenizer.special["</think>"]
    with pytest.raises(EngineError, match="has no token </think>"):
        ResponseTokens.of(GlmvConfig.from_preset("tiny_moe"), tokenizer, "glm45v")
