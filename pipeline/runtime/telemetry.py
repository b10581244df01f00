"""What Ray's dashboard and Prometheus show of a run: counters that the actors keep, by job and node. A shard that is
tried again counts again: the account of a run is what it has committed."""

from ray.util.metrics import Counter, Histogram

TAGS = ("work",)
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


class Meters:
    """Of one actor; `ray_palindrome_images_total` and so on, with the tag `work`, since Prometheus itself
    has a `job`."""

    def __init__(self, job: str) -> None:
        def counter(name: str, what: str) -> Counter:
            found = Counter(f"palindrome_{name}", what, TAGS)
            found.set_default_tags({"work": job})
            return found

        self._images = counter("images", "Images done: encoded, decoded or made.")
        self._device = counter("device_seconds", "Seconds that the device was at work.")
        self._shards = counter("shards", "Shards committed.")
        self._rejects = counter("rejects", "Inputs that could not be used.")
        self._bytes = counter("bytes", "Bytes written, of committed shards.")
        self._fill = Histogram("palindrome_batch_images", "Images in a batch.", BATCHES, TAGS)
        self._fill.set_default_tags({"work": job})

    def batch(self, images: int) -> None:
        """A batch is done."""
        if images:
            self._images.inc(images)
            self._fill.observe(images)

    def device(self, seconds: float) -> None:
        if seconds > 0:
            self._device.inc(seconds)

    def shard(self, rejects: int, written: int) -> None:
        """A shard is committed."""
        self._shards.inc()
        for counter, value in ((self._rejects, rejects), (self._bytes, written)):
            if value:
                counter.inc(value)
