"""The streaming Ray run of every job: shards in, receipts out. A shard whose output exists is done."""

import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, UnserializableException

from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.base.errors import RunError, SettingError
from palindrome.pipeline.base.text import one_line, single_line
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runtime.actor import ShardActor, Work
from palindrome.pipeline.runtime.capacity import (
    actor_slots,
    has_autoscaler,
    no_capacity_error,
    schedulable_nodes,
    total_cpus,
)

SHARDS_PER_ACTOR = 2  # the next shard is read while this one is on the device
MAX_RETRIES = 2  # of a failing shard
MAX_FAILED_STARTS = 3  # actors in a row that may die before one is ready
START_BACKOFF = 2.0  # seconds before the second start; doubled for each further one
CAPACITY_TIMEOUT = 1800.0  # seconds with fewer ready actors than the minimum; a new node takes minutes to start
STALL_TIMEOUT = 600.0  # seconds without a batch read or a network evaluation
HEARTBEAT_SECONDS = 1.0
ERROR_LENGTH = 500  # characters of an error in a Failure


@dataclass(frozen=True)
class Heartbeat:
    """How many images of the shards in flight are done; yielded about once a second."""

    images: int


@dataclass(frozen=True)
class Resources:
    """`min_workers` to `workers` actors. Each one requires 1 CPU, `gpus` GPUs (1 or a fraction) and the `custom`
    resources; on CPUs it computes with `threads` threads. `decode_in_tasks`: Ray tasks read and decode the images."""

    workers: int
    gpus: float
    threads: int | None
    decode_in_tasks: bool
    min_workers: int = 1
    custom: Mapping[str, float] = field(default_factory=dict)

    @property
    def ray_options(self) -> dict[str, Any]:
        """What one actor requires, as Ray's options."""
        return {"num_cpus": 1, "num_gpus": self.gpus, "resources": dict(self.custom)}


