"""The requests of one iteration over several servers: who computes what, and what becomes of a lost server's requests.

Every server has as many threads as it is sent requests at the same time. A thread takes a rollout of the group that its
server has begun, or else of the next group: a server computes a prompt once for its whole group, and a fast server
takes more groups. A server is lost that refuses connections, that does not answer /health in time, whose requests take
too long while it answers no other, or that draws with other weights than were published. Its requests go to the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from common.urls import shown
from rl.engines.forcing import Response
from rl.engines.prompt_media import ServedPrompt
from rl.engines.server import Draw, Drawn, RequestFailed, Server, ServerGone
from rl.engines.servers_config import ServersConfig
from rl.errors import EngineError

MAX_FAILURES = 2  # of the rollouts of a prompt: then the prompt is quarantined
log = logging.getLogger("glmv.rollouts")  # below the run's logger, so that warnings reach its log


@dataclass(eq=False)
class Job:
    """One rollout that is being drawn.

    Attributes:
        prompt: What the server is sent.
        response: The response so far.
        seed: Of the rollout.
        failures: How often it was lost or refused.
        turn: Rises when the rollout is given to another server: a late answer of the first is dropped.
    """

    prompt: ServedPrompt
    response: Response
    seed: int
    failures: int = 0
    turn: int = 0


@dataclass(eq=False)
class Place:
    """A server at work.

    Attributes:
        server: The server.
        lost: Why it takes no part; empty: it does.
        begun: Rollouts of the group that it has begun.
        running: Rollouts that it is drawing.
        answered: When its last answer came.
    """

    server: Server
    lost: str = ""
    begun: deque[Job] = field(default_factory=deque)
    running: set[Job] = field(default_factory=set)
    answered: float = 0.0


class Dispatch:
    """Draws the rollouts of one iteration.

    Args:
        places: The servers. A lost one stays lost.
        groups: The rollouts of each prompt.
        config: Limits of time and number.
        temperature: Of sampling.
        stop_ids: Tokens that end a response.
        version: Of the weights that may draw, as servers call them.

    Attributes:
        quarantined: The prompts that failed twice, with the reason.
    """

    def __init__(
        self,
        places: Sequence[Place],
        groups: Sequence[Sequence[Job]],
        config: ServersConfig,
        temperature: float,
        stop_ids: tuple[int, ...],
        version: str,
    ) -> None:
        self.quarantined: dict[str, str] = {}
        self._places, self._config, self._version = places, config, version
        self._temperature, self._stop_ids = temperature, stop_ids
        self._waiting = deque(deque(group) for group in groups)
        self._left = {job for group in groups for job in group}
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def run(self, on_wait: Callable[[], None]) -> None:
        """Draw until every rollout has ended, or its prompt is quarantined.

        Args:
            on_wait: Called again and again, at least once a second. What it raises ends the drawing.

        Raises:
            EngineError: No server is left, the deadline is over, or a server has read another prompt.
        """
        end = time.monotonic() + self._config.deadline
        try:
            self._start_threads()
            while self._left and not self._error:
                with self._changed:
                    self._changed.wait(1.0)
                if self._left and time.monotonic() > end:
                    raise EngineError(
                        f"{len(self._left)} rollouts have not ended after rollout.deadline={self._config.deadline:g} "
                        "seconds: raise it, add servers, or lower rl.prompts"
                    )
                on_wait()
            if self._error:
                raise self._error
        finally:
            with self._changed:
                self._left.clear()  # ends the threads
                self._changed.notify_all()

    def _start_threads(self) -> None:
        for place in self._places:
            if not place.lost:
                for _ in range(min(self._config.concurrency, len(self._left))):
                    threading.Thread(target=self._work, args=(place,), daemon=True).start()
                threading.Thread(target=self._watch, args=(place,), daemon=True).start()
        with self._changed:
            self._check_servers()

    # --- threads ------------------------------------------------------------------------------------------------------

    def _work(self, place: Place) -> None:
        """Let a server draw one rollout after another."""
        while job := self._take(place):
            turn, sent = job.turn, time.monotonic()
            try:
                drawn = place.server.draw(self._draw(job), self._config.request_deadline)
                self._accept(place, job, turn, drawn)
            except (ServerGone, RequestFailed) as error:
                silent = isinstance(error, ServerGone) and place.answered < sent
                is_gone = silent or not place.server.is_healthy(self._config.health_seconds)
                self._refuse(place, job, turn, str(error), is_gone=is_gone)
            except Exception as error:  # shown by the thread that waits
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()

    def _watch(self, place: Place) -> None:
        """Ask a server for its health as long as it has work."""
        while not place.lost and self._left:
            if not place.server.is_healthy(self._config.health_seconds):
                with self._changed:
                    self._lose(place, f"no answer to /health within {self._config.health_seconds:g} s")
                return
            with self._changed:
                self._changed.wait_for(lambda: place.lost or not self._left, self._config.health_seconds / 3)

    def _take(self, place: Place) -> Job | None:
        """Return the next rollout for a server; None: there is no more work for it."""
        with self._changed:
            self._changed.wait_for(lambda: place.begun or self._waiting or place.lost or not self._left or self._error)
            if place.lost or not self._left or self._error:
                return None
            if not place.begun:
                place.begun = self._waiting.popleft()
            job = place.begun.popleft()
            place.running.add(job)
            return job

    def _draw(self, job: Job) -> Draw:
        tokens = tuple(job.response.tokens)
        seed = _next_seed(job.seed, len(tokens)) if tokens else job.seed
        return Draw(job.prompt, tokens, job.response.budget, seed, self._temperature, self._stop_ids)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _accept(self, place: Place, job: Job, turn: int, drawn: Drawn) -> None:
        """Take an answer, and continue the response if it has not ended."""
        with self._changed:
            place.answered = time.monotonic()
            if job.turn != turn or job not in self._left:
                return
            check_prompt(job.prompt, job.response.tokens, drawn.prompt_ids)
            if set(drawn.versions) != {self._version}:
                names = " and ".join(drawn.versions)
                why = "another run publishes to it, or it was started again"
                self._lose(place, f"it draws with weights of version {names}, not {self._version}: {why}")
                return
            place.running.discard(job)
            job.response.extend(drawn.tokens, drawn.log_probs)
            if job.response.finish:
                self._left.discard(job)
            else:
                place.begun.appendleft(job)
            self._changed.notify_all()

    def _refuse(self, place: Place, job: Job, turn: int, reason: str, *, is_gone: bool) -> None:
        """Take a failure: of the server if it is gone, or else of the request."""
        with self._changed:
            if is_gone:
                self._lose(place, reason)
            elif job.turn == turn:
                place.running.discard(job)
                self._again([job], reason)

    def _lose(self, place: Place, reason: str) -> None:
        """Take a server out, and give its rollouts to the others."""
        if place.lost or not self._left:
            return
        place.lost = reason
        running, begun = [job for job in place.running if job in self._left], place.begun
        place.running, place.begun = set(), deque()
        others = sum(not other.lost for other in self._places)
        log.warning(
            f"rollouts: {shown(place.server.address)} is lost ({reason}); its {len(running) + len(begun)} rollouts go "
            f"to {others} other server{'s' * (others != 1)}"
        )
        if begun:
            self._waiting.appendleft(begun)
        self._again(running, f"{shown(place.server.address)}: {reason}")
        self._check_servers()

    def _again(self, jobs: Sequence[Job], reason: str) -> None:
        """Draw rollouts once more, or quarantine the prompts of those that have failed twice."""
        for job in jobs:
            job.turn += 1
            job.failures += 1
            if job.failures >= MAX_FAILURES:
                self._quarantine(job.prompt, reason)
        again = deque(job for job in jobs if job in self._left)
        if again:
            self._waiting.appendleft(again)
        self._changed.notify_all()

    def _quarantine(self, prompt: ServedPrompt, reason: str) -> None:
        if prompt.id not in self.quarantined:
            self.quarantined[prompt.id] = reason
            log.warning(f"rollouts: quarantined {prompt.id}, whose requests failed {MAX_FAILURES} times: {reason}")
        self._left = {job for job in self._left if job.prompt is not prompt}
        for queue in (*self._waiting, *(place.begun for place in self._places)):
            for job in [job for job in queue if job not in self._left]:
                queue.remove(job)
        self._waiting = deque(queue for queue in self._waiting if queue)

    def _check_servers(self) -> None:
        if self._left and all(place.lost for place in self._places):
            reasons = "; ".join(f"{shown(place.server.address)}: {place.lost}" for place in self._places)
            self._error = EngineError(
                f"no server of rollouts is left ({reasons}): start the servers again, and resume the run"
            )
        self._changed.notify_all()


def _next_seed(seed: int, drawn: int) -> int:
    """Return the seed of the tokens that follow `drawn` tokens: the same would draw with the same random numbers."""
    return int.from_bytes(blake2b(f"{seed}/{drawn}".encode(), digest_size=8).digest(), "little") >> 1


def check_prompt(prompt: ServedPrompt, response: Sequence[int], read: Sequence[int]) -> None:
    """Check that a server has read the tokens of training. Raises EngineError."""
    ours = [*prompt.ids, *response]
    if list(read) == ours:
        return
    fix = "start it with a folder of this run, whose processors have its data.image_max_tokens and video_max_tokens"
    if len(read) != len(ours):
        raise EngineError(f"the engine read {len(read)} prompt tokens for {prompt.id}, this run {len(ours)}: {fix}")
    place = next(n for n, (theirs, own) in enumerate(zip(read, ours, strict=True)) if theirs != own)
    raise EngineError(
        f"the engine read token {read[place]} at position {place} of {prompt.id}, this run {ours[place]}: {fix}"
    )
