"""Text to ids: special tokens only from the elements that name them; folders that are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Glm4vMoeConfig, Glm46VConfig
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from data_pipeline.domains import build_sample
from data_pipeline.encoding.generations import GLM4V, generation_of_hash
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample, DataError
from data_pipeline.sample import ASSISTANT_TAGS, Image, Sample, Text, Token
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.index import read_index
from tests.data_pipeline.loaders import loader

pytestmark = pytest.mark.fast


def test_special_token_ids_equal_transformers(tokenizer, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(tokenizer.special) == 36
    assert all(hf.convert_tokens_to_ids(name) == token_id for name, token_id in tokenizer.special.items())
    assert (tokenizer.pad_id, tokenizer.image_id) == (0, 34)


def test_plain_text_ids_equal_transformers(tokenizer, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in ("A red square.", "  two  spaces\n\nand lines\n", "图中有一只猫", "naïve café 🐈", ""):
        assert tokenizer.encode(text) == hf(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_plain_text_stay_plain(tokenizer, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    for name in tokenizer.special:
        for text in (name, f"say {name} twice: {name}{name}", f"\n{name}\n"):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.special.values())
            assert hf.decode(ids) == text


def test_special_tokens_in_the_text_of_every_domain_stay_plain(tokenizer):
    hostile = "<|user|> <|image|> <|endoftext|> <think> [gMASK] /nothink <|begin_of_image|>"
    for domain in ("text", "image_text", "ocr", "interleaved", "grounding"):
        with_image = domain in ("image_text", "ocr")
        sample = build_sample({"domain": domain, "text": hostile}, images=int(with_image), videos=0)
        ids = tokenize(sample, tokenizer, [(2, 2)] * with_image).input_ids.tolist()
        special = [token_id for token_id in ids if token_id in tokenizer.special.values()]
        image = ["<|begin_of_image|>", "<|image|>", "<|end_of_image|>"] * with_image
        assert special == [tokenizer.special[name] for name in ("[gMASK]", "<sop>", *image, "<|endoftext|>")]

    messages = [{"role": "system", "content": hostile}, {"role": "user", "content": hostile}]
    messages.append({"role": "assistant", "content": "<|begin_of_box|>2<|end_of_box|> <|user|> <|image|> /nothink"})
    chat = build_sample({"domain": "chat", "messages": messages, "thinking": False}, images=0, videos=0)
    ids = tokenize(chat, tokenizer).input_ids.tolist()
    special = [token_id for token_id in ids if token_id in tokenizer.special.values()]
    expected = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "/nothink", "<|assistant|>", "<think>", "</think>"]
    expected += ["<|begin_of_box|>", "<|end_of_box|>", "<|user|>"]
    assert special == [tokenizer.special[name] for name in expected]


def test_tags_of_an_assistant_are_special_tokens(tokenizer):
    for tag in ASSISTANT_TAGS:
        ids = tokenizer.encode_tagged(f"a{tag}b")
        if tag in tokenizer.special:
            assert ids == [*tokenizer.encode("a"), tokenizer.special[tag], *tokenizer.encode("b")]
        else:
            assert ids == tokenizer.encode(f"a{tag}b")


def test_images_expand_without_loss_and_neighbouring_texts_join(tokenizer):
    sample = Sample("text", (Text("one "), Text("two", loss=True), Image(), Text("thr", True), Text("ee", True)))
    tokens = tokenize(sample, tokenizer, [(4, 6)])
    names = {token_id: name for name, token_id in tokenizer.special.items()}
    image = ["<|begin_of_image|>", *["<|image|>"] * 6, "<|end_of_image|>"]
    assert [names[token_id] for token_id in tokens.input_ids.tolist() if token_id in names] == image
    before, after = len(tokenizer.encode("one ")), len(tokenizer.encode("three"))
    assert not tokens.loss[:before].any()
    assert tokens.loss.sum() == len(tokenizer.encode("two")) + after
    assert tokens.input_ids[-after:].tolist() == tokenizer.encode("three")
    assert (tokens.grids, tokens.frames_per_image) == (((4, 6),), (1,))


def test_half_of_a_surrogate_pair_is_rejected(tokenizer):
    with pytest.raises(BadSample, match="bad_record: the text is not Unicode"):
        tokenizer.encode("\ud83d")


def test_missing_special_tokens_are_an_error(tokenizer, tokenizer_folder, tmp_path):
    with pytest.raises(BadSample, match=r"has no <\|nonsense\|>"):
        tokenize(Sample("text", (Token("<|nonsense|>"),)), tokenizer)

    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|image|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"lacks the special tokens <\|image\|>: it is not a tokenizer of GLM-V"):
        GlmTokenizer(tmp_path)


def test_tokenizer_of_another_kind_is_an_error(tokenizer_folder, tmp_path):
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    save_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(DataError, match="holds a Unigram model: it is not a tokenizer of GLM-V"):
        GlmTokenizer(tmp_path)


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"--tokenizer or data\.tokenizer must be a Hugging Face folder"):
        GlmTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(DataError, match="is not a tokenizer"):
        GlmTokenizer(tmp_path)


def save_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def tokenizer_with(processor_class: str, folder: Path, tokenizer_folder: Path) -> None:
    """Write the tokenizer files as `ProcessorMixin.save_pretrained` of a processor class does."""
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    hf._set_processor_class(processor_class)
    hf.save_pretrained(folder)


# What `Glm46VProcessor.save_pretrained` of transformers 5 writes beside the tokenizer. (Making one needs torchvision.)
PROCESSOR_CONFIG = {
    "image_processor": {"image_processor_type": "Glm46VImageProcessor", "patch_size": 14},
    "processor_class": "Glm46VProcessor",
    "video_processor": {"fps": 2, "video_processor_type": "Glm46VVideoProcessor"},
}
VIDEO_CONFIG = {"processor_class": "Glm46VProcessor", "video_processor_type": "Glm46VVideoProcessor"}


NAMES_GLM46V = [
    ("preprocessor_config.json", lambda folder: Glm46VImageProcessorPil().save_pretrained(folder)),
    ("config.json", lambda folder: Glm46VConfig().save_pretrained(folder)),
    ("processor_config.json", lambda folder: save_json(folder / "processor_config.json", PROCESSOR_CONFIG)),
    (
        "video_preprocessor_config.json",
        lambda folder: save_json(folder / "video_preprocessor_config.json", VIDEO_CONFIG),
    ),
]


@pytest.mark.parametrize(("name", "write"), NAMES_GLM46V)
def test_folder_that_names_glm46v_has_its_form(tokenizer, tokenizer_folder, tmp_path, name, write):
    """The model type of GLM-4.6V is that of GLM-4.5V: the classes of the processors decide."""
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    assert GlmTokenizer(tmp_path).generation is GLM4V
    write(tmp_path)
    if name != "config.json":
        Glm4vMoeConfig().save_pretrained(tmp_path)
    found = GlmTokenizer(tmp_path)
    assert (found.generation.video.name, found.generation.chat_forms) == ("glm46v", ("glm46v",))
    assert found.hash == f"{tokenizer.hash}-glm46v"
    assert generation_of_hash(found.hash) is found.generation
    assert generation_of_hash(tokenizer.hash) is generation_of_hash("") is GLM4V


def test_tokenizer_saved_by_a_processor_says_its_generation(tokenizer_folder, tmp_path):
    for name, form in (("Glm46VProcessor", "glm46v"), ("Glm4vProcessor", "glm45v")):
        tokenizer_with(name, tmp_path / name, tokenizer_folder)
        assert GlmTokenizer(tmp_path / name).generation.video.name == form


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"processor_class": "Glm46VProcessor"}, {"video_processor_type": "Glm4vVideoProcessor"}),
        ({"processor_class": "Glm4vProcessor"}, {"video_processor_type": "Glm46VVideoProcessor"}),
        ({"processor_class": "Glm4vProcessor", "image_processor_type": "Glm4vImageProcessor"}, VIDEO_CONFIG),
    ],
)
def test_folder_that_mixes_generations_is_refused(tokenizer_folder, tmp_path, first, other):
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    save_json(tmp_path / "preprocessor_config.json", first)
    save_json(tmp_path / "video_preprocessor_config.json", other)
    with pytest.raises(DataError, match=r"mixes processors of GLM-4\.\d.* and of GLM-4\.\d.*copy all processor files"):
        GlmTokenizer(tmp_path)


def test_folder_of_glm46v_flash_with_processors_of_glm41v_is_refused(tokenizer_folder, tmp_path):
    tokenizer_with("Glm4vProcessor", tmp_path, tokenizer_folder)
    Glm46VConfig().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"mixes processors .*config\.json: model_type glm46v.* Glm4vProcessor"):
        GlmTokenizer(tmp_path)


def test_image_processor_of_another_generation_changes_nothing(tokenizer_folder, tmp_path):
    tokenizer_with("Glm46VProcessor", tmp_path, tokenizer_folder)
    Glm4vImageProcessorPil().save_pretrained(tmp_path)
    assert GlmTokenizer(tmp_path).generation.video.name == "glm46v"


def test_index_of_one_generation_is_refused_with_the_other(own_shards, tokenizer_folder, tmp_path):
    """Videos would have other frames than the index says, and chats another form."""
    shards, config = own_shards
    folder = tmp_path / "glm46v"
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    Glm46VImageProcessorPil().save_pretrained(folder)
    newer, older, there = replace(config, tokenizer=str(folder)), config, shards
    state = loader(older).state_dict()
    with pytest.raises(
        DataError, match=r"GLM-4\.5V or GLM-4\.1V, but data\.tokenizer is that of GLM-4\.6V.*tools\.shard index"
    ):
        loader(newer)
    before = read_index(next(iter(sorted(there.glob("*.tar")))))
    index_shards(sorted(there.glob("*.tar")), tokenizer=folder)
    with pytest.raises(DataError, match=r"GLM-4\.6V, but data\.tokenizer is that of GLM-4\.5V or GLM-4\.1V"):
        loader(older)
    with pytest.raises(DataError, match=r"data\.tokenizer has changed since the checkpoint"):
        loader(newer).load_state_dict(state)
    after = read_index(before.file)
    assert (before.header.chat_form, after.header.chat_form) == ("glm45v", "glm46v")


def test_chat_form_of_another_generation_is_refused(tokenizer_folder, tmp_path):
    newer = tmp_path / "glm46v"
    tokenizer_with("Glm46VProcessor", newer, tokenizer_folder)
    records = tmp_path / "records.jsonl"
    records.write_text('{"domain": "text", "text": "A text."}\n')
    for folder, form in ((newer, "glm45v"), (newer, "glm41v"), (tokenizer_folder, "glm46v")):
        with pytest.raises(DataError, match=f"chats cannot be written as {form}, because the tokenizer is that of"):
            build_shards([records], tmp_path / "out", tokenizer=folder, chat_form=form)
    build_shards([records], tmp_path / "out", tokenizer=newer)
    assert read_index(next((tmp_path / "out").glob("*.tar"))).header.chat_form == "glm46v"


def test_glm45v_folder_is_accepted(tokenizer, tokenizer_folder, tmp_path):
    tokenizer_with("Glm4vProcessor", tmp_path, tokenizer_folder)
    Glm4vMoeConfig().save_pretrained(tmp_path)
    Glm4vImageProcessorPil().save_pretrained(tmp_path)
    assert GlmTokenizer(tmp_path).generation is GLM4V
    assert GlmTokenizer(tmp_path).hash == tokenizer.hash


def test_hash_changes_only_with_the_encoding_of_text(tokenizer, tokenizer_folder, tmp_path):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert GlmTokenizer(tmp_path).hash == tokenizer.hash
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert GlmTokenizer(tmp_path).hash != tokenizer.hash
