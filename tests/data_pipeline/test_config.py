"""The data.* keys as OmegaConf reads them, and values that cannot work."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError

pytestmark = pytest.mark.fast


def test_config_is_read_from_yaml_into_dataclasses():
    given = OmegaConf.create("{tokenizer: tok, sources: [{path: shards/a}, {path: b, weight: 2, name: books}]}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), given))
    assert isinstance(config, DataConfig)
    assert config.sources == [SourceConfig("shards/a"), SourceConfig("b", 2.0, "books")]
    assert [source.label() for source in config.sources] == ["a", "books"]
    assert [SourceConfig(path).label() for path in ("x/y/", ".", "s3://b/a-0?.tar", "https://h/a/?sig=1")] == [
        "y",
        ".",
        "a-0?.tar",
        "a",
    ]
    config.check()


def test_config_with_an_unknown_key_is_an_error():
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(OmegaConf.structured(DataConfig), {"image_max_token": 3})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sources": []}, "data.sources is empty"),
        ({"tokenizer": ""}, "data.tokenizer is empty"),
        ({"sources": [SourceConfig("")]}, "has no path"),
        ({"sources": [SourceConfig("a", 0.0)]}, "source 'a' has weight 0.0: give a positive weight"),
        ({"sources": [SourceConfig("a", float("inf"))]}, "source 'a' has weight inf: give a positive weight"),
        ({"sources": [SourceConfig("a", epochs=float("inf"))]}, "source 'a' has epochs inf: give 0 for endless"),
        ({"sources": [SourceConfig("x/a"), SourceConfig("y/a")]}, "two sources are called 'a'"),
        ({"image_max_tokens": 4}, "data.image_max_tokens is 4: it must be 8 or more"),
        ({"video_max_tokens": 7}, "data.video_max_tokens is 7: it must be 8 or more"),
        ({"segment_multiple": 0}, "data.segment_multiple is 0"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"cache_bytes": -1}, "data.cache_bytes is -1: give a number of bytes, or 0 to keep all shards"),
    ],
)
def test_config_value_that_cannot_work_is_an_error(changes, says):
    config = DataConfig(**{"tokenizer": "tok", "sources": [SourceConfig("a")], **changes})
    with pytest.raises(DataError, match=says):
        config.check()


ROOTS = [
    # data.root, path of a source, where its shards are
    ("", "captions", "captions"),
    ("/data", "captions/part-*.tar", "/data/captions/part-*.tar"),
    ("shards/", "captions", "shards/captions"),
    ("/data", "/elsewhere/captions", "/elsewhere/captions"),
    ("/data", "s3://bucket/captions", "s3://bucket/captions"),
    ("s3://bucket/shards/", "captions", "s3://bucket/shards/captions"),
    ("https://host/shards?sig=abc", "two words", "https://host/shards/two%20words?sig=abc"),
]


@pytest.mark.parametrize(("root", "path", "expected"), ROOTS)
def test_root_stands_before_relative_paths(root: str, path: str, expected: str) -> None:
    source = SourceConfig(path, weight=2.0, epochs=3.0)
    [located] = DataConfig(root=root, sources=[source]).located
    assert located.path == expected
    assert (located.label(), located.weight, located.epochs) == (source.label(), 2.0, 3.0)
