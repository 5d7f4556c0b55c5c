"""Signals that reach a process where Python cannot run a handler, and children that share its handlers."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.processes import Processes
from training.signals import StopRequests


def test_signal_is_known_while_the_main_thread_waits_for_another_process(tmp_path: Path) -> None:
    store = dist.HashStore()

    def other_process(requests: StopRequests) -> int:
        """Send a signal, and let the main thread continue once the signal is known, or after a while."""
        os.kill(os.getpid(), signal.SIGUSR1)
        until = time.monotonic() + 5
        while not requests.received() and time.monotonic() < until:
            time.sleep(0.01)
        seen = requests.received()
        store.set("seen", "yes")
        return seen

    with StopRequests(tmp_path).listening() as requests, ThreadPoolExecutor(1) as threads:
        assert threading.current_thread() is threading.main_thread()
        seen = threads.submit(other_process, requests)
        store.wait(["seen"], timedelta(seconds=30))
        assert seen.result() == signal.SIGUSR1
        assert requests.received() == signal.SIGUSR1


def test_signal_to_a_child_is_no_request_to_its_parent(tmp_path: Path) -> None:
    with StopRequests(tmp_path).listening() as requests:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if requests.received() == signal.SIGTERM else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not requests.received()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.received() == signal.SIGTERM


def agreement(folder: str) -> str:
    """Rank 1 gets a signal while it waits in the agreement for rank 0, which learns of it and comes because of it."""
    with StopRequests(Path(folder)).listening() as requests:
        if dist.get_rank() == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        else:
            time.sleep(2)
            requests.answer()  # as the watchdog does when rank 1 has announced the request
        return requests.agree()


def test_process_that_waits_in_the_agreement_when_the_signal_comes(two_processes: Processes, tmp_path: Path) -> None:
    assert two_processes.run(agreement, folder=str(tmp_path)) == ["SIGUSR1 on rank 1"] * 2
