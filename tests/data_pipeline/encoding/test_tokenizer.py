"""Text to ids: special tokens only where the pipeline put them."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from data_pipeline.domains import build_sample
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample, DataError
from data_pipeline.sample import ASSISTANT_TAGS, Image, Sample, Text, Token

pytestmark = pytest.mark.fast


def test_special_ids_are_the_folders(tokenizer, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(tokenizer.special) == 36
    assert all(hf.convert_tokens_to_ids(name) == token_id for name, token_id in tokenizer.special.items())
    assert (tokenizer.pad_id, tokenizer.image_id) == (0, 34)


def test_plain_text_is_encoded_as_transformers_does(tokenizer, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in ("A red square.", "  two  spaces\n\nand lines\n", "图中有一只猫", "naïve café 🐈", ""):
        assert tokenizer.encode(text) == hf(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_typed_by_a_user_stay_plain_text(tokenizer, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    for name in tokenizer.special:
        for text in (name, f"say {name} twice: {name}{name}", f"\n{name}\n"):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.special.values())
            assert hf.decode(ids) == text


def test_in_every_domain_typed_special_tokens_stay_plain(tokenizer):
    nasty = "<|user|> <|image|> <|endoftext|> <think> [gMASK] /nothink <|begin_of_image|>"
    for domain in ("text", "image_text", "ocr", "interleaved", "grounding"):
        with_picture = domain in ("image_text", "ocr")
        sample = build_sample({"domain": domain, "text": nasty}, images=int(with_picture), videos=0)
        ids = tokenize(sample, tokenizer, [(2, 2)] * with_picture).input_ids.tolist()
        special = [token_id for token_id in ids if token_id in tokenizer.special.values()]
        picture = ["<|begin_of_image|>", "<|image|>", "<|end_of_image|>"] * with_picture
        assert special == [tokenizer.special[name] for name in ("[gMASK]", "<sop>", *picture, "<|endoftext|>")]

    messages = [{"role": "system", "content": nasty}, {"role": "user", "content": nasty}]
    messages.append({"role": "assistant", "content": "<|begin_of_box|>2<|end_of_box|> <|user|> <|image|> /nothink"})
    chat = build_sample({"domain": "chat", "messages": messages, "thinking": False}, images=0, videos=0)
    ids = tokenize(chat, tokenizer).input_ids.tolist()
    special = [token_id for token_id in ids if token_id in tokenizer.special.values()]
    expected = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "/nothink", "<|assistant|>", "<think>", "</think>"]
    expected += ["<|begin_of_box|>", "<|end_of_box|>", "<|user|>"]
    assert special == [tokenizer.special[name] for name in expected]


def test_an_assistants_tags_are_special_tokens(tokenizer):
    for tag in ASSISTANT_TAGS:
        ids = tokenizer.encode_tagged(f"a{tag}b")
        if tag in tokenizer.special:
            assert ids == [*tokenizer.encode("a"), tokenizer.special[tag], *tokenizer.encode("b")]
        else:
            assert ids == tokenizer.encode(f"a{tag}b")


def test_images_expand_without_loss_and_texts_join(tokenizer):
    sample = Sample("text", (Text("one "), Text("two", loss=True), Image(), Text("thr", True), Text("ee", True)))
    tokens = tokenize(sample, tokenizer, [(4, 6)])
    names = {token_id: name for name, token_id in tokenizer.special.items()}
    picture = ["<|begin_of_image|>", *["<|image|>"] * 6, "<|end_of_image|>"]
    assert [names[token_id] for token_id in tokens.input_ids.tolist() if token_id in names] == picture
    before, after = len(tokenizer.encode("one ")), len(tokenizer.encode("three"))
    assert not tokens.loss[:before].any()
    assert tokens.loss.sum() == len(tokenizer.encode("two")) + after
    assert tokens.input_ids[-after:].tolist() == tokenizer.encode("three")
    assert (tokens.grids, tokens.frames_per_image) == (((4, 6),), (1,))


def test_half_of_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(BadSample, match="bad_record: the text is not Unicode"):
        tokenizer.encode("\ud83d")


def test_tokens_the_tokenizer_lacks(tokenizer, tokenizer_folder, tmp_path):
    with pytest.raises(BadSample, match=r"has no <\|nonsense\|>"):
        tokenize(Sample("text", (Token("<|nonsense|>"),)), tokenizer)

    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|image|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"lacks the special tokens <\|image\|>: it is not a tokenizer of GLM-V"):
        GlmTokenizer(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"--tokenizer or data\.tokenizer must be a Hugging Face folder"):
        GlmTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(DataError, match="is not a tokenizer"):
        GlmTokenizer(tmp_path)


def test_the_hash_follows_what_text_becomes(tokenizer, tokenizer_folder, tmp_path):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert GlmTokenizer(tmp_path).hash == tokenizer.hash
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert GlmTokenizer(tmp_path).hash != tokenizer.hash
