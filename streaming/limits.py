"""How much memory a conversion may use, and what follows from it: processes, and rows in memory at a time."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common.sizes import parse_size
from model.errors import ConfigError

MOST_PROCESSES = 8
LARGEST_BLOCK, SMALLEST_BLOCK = 2**24, 2**20
# Blocks that a process has in memory at once: rows as they are read, joined, in another dtype, and as they are written.
BLOCKS = 5


@dataclass(frozen=True)
class Limits:
    """What a conversion may use."""

    max_memory: int  # bytes, of all its processes together
    processes: int
    block_bytes: int


def plan_limits(max_memory: str, processes: int, smallest_block: int = SMALLEST_BLOCK) -> Limits:
    """Return how many processes convert, and how many bytes of rows each has in memory at a time.

    Args:
        max_memory: The limit, such as 4GiB; empty: none, where each process has the largest blocks.
        processes: How many convert; 0: as many as the machine has cores, up to 8, and the limit allows.
        smallest_block: Bytes of the fewest rows that can be converted at a time.

    Raises:
        ConfigError: The limit is no size, or too small.
    """
    try:
        limit = parse_size(max_memory) if max_memory else sys.maxsize
    except ValueError as error:
        raise ConfigError(f"--max-memory: {error}") from None
    if processes < 0:
        raise ConfigError(f"--processes {processes}: give 1 or more, or 0 to choose")
    smallest_block = 2 ** (smallest_block - 1).bit_length()
    base = resident_bytes(os.getpid())
    wanted = processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    smallest = base + wanted * (base + BLOCKS * smallest_block)
    if not processes:
        wanted = max(1, min(wanted, (limit - base) // (base + BLOCKS * LARGEST_BLOCK)))
        smallest = 2 * base + BLOCKS * smallest_block
    block = (limit - base - wanted * base) // (wanted * BLOCKS)
    if block < smallest_block:
        fewer = ", or fewer --processes" if wanted > 1 else ""
        raise ConfigError(
            f"--max-memory {max_memory} is too little: Python and its libraries take {base / 2**20:,.0f} MiB in each "
            f"of {wanted + 1} processes; give {-(-smallest // 2**20):,} MiB or more{fewer}"
        )
    # A power of two, so that the same command has the same blocks although Python's own memory varies a little.
    return Limits(limit, wanted, min(2 ** (block.bit_length() - 1), LARGEST_BLOCK))


def tree_bytes(processes: list[int]) -> int:
    """Return the memory of these processes together."""
    return sum(resident_bytes(process) for process in processes)


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
