"""The paths of an interpolate run, each as one file: a strip of its frames, or a video."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from palindrome.pipeline.images.pixels import pixels_of, png, strip, to_pillow
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.interpolate import paths_of

ENDS = {"strip": ".png", "gif": ".gif", "webp": ".webp", "mp4": ".mp4"}  # file extensions by format
BT709, LIMITED = 1, 1  # H.264's numbers of the colour space and the colour range
QUALITY = "16"  # x264's crf, visually lossless


@dataclass(frozen=True)
class Film:
    """A format of ENDS, frames per second, and the factor by which each pixel is enlarged."""

    form: str
    fps: float
    scale: int

    def encoded(self, frames: Sequence[np.ndarray], square: bool) -> bytes:
        """The content of a file of frames, uint8 [H, W, C] of one size; `square` if they are those of a grid."""
        frames = [frame.repeat(self.scale, 0).repeat(self.scale, 1) for frame in frames]
        if self.form == "strip":
            return png(strip(frames, square))
        return _mp4(frames, self.fps) if self.form == "mp4" else _animation(frames, self.form, self.fps)


def whole_paths(run: Folder, done: set[str]) -> tuple[Iterator[tuple[str, list[dict[str, Any]]]], int]:
    """The rows of each path whose shards are all committed, and the number of other paths."""
    plan = [(shard.name, {piece.name for piece in shard.pieces}) for shard in read_plan(run)]
    incomplete: set[str] = set().union(*(names for shard, names in plan if shard not in done))
    found = paths_of(run, (shard for shard, names in plan if shard in done))
    return ((name, list(rows)) for name, rows in found if name not in incomplete), len(incomplete)


def pixels(rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    return [pixels_of(row["image"]["bytes"]) for row in rows]


def _animation(frames: Sequence[np.ndarray], form: str, fps: float) -> bytes:
    """A GIF with 256 colours per frame, or a lossless WebP; both loop forever."""
    first, *rest = map(to_pillow, frames)
    content = io.BytesIO()
    lossless = {"lossless": True} if form == "webp" else {}
    first.save(content, form, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **lossless)
    return content.getvalue()


def _mp4(frames: Sequence[np.ndarray], fps: float) -> bytes:
    """H.264 in yuv420p, which every player supports; it requires even sizes, so an odd width or height grows by one
    pixel. The file is tagged as BT.709; without the tag players would guess the colour space by the size."""
    import av  # an optional dependency, for videos only
    from av.video.reformatter import Colorspace

    height, width, _ = frames[0].shape
    rate, content = Fraction(fps).limit_denominator(1001), io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate, options={"crf": QUALITY})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for pixels in frames:
            even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            even = np.broadcast_to(even, (*even.shape[:2], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())
    return content.getvalue()
