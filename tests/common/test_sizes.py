"""Sizes in bytes: both spellings, and what is not a size."""

from __future__ import annotations

import pytest

from common.sizes import parse_size

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("7B", 7),
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("5G", 5 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("64k", 2**16),
        ("2tb", 2 * 10**12),
    ],
)
def test_size_is_decimal_with_b_and_binary_with_ib(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 apples", "1iB", "1.2.3MB", "5GBB"])
def test_text_that_is_no_size_is_an_error_that_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"5GB .*5GiB"):
        parse_size(text)
