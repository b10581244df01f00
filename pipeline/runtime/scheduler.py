"""The streaming Ray run that every job uses: shards in, receipts out. A shard whose output exists is done."""

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
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runtime.actor import ShardActor, Work
from palindrome.pipeline.runtime.capacity import actors_on, cpus_of, grows, nodes_up, refusal

SHARDS_AN_ACTOR = 2  # the next shard is read while this one is on the device
RETRIES = 2  # of a failing shard
STARTS = 3  # actors that may die in a row before one is up
BACKOFF = 2.0  # seconds before the second start; doubled for each further one
ROOM = 1800.0  # seconds with fewer actors up than must be, after which the run ends: a node takes minutes to start
STALL = 600.0  # seconds without a batch read or a network evaluation, after which a shard is tried elsewhere


@dataclass(frozen=True)
class Heartbeat:
    """How many images of the shards in flight are done; said about once a second."""

    images: int


@dataclass(frozen=True)
class Resources:
    """At most `workers` actors, at least `fewest`, and what each takes of the cluster: `gpus` 1 or a part of one, or on
    CPUs `threads` computing threads, and of `custom` resources so much."""

    workers: int
    gpus: float
    threads: int | None
    read_by_tasks: bool
    fewest: int = 1
    custom: Mapping[str, float] = field(default_factory=dict)

    @property
    def takes(self) -> dict[str, Any]:
        """What one actor takes, as Ray's options."""
        return {"num_cpus": 1, "num_gpus": self.gpus, "resources": dict(self.custom)}