def choose_resources(
    workers: Sequence[int],
    decode: str,
    gpus_per_worker: float | None = None,
    custom: Mapping[str, float] | None = None,
) -> Resources:
    """Resources for the nodes that have the `custom` resources: by default one actor per GPU, or as many as share one;
    without GPUs, one actor per node with all its CPUs. `workers` overrides that: (maximum,) or (minimum, maximum).

    `decode` is `actor`, `tasks` or `auto`: tasks if CPUs are left beside the actors. Raises SettingError for resources
    that no node has, unless an autoscaler may add such a node.
    """
    nodes, custom = schedulable_nodes(), dict(custom or {})
    gpus = gpus_per_worker or float(any(node.get("GPU") for node in nodes))
    slots = [actor_slots(node, gpus, custom) for node in nodes]
    if (gpus_per_worker or custom) and not any(slots) and not has_autoscaler():
        raise no_capacity_error(nodes, gpus, custom)
    usable = [node for node, count in zip(nodes, slots, strict=True) if count] or nodes
    maximum = workers[-1] if workers else (sum(slots) if gpus else len(usable)) or 1
    cpus, required = total_cpus(nodes), workers[0] if workers else maximum
    # A cluster without any CPU waits for its autoscaler.
    if decode == "tasks" and 0 < cpus <= required and not has_autoscaler():
        raise SettingError(f"{required} actors take all {cpus} CPUs of the cluster, and tasks need one more", "decode")
    in_tasks = decode == "tasks" or (decode == "auto" and cpus > maximum)
    threads = max(1, total_cpus(usable) // max(maximum, len(usable)))
    minimum = workers[0] if len(workers) == 2 else 1
    return Resources(maximum, gpus, None if gpus else threads, in_tasks, minimum, custom=custom)


@dataclass(eq=False)
class _Actor:
    handle: Any
    ready_ref: Any  # of the constructor's end; None once that has come
    in_flight: dict[Any, Shard] = field(default_factory=dict)  # by the ref to the receipt
    isolated: bool = False  # works on one quarantined shard and gets no other
    progress_ref: Any = None  # of the answer to the last progress request; None if none is pending
    requested_at: float = 0.0  # of that request
    images_done: int = 0  # of the shards in flight, by the last answer
    last_events: dict[str, tuple[int, float]] = field(default_factory=dict)  # by shard: event count, when it changed


class _Run:
    """The driver's loop.

    If an actor dies with several shards in flight, any of them may be the cause: they are quarantined, and each is
    retried on an actor that has no other shard. Only a shard that was alone is charged with an attempt."""

    def __init__(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution,
        stall_timeout: float,
    ) -> None:
        self.setup_ref, self.resources = ray.put((work, checkpoint, resources.threads, execution)), resources
        self.shards, self.stall_timeout = shards, stall_timeout
        self.pending: deque[Shard] = deque()  # read from the plan: enough to know how many actors there is work for
        self.retries: deque[Shard] = deque()
        self.quarantine: deque[Shard] = deque()
        self.attempts: Counter[str] = Counter()  # failed ones, by shard
        self.actors: list[_Actor] = []
        self.failed_starts = 0
        self.last_heartbeat = self.had_min_workers = time.monotonic()

    def outcomes(self) -> Generator[Receipt | Failure | Heartbeat, None, None]:
        try:
            while self._assign():
                self._check_capacity()
                yield from self._collect()
        finally:
            for actor in self.actors:
                ray.kill(actor.handle)

    def _assign(self) -> bool:
        """Starts missing actors and submits shards to those with a free slot; False once every shard is done."""
        self.pending.extend(islice(self.shards, self.resources.workers - len(self.pending)))
        while self._waiting() > sum(not a.in_flight for a in self.actors) and len(self.actors) < self._max_actors():
            self._start_actor()
        for actor in self.actors:
            if actor.ready_ref is not None or actor.isolated:
                continue
            if self.quarantine:
                if not actor.in_flight:
                    self._submit(actor, self.quarantine.popleft(), isolated=True)
                continue
            while len(actor.in_flight) < SHARDS_PER_ACTOR and (shard := self._next_shard()) is not None:
                self._submit(actor, shard)
        return self._waiting() > 0 or any(actor.in_flight for actor in self.actors)

    def _max_actors(self) -> int:
        """How many actors may be started by now. Decoding tasks need a CPU too, which is kept free once the minimum of
        actors has started. Actors beyond the nodes' capacity hold no CPU: they wait for the autoscaler."""
        most = self.resources.workers
        if not self.resources.decode_in_tasks or len(self.actors) < self.resources.min_workers:
            return most
        if len(self.actors) == most:
            return most
        nodes = schedulable_nodes()
        slots = sum(actor_slots(node, self.resources.gpus, self.resources.custom) for node in nodes)
        return most if slots < total_cpus(nodes) else min(most, total_cpus(nodes) - 1)

    def _check_capacity(self) -> None:
        """Raises RunError if shards have waited longer than CAPACITY_TIMEOUT for the minimum of actors."""
        ready = sum(actor.ready_ref is None for actor in self.actors)
        if ready >= self.resources.min_workers or not self._waiting():
            self.had_min_workers = time.monotonic()
        elif time.monotonic() - self.had_min_workers > CAPACITY_TIMEOUT:
            needed = self.resources.min_workers
            raise RunError(f"the cluster has no capacity: {ready} workers are up and {needed} are needed")

    def _waiting(self) -> int:
        """Shards read from the plan that wait for an actor."""
        return len(self.quarantine) + len(self.retries) + len(self.pending)

    def _next_shard(self) -> Shard | None:
        if self.retries:
            return self.retries.popleft()
        if not self.pending:
            self.pending.extend(islice(self.shards, 1))
        return self.pending.popleft() if self.pending else None

    def _start_actor(self) -> None:
        if self.failed_starts:
            time.sleep(START_BACKOFF * 2 ** (self.failed_starts - 1))
        options = {"max_restarts": 0, "max_concurrency": SHARDS_PER_ACTOR + 1, **self.resources.ray_options}
        actor = ray.remote(ShardActor).options(**options)
        handle = actor.remote([self.setup_ref])
        self.actors.append(_Actor(handle, handle.ready.remote()))

    def _submit(self, actor: _Actor, shard: Shard, isolated: bool = False) -> None:
        actor.isolated = isolated
        task = actor.handle.process.options(name=f"shard {shard.name}")
        actor.in_flight[task.remote(shard)] = shard

    def _collect(self) -> Iterator[Receipt | Failure | Heartbeat]:
        """Waits up to a second for receipts, errors and deaths."""
        owners = {r: actor for actor in self.actors for r in (actor.ready_ref, *actor.in_flight) if r is not None}
        done, _ = ray.wait(list(owners), timeout=1.0)
        yield from self._heartbeat()
        for ref in done:
            actor = owners[ref]
            if actor not in self.actors:  # another ref already reported this actor dead
                continue
            try:
                result = ray.get(ref)
            except (RayTaskError, UnserializableException) as e:  # raised by the shard; the actor lives on
                if isinstance(cause := getattr(e, "cause", None), RunError):  # no retry would help
                    raise RunError(str(cause)) from e
                yield from self._retry_or_fail(actor.in_flight.pop(ref), _error_line(e), self.retries)
                actor.isolated, actor.images_done, actor.progress_ref = False, 0, None
                continue
            except RayError as e:  # not only RayActorError: Ray raises OutOfMemoryError for an actor that it killed
                yield from self._handle_death(actor, e)
                continue
            if ref == actor.ready_ref:
                actor.ready_ref, self.failed_starts = None, 0
                continue
            del actor.in_flight[ref]
            # The receipt includes what was reported of this shard, and a pending progress answer may be outdated.
            actor.isolated, actor.progress_ref = False, None
            actor.images_done = max(0, actor.images_done - result.images)
            yield result

    def _heartbeat(self) -> Iterator[Failure | Heartbeat]:
        """At most once a second: reads the actors' progress answers and requests the next ones. An actor with a stalled
        shard, and one that does not answer, is killed."""
        now = time.monotonic()
        if now - self.last_heartbeat < HEARTBEAT_SECONDS:
            return
        self.last_heartbeat = now
        for actor in list(self.actors):
            if actor.progress_ref is not None and ray.wait([actor.progress_ref], timeout=0)[0]:
                try:
                    shards = ray.get(actor.progress_ref)
                except RayError:
                    shards = []  # the refs of its shards report its death
                actor.progress_ref, actor.images_done = None, sum(shard.images for shard in shards)
                before = actor.last_events
                found = {shard.shard: (shard.events, now) for shard in shards}
                actor.last_events = {
                    name: before[name] if name in before and before[name][0] == events[0] else events
                    for name, events in found.items()
                }
                for name, (_, since) in actor.last_events.items():
                    if now - since > self.stall_timeout:
                        yield from self._handle_stall(actor, name)
                        break
            elif actor.progress_ref is not None and actor.in_flight and now - actor.requested_at > self.stall_timeout:
                error = RayError(f"the actor has not answered for {self.stall_timeout:g} s")
                yield from self._handle_death(actor, error)
            if actor in self.actors and actor.ready_ref is None and actor.progress_ref is None:
                actor.progress_ref, actor.requested_at = actor.handle.in_flight.remote(), now
        yield Heartbeat(sum(actor.images_done for actor in self.actors))

    def _handle_stall(self, actor: _Actor, name: str) -> Iterator[Failure]:
        """Kills the actor of a stalled shard. Only that shard is charged with an attempt; its neighbour is retried."""
        self.actors.remove(actor)
        ray.kill(actor.handle)
        for shard in actor.in_flight.values():
            if shard.name == name:
                yield from self._retry_or_fail(shard, f"no progress for {self.stall_timeout:g} s", self.retries)
            else:
                self.retries.append(shard)

    def _handle_death(self, actor: _Actor, error: RayError) -> Iterator[Failure]:
        self.actors.remove(actor)
        ray.kill(actor.handle)  # an actor that is only unreachable would keep its GPU
        if actor.ready_ref is not None:
            self.failed_starts += 1
            if self.failed_starts == MAX_FAILED_STARTS:
                count, reason = MAX_FAILED_STARTS, _error_line(error)
                raise RunError(f"{count} actors in a row died before they were ready: {reason}") from error
        shards = list(actor.in_flight.values())
        if getattr(error, "preempted", False):  # its node was taken away: no shard is the cause
            self.retries.extend(shards)
        elif len(shards) == 1:
            yield from self._retry_or_fail(shards[0], _error_line(error), self.quarantine)
        else:
            self.quarantine.extend(shards)

    def _retry_or_fail(self, shard: Shard, reason: str, queue: deque[Shard]) -> Iterator[Failure]:
        self.attempts[shard.name] += 1
        if self.attempts[shard.name] > MAX_RETRIES:
            yield Failure(shard, reason)
        else:
            queue.append(shard)


def run_shards(
    work: Work,
    checkpoint: Checkpoint,
    shards: Iterator[Shard],
    resources: Resources,
    execution: Execution = FLOAT32,
    stall_timeout: float = STALL_TIMEOUT,
) -> Generator[Receipt | Failure | Heartbeat, None, None]:
    """Processes `shards`, which it reads as actors have free slots. Yields one outcome per shard, and heartbeats.

    A shard that fails, or makes no progress for `stall_timeout` seconds, is retried `MAX_RETRIES` times; a dead actor
    is replaced. Raises RunError if actors don't start. Closing the generator drops the shards in flight.
    """
    return _Run(work, checkpoint, shards, resources, execution, stall_timeout).outcomes()


def _error_line(error: Exception) -> str:
    """What a task raised; of Ray's own errors, which span many lines, the line that gives the reason."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if cause is not None:
        return one_line(cause, ERROR_LENGTH)
    lines = str(error).strip().splitlines()
    default = lines[0] if isinstance(error, OutOfMemoryError) else lines[-1]
    return single_line(next((line for line in lines if line.startswith("The actor is dead")), default))[:ERROR_LENGTH]
