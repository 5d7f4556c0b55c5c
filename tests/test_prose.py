"""The tests' own text must be the same on every machine and in every version of Python."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests import prose

pytestmark = pytest.mark.fast

SHA256 = "7970a2a82604d8b71703b85616bc4b52f50ae5518b3659d02a57940c78561418"


def test_text_is_the_same_in_every_version_of_python() -> None:
    assert hashlib.sha256(prose.text().encode()).hexdigest() == SHA256


def test_text_fills_the_vocabulary_of_the_tests_tokenizer(tokenizer_folder: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(tokenizer_folder)) == 2048
