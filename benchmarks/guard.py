"""What watching over a run costs: the agreement on stopping per step, and the watchdog's thread.

    torchrun --nproc_per_node 2 -m benchmarks.guard

The agreement is timed back to back, on processes that wait for nothing else. The thread is idle but for its beats; its
CPU time is that of the process while the main thread sleeps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.timing import cost
from model.backend import process_group_arguments
from training.distributed import process_group
from training.health import HealthConfig
from training.ranks import local_rank
from training.signals import StopRequests
from training.watchdog import Watchdog

STEPS = 3000
SECONDS = 10


def main() -> None:
    """Print the cost per step and per second, on rank 0."""
    with process_group(), tempfile.TemporaryDirectory() as folder:
        requests = StopRequests(Path(folder))
        watchdog = Watchdog(HealthConfig(), Path(folder), requests)
        times = []
        for step in range(STEPS):
            began = time.perf_counter()
            watchdog.mark(step, "data")
            watchdog.mark(step, "step")
            assert not requests.agree()
            times.append(time.perf_counter() - began)
        thread = cost(lambda: time.sleep(SECONDS))
        watchdog.close()
        if dist.get_rank() == 0:
            where = torch.device(process_group_arguments(local_rank()).get("device_id", "cpu"))
            print(f"{dist.get_world_size()} processes, {where}")
            print(f"per step:   {1e6 * statistics.median(times):.0f} us (median), {1e6 * max(times):.0f} us (longest)")
            print(f"per second: {1e6 * thread.cpu / thread.wall:.0f} us of CPU time in the watchdog's thread")


if __name__ == "__main__":
    main()
