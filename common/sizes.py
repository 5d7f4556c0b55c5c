"""Parse sizes in bytes as users write them: 5GB, 512MiB, 1G, 1000000."""

from __future__ import annotations

import re

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Return the number of bytes of a size: "5GB" is 5 * 10^9, "5GiB" and "5G" are 5 * 2^30 (as in GNU's tools).

    Raises:
        ValueError: `text` is not a positive size. The message says how to write one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?", text.strip().upper())
    if match and not (match[3] == "IB" and not match[2]):
        base = 1000 if match[3] == "B" else 1024
        size = int(float(match[1]) * base ** _POWERS[match[2]])
        if size > 0:
            return size
    raise ValueError(f"{text!r} is not a size: write it as 5GB (10^9 bytes each), 5GiB (2^30) or a number of bytes")
