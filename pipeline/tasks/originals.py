"""The images of an encode run, read again."""

from collections.abc import Container, Iterator

from palindrome.pipeline.images.read import Batch
from palindrome.pipeline.images.records import Image


class Originals:
    """The originals of a shard, read again from its `batches`; of several in memory only those that are `wanted`, by
    default all. They come in the plan's order, as the latents do."""

    def __init__(self, batches: Iterator[Batch], wanted: Container[str] | None = None) -> None:
        self.batches, self.wanted = batches, wanted
        self.buffered: dict[str, Image | str] = {}

    def find(self, image_id: str, content_hash: str) -> Image | str:
        """The image, or why there is none to compare with: `missing`, `changed`, or a reject's reason."""
        while image_id not in self.buffered:
            batch = next(self.batches, None)
            if batch is None:
                return "missing"
            read = {image.image_id: image for image in batch.images} | {r.image_id: r.reason for r in batch.rejects}
            self.buffered |= {name: it for name, it in read.items() if self.wanted is None or name in self.wanted}
        found = self.buffered.pop(image_id)
        return found if isinstance(found, str) or found.content_hash == content_hash else "changed"
