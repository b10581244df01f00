"""The paths of an interpolation, each as one file: a strip of its frames, or a film."""

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

ENDS = {"strip": ".png", "gif": ".gif", "webp": ".webp", "mp4": ".mp4"}  # formats, and how their files end
BT709, LIMITED = 1, 1  # as H.264 numbers them
QUALITY = "16"  # x264's crf: what a codec loses at it is not seen


@dataclass(frozen=True)
class Film:
    """How: a format of ENDS, frames a second, and how many pixels wide and high each pixel becomes."""

    form: str
    fps: float
    scale: int

    def encoded(self, frames: Sequence[np.ndarray], square: bool) -> bytes:
        """Frames uint8 [H, W, C] of one size, those of a grid where they are a `square`, as a file's content."""
        frames = [frame.repeat(self.scale, 0).repeat(self.scale, 1) for frame in frames]
        if self.form == "strip":
            return png(strip(frames, square))
        return _mp4(frames, self.fps) if self.form == "mp4" else _animation(frames, self.form, self.fps)


def whole_paths(run: Folder, done: set[str]) -> tuple[Iterator[tuple[str, list[dict[str, Any]]]], int]:
    """The rows of each path all of whose shards are done; and how many paths there are others."""
    plan = [(shard.name, {piece.name for piece in shard.pieces}) for shard in read_plan(run)]
    broken: set[str] = set().union(*(names for shard, names in plan if shard not in done))
    found = paths_of(run, (shard for shard, names in plan if shard in done))
    return ((name, list(rows)) for name, rows in found if name not in broken), len(broken)


def pixels(rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    return [pixels_of(row["image"]["bytes"]) for row in rows]


def _animation(frames: Sequence[np.ndarray], form: str, fps: float) -> bytes:
    """GIF, of 256 colours a frame, or lossless WebP; both go round and round."""
    first, *rest = map(to_pillow, frames)
    content = io.BytesIO()
    lossless = {"lossless": True} if form == "webp" else {}
    first.save(content, form, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **lossless)
    return content.getvalue()


def _mp4(frames: Sequence[np.ndarray], fps: float) -> bytes:
    """H.264 of yuv420p, which every player knows; an odd width or height grows by a pixel, as that takes even ones.
    The colours are BT.709's, and the file says so, or players would guess by the size."""
    import av  # an extra, which only films need
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
