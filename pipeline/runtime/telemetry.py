"""Metrics of a run for Ray's dashboard and Prometheus: counters that each actor keeps, by job and node. A retried shard
counts again; the exact figures of a run come from its committed shards."""

from ray.util.metrics import Counter, Histogram

TAGS = ("work",)
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


class ActorMetrics:
    """One actor's metrics: `ray_palindrome_images_total` and so on. The job's name is in the tag `work`, as Prometheus
    reserves `job`."""

    def __init__(self, job: str) -> None:
        def counter(name: str, description: str) -> Counter:
            found = Counter(f"palindrome_{name}", description, TAGS)
            found.set_default_tags({"work": job})
            return found

        self._images = counter("images", "Images done: encoded, decoded or generated.")
        self._device = counter("device_seconds", "Seconds that the device was busy.")
        self._shards = counter("shards", "Shards committed.")
        self._rejects = counter("rejects", "Inputs that were rejected.")
        self._bytes = counter("bytes", "Bytes written, of committed shards.")
        self._batch = Histogram("palindrome_batch_images", "Images in a batch.", BATCHES, TAGS)
        self._batch.set_default_tags({"work": job})

    def batch(self, images: int) -> None:
        """Counts a finished batch."""
        if images:
            self._images.inc(images)
            self._batch.observe(images)

    def device(self, seconds: float) -> None:
        if seconds > 0:
            self._device.inc(seconds)

    def shard(self, rejects: int, written: int) -> None:
        """Counts a committed shard."""
        self._shards.inc()
        for counter, value in ((self._rejects, rejects), (self._bytes, written)):
            if value:
                counter.inc(value)
