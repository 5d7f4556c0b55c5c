"""Recipes: what is read, and errors with the nearest known name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filter, Filtered, SetFilter
from data_pipeline.curation.recipe import FILTERS, parse_recipe, read_recipe, recipe_of
from data_pipeline.errors import DataError
from tests.data_pipeline.curation.samples import candidate

pytestmark = pytest.mark.fast


@dataclass
class Loud(Filter):
    """A user's own filter."""

    max_marks: int = 3

    def __call__(self, sample: Candidate) -> Filtered | None:
        marks = sample.text.count("!")
        return Filtered("loud", f"{marks} exclamation marks") if marks > self.max_marks else None


RECIPE = f"""
filters:
  - resolution: {{min_side: 32, domains: [image_text]}}
  - aspect
  - repeated_text: {{max_top_words: {{2: 0.5}}, report_only: true}}
  - {__name__}:Loud: {{max_marks: 1}}
recaption: {{command: cat, ratio: 0.25}}
shard_bytes: 1_000_000
"""


def test_a_recipe_is_read_and_written_back(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert [name for name, _ in recipe.filters] == ["resolution", "aspect", "repeated_text", f"{__name__}:Loud"]
    resolution, _, repeated, loud = (step for _, step in recipe.filters)
    assert (resolution.min_side, resolution.max_pixels, resolution.domains) == (32, 50_000_000, ["image_text"])  # type: ignore[union-attr]
    assert repeated.max_top_words == {2: 0.5, 3: 0.18, 4: 0.16}  # type: ignore[union-attr]
    assert repeated.report_only
    assert isinstance(loud, Filter)
    assert loud(candidate("No!!")) == Filtered("loud", "2 exclamation marks")
    assert recipe.recaption is not None
    assert recipe.recaption.ratio == 0.25
    assert recipe_of(recipe.text()) == recipe
    assert recipe_of(recipe.text()).fingerprint() == recipe.fingerprint()
    assert recipe_of(recipe.text().replace("0.25", "0.5")).fingerprint() != recipe.fingerprint()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"filter": []}, "did you mean filters"),
        ({"filters": {"aspect": {}}}, "give a list"),
        ({"filters": ["near_duplicate_image"]}, "did you mean near_duplicate_images"),
        ({"filters": ["contaminated_pictures"]}, "did you mean contaminated_images"),
        ({"filters": [{"albums": {"min_pictures": 3}}]}, "did you mean min_images"),
        ({"filters": [{"albums": {"min_words_per_picture": 3}}]}, "did you mean min_words_per_image"),
        ({"filters": ["zzz"]}, "there is no filter 'zzz': use one of resolution, aspect"),
        ({"filters": [{"aspect": {}, "albums": {}}]}, "not the name of one filter"),
        (
            {"filters": [{"resolution": {"min_sides": 3}}]},
            "resolution has no option 'min_sides': did you mean min_side",
        ),
        ({"filters": [{"resolution": {"min_side": "wide"}}]}, "resolution: .*wide"),
        ({"filters": [{"resolution": 64}]}, "not a mapping of options"),
        ({"filters": [{"aspect": {"domains": ["image"]}}]}, "did you mean image_text"),
        ({"filters": [{"language_mixing": {"expected": ["lattin"]}}]}, "did you mean latin"),
        ({"filters": [{"near_duplicate_images": {"distance": 30}}]}, "give 0 to 16 bits"),
        ({"filters": [{"near_duplicate_texts": {"similarity": 0}}]}, "more than 0"),
        ({"filters": [{"exact_duplicate_images": {"of": "pixel"}}]}, "give pixels or bytes"),
        (
            {"filters": [{"repeated_text": {"max_lines": 30}}]},
            "repeated_text.max_lines is 30: give a share from 0 to 1",
        ),
        ({"filters": [{"repeated_text": {"max_top_words": {2: 20}}}]}, r"max_top_words\[2\] is 20: give a share"),
        ({"filters": [{"repeated_text": {"max_repeated_words": {0: 0.1}}}]}, "a sequence of 0 words: give 1 or more"),
        ({"filters": [{"language_mixing": {"max_unexpected": 5}}]}, "max_unexpected is 5: give a share"),
        ({"filters": [{"video_integrity": {"max_black": -0.5}}]}, "max_black is -0.5: give a share"),
        ({"filters": [{"relevance": {"batch_size": -1}}]}, "relevance.batch_size is -1: give 1 or more"),
        ({"filters": ["nowhere:Filter"]}, "cannot be imported"),
        ({"filters": ["pathlib:Path"]}, "not a subclass"),
        ({"filters": [], "recaption": {}}, "either `command` or `endpoint`"),
        ({"filters": [], "recaption": {"command": "no-such-program -x"}}, "no program 'no-such-program'"),
        ({"filters": [], "recaption": {"endpoint": "http://localhost"}}, "model is empty"),
        ({"filters": [], "recaption": {"command": "cat", "ratio": 2}}, "a share from 0 to 1"),
        ({"filters": [], "recaption": {"command": "cat", "domains": ["image_txt"]}}, "did you mean image_text"),
        ({"filters": [], "recaption": {"command": "cat", "domains": ["chat"]}}, "'chat' .*: use image_text or ocr"),
        ({"filters": [], "recaption": {"command": "cat", "prompt": "Why?"}}, "recaption.prompt is for an endpoint"),
        ({"filters": [], "recaption": {"endpoint": "localhost:8000", "model": "m"}}, "give a URL, such as http://"),
        ({"filters": [], "shard_bytes": 0}, "positive"),
    ],
)
def test_mistakes_are_errors_that_say_how_to_fix_them(given: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_recipe(given)


def test_files_that_are_not_recipes_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for content in ("- aspect", "filters: [", "!!python/object/apply:os.getcwd []"):
        path.write_text(content)
        with pytest.raises(DataError):
            read_recipe(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")


def test_every_filter_documents_its_reasons_and_has_the_common_options() -> None:
    for name, kind in FILTERS.items():
        assert issubclass(kind, Filter | SetFilter)
        assert (kind.__doc__ or "").startswith("`"), f"the docstring of {name} must begin with its reasons"
        assert {"domains", "report_only"} <= {option.name for option in fields(kind)}