def fit(
    workers: Sequence[int],
    decode: str,
    gpus_per_worker: float | None = None,
    custom: Mapping[str, float] | None = None,
) -> Resources:
    """One actor a GPU, or as many as share one, or one for all CPUs of a node where there is no GPU, on the nodes that
    have the `custom` resources, unless `workers` says otherwise: how many, or how many at least and at most.

    `decode` is `actor`, `tasks`, or `auto`: tasks where CPUs are left for them beside the actors. Raises SettingError
    for what no node has, where there is no autoscaler that might start one.
    """
    nodes, custom = nodes_up(), dict(custom or {})
    gpus = gpus_per_worker or float(any(node.get("GPU") for node in nodes))
    room = [actors_on(node, gpus, custom) for node in nodes]
    if (gpus_per_worker or custom) and not any(room) and not grows():
        raise refusal(nodes, gpus, custom)
    places = [node for node, actors in zip(nodes, room, strict=True) if actors] or nodes
    count = workers[-1] if workers else (sum(room) if gpus else len(places)) or 1
    cpus, must = cpus_of(nodes), workers[0] if workers else count
    if decode == "tasks" and 0 < cpus <= must and not grows():  # of a cluster of no CPU, nodes are to come
        raise SettingError(f"{must} actors take all {cpus} CPUs of the cluster, and tasks need one more", "decode")
    by_tasks = decode == "tasks" or (decode == "auto" and cpus > count)
    threads = max(1, cpus_of(places) // max(count, len(places)))
    fewest = workers[0] if len(workers) == 2 else 1
    return Resources(count, gpus, None if gpus else threads, by_tasks, fewest, custom=custom)


@dataclass(eq=False)
class _Actor:
    handle: Any
    starting: Any  # resolves when the constructor is through; None from then on
    shards: dict[Any, Shard] = field(default_factory=dict)  # in flight, by the reference to the receipt
    alone: bool = False  # what is in flight is a suspect
    pulse: Any = None  # resolves to how far what is in flight is
    asked: float = 0.0  # when
    images: int = 0  # done of what is in flight, by the last pulse
    events: dict[str, tuple[int, float]] = field(default_factory=dict)  # by shard: how many, and when that was new


class _Run:
    """The driver's loop. A shard whose actor died is a suspect and is tried alone, so that no neighbour is blamed."""

    def __init__(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution,
        stall: float,
    ) -> None:
        self.given, self.resources = ray.put((work, checkpoint, resources.threads, execution)), resources
        self.shards, self.stall = shards, stall
        self.ahead: deque[Shard] = deque()  # read from the plan: enough to know how many actors there is work for
        self.retries: deque[Shard] = deque()
        self.suspects: deque[Shard] = deque()
        self.attempts: Counter[str] = Counter()
        self.actors: list[_Actor] = []
        self.failed_starts = 0
        self.pulsed = self.roomy = time.monotonic()

    def outcomes(self) -> Generator[Receipt | Failure | Heartbeat, None, None]:
        try:
            while self._assign():
                self._check_room()
                yield from self._collect()
        finally:
            for actor in self.actors:
                ray.kill(actor.handle)

    def _assign(self) -> bool:
        """Starts the actors that are missing and gives shards to those with room; False when all is done."""
        self.ahead.extend(islice(self.shards, self.resources.workers - len(self.ahead)))
        while self._left() > sum(not a.shards for a in self.actors) and len(self.actors) < self._most():
            self._start()
        for actor in self.actors:
            if actor.starting is not None or actor.alone:
                continue
            if self.suspects:
                if not actor.shards:
                    self._give(actor, self.suspects.popleft(), alone=True)
                continue
            while len(actor.shards) < SHARDS_AN_ACTOR and (shard := self._next()) is not None:
                self._give(actor, shard)
        return self._left() > 0 or any(actor.shards for actor in self.actors)

    def _most(self) -> int:
        """Actors that there may be by now. Tasks that read need a CPU too, once the fewest actors have theirs; actors
        that the nodes have no room for take none: they wait for an autoscaler."""
        most = self.resources.workers
        if not self.resources.read_by_tasks or len(self.actors) < self.resources.fewest or len(self.actors) == most:
            return most
        nodes = nodes_up()
        room = sum(actors_on(node, self.resources.gpus, self.resources.custom) for node in nodes)
        return most if room < cpus_of(nodes) else min(most, cpus_of(nodes) - 1)

    def _check_room(self) -> None:
        """Raises RunError where shards have waited too long for the fewest actors to be up."""
        up = sum(actor.starting is None for actor in self.actors)
        if up >= self.resources.fewest or not self._left():
            self.roomy = time.monotonic()
        elif time.monotonic() - self.roomy > ROOM:
            raise RunError(f"{up} workers are up and {self.resources.fewest} are needed: the cluster has had no room")

    def _left(self) -> int:
        """Shards known to wait for an actor."""
        return len(self.suspects) + len(self.retries) + len(self.ahead)

    def _next(self) -> Shard | None:
        if self.retries:
            return self.retries.popleft()
        if not self.ahead:
            self.ahead.extend(islice(self.shards, 1))
        return self.ahead.popleft() if self.ahead else None

    def _start(self) -> None:
        if self.failed_starts:
            time.sleep(BACKOFF * 2 ** (self.failed_starts - 1))
        options = {"max_restarts": 0, "max_concurrency": SHARDS_AN_ACTOR + 1, **self.resources.takes}
        actor = ray.remote(ShardActor).options(**options)
        handle = actor.remote([self.given])
        self.actors.append(_Actor(handle, handle.ready.remote()))

    def _give(self, actor: _Actor, shard: Shard, alone: bool = False) -> None:
        actor.alone = alone
        task = actor.handle.process.options(name=f"shard {shard.name}")
        actor.shards[task.remote(shard)] = shard

    def _collect(self) -> Iterator[Receipt | Failure | Heartbeat]:
        """Waits a moment for receipts and deaths."""
        owners = {ref: actor for actor in self.actors for ref in (actor.starting, *actor.shards) if ref is not None}
        done, _ = ray.wait(list(owners), timeout=1.0)
        yield from self._pulse()
        for ref in done:
            actor = owners[ref]
            if actor not in self.actors:  # its death came with another reference: its shards are dealt with
                continue
            try:
                result = ray.get(ref)
            except (RayTaskError, UnserializableException) as e:  # raised in the shard; the actor is well
                if isinstance(cause := getattr(e, "cause", None), RunError):
                    raise RunError(str(cause)) from e
                yield from self._blamed(actor.shards.pop(ref), _words(e), self.retries)
                actor.alone, actor.images, actor.pulse = False, 0, None
                continue
            except RayError as e:  # not RayActorError alone: Ray says OutOfMemoryError where it killed the actor
                yield from self._died(actor, e)
                continue
            if ref == actor.starting:
                actor.starting, self.failed_starts = None, 0
                continue
            del actor.shards[ref]
            # What it said of this shard before is in the receipt now, and a pulse under way may be older.
            actor.alone, actor.images, actor.pulse = False, max(0, actor.images - result.images), None
            yield result

    def _pulse(self) -> Iterator[Failure | Heartbeat]:
        """Asks every actor how far it is, and says what the last answers were, at most once a second. An actor of
        which a shard stands still is given up, and so is one that does not answer."""
        now = time.monotonic()
        if now - self.pulsed < 1:
            return
        self.pulsed = now
        for actor in list(self.actors):
            if actor.pulse is not None and ray.wait([actor.pulse], timeout=0)[0]:
                try:
                    flights = ray.get(actor.pulse)
                except RayError:
                    flights = []  # its death is seen at its shards
                actor.pulse, actor.images = None, sum(flight.images for flight in flights)
                before = actor.events
                seen = {flight.shard: (flight.events, now) for flight in flights}
                actor.events = {k: before[k] if k in before and before[k][0] == v[0] else v for k, v in seen.items()}
                for shard, (_, since) in actor.events.items():
                    if now - since > self.stall:
                        yield from self._stalled(actor, shard)
                        break
            elif actor.pulse is not None and actor.shards and now - actor.asked > self.stall:
                yield from self._died(actor, RayError(f"the actor has not answered for {self.stall:g} s"))
            if actor in self.actors and actor.starting is None and actor.pulse is None:
                actor.pulse, actor.asked = actor.handle.in_flight.remote(), now
        yield Heartbeat(sum(actor.images for actor in self.actors))

    def _stalled(self, actor: _Actor, name: str) -> Iterator[Failure]:
        """A shard of the actor stands still: it alone has failed; its neighbour is retried."""
        self.actors.remove(actor)
        ray.kill(actor.handle)
        for shard in actor.shards.values():
            if shard.name == name:
                yield from self._blamed(shard, f"no progress for {self.stall:g} s", self.retries)
            else:
                self.retries.append(shard)

    def _died(self, actor: _Actor, error: RayError) -> Iterator[Failure]:
        self.actors.remove(actor)
        ray.kill(actor.handle)  # one that is only out of reach would keep its GPU
        if actor.starting is not None:
            self.failed_starts += 1
            if self.failed_starts == STARTS:
                raise RunError(f"{STARTS} actors in a row died before they were up: {_words(error)}") from error
        shards = list(actor.shards.values())
        if len(shards) == 1 and not getattr(error, "preempted", False):
            yield from self._blamed(shards[0], _words(error), self.suspects)
        else:
            self.suspects.extend(shards)

    def _blamed(self, shard: Shard, words: str, again: deque[Shard]) -> Iterator[Failure]:
        self.attempts[shard.name] += 1
        if self.attempts[shard.name] > RETRIES:
            yield Failure(shard, words)
        else:
            again.append(shard)


def run_shards(
    work: Work,
    checkpoint: Checkpoint,
    shards: Iterator[Shard],
    resources: Resources,
    execution: Execution = FLOAT32,
    stall: float = STALL,
) -> Generator[Receipt | Failure | Heartbeat, None, None]:
    """Works through `shards`, which is read as actors have room, and yields an outcome for every one, and heartbeats.

    A shard that fails, or stands still for `stall` seconds, is tried `RETRIES` more times; an actor that dies is
    replaced. Raises RunError when actors don't start. To close the generator is to drop what is in flight.
    """
    return _Run(work, checkpoint, shards, resources, execution, stall).outcomes()


def _words(error: Exception) -> str:
    """What was raised in a task, or of Ray's own errors the line that says why."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if cause is not None:
        text = f"{type(cause).__name__}: {cause}"
    else:
        lines = str(error).strip().splitlines()
        first = lines[0] if isinstance(error, OutOfMemoryError) else lines[-1]
        text = next((line for line in lines if line.startswith("The actor is dead")), first)
    return " ".join(text.split())[:500]
