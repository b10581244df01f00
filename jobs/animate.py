"""palindrome animate: the paths of an interpolate run as strips and videos."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import OutOptions, Planned
from palindrome.jobs.holding import hold_run
from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.errors import writing
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.runs.kinds import IMAGES, PATHS, WITH_PATHS
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.animate import ENDS, Film, pixels, whole_paths
from palindrome.pipeline.tasks.export import name_of

PATHS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class AnimateConfig(OutOptions):
    """Write each path of an interpolate run as one file in OUT/paths: a strip of its frames, or a video."""

    GROUP: ClassVar[str] = "output"
    EXAMPLES: ClassVar[str] = """
    palindrome animate runs/paths --format mp4 --fps 24 --out runs/films
    palindrome animate runs/paths --format strip --scale 4 --out runs/strips
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"run"})

    run: str
    """The run folder of interpolate, a path or an fsspec URI."""
    format: Literal["strip", "gif", "webp", "mp4"]
    """strip: a PNG of the frames side by side, or of a grid's square; gif; webp: animated, lossless; mp4: H.264, which
    requires PyAV (pip install av)."""
    fps: Annotated[float, Range(0.1, 120)] = 12.0
    """Frames per second."""
    scale: Annotated[int, Range(1, 64)] = 1
    """The factor by which small images are enlarged, in pixels per pixel."""


def run(config: AnimateConfig) -> int:
    """Writes the remaining files and returns the exit code."""
    if config.format == "mp4" and find_spec("av") is None:
        raise ConfigError("--format: mp4 requires PyAV, which is not installed: pip install av")
    out = Folder(absolute(config.out))
    with config_error("RUN"):
        source, manifest = open_run(config.run, *WITH_PATHS)
        paths, broken = whole_paths(source, committed(source, IMAGES))
    of = {"source_config": manifest.config, "model_digest": manifest.model_digest}
    hold_run(out, "animate", config, {**config.recorded(), "run": source.uri}, facts=of)
    with config_error("--out"):
        done = out.files(PATHS)
    film, end = Film(config.format, config.fps, config.scale), ENDS[config.format]
    if config.dry_run:
        names = {piece.name for shard in read_plan(source) for piece in shard.pieces}
        left = len(names) - broken - len(done)
        print(f"{len(names)} paths, {left} to write as {config.format}; {broken} lack frames")
        raise Planned

    # The rows name the path: a run from elsewhere may say ../../x.
    named = ((f"{name_of(name)}{end}", rows) for name, rows in paths)

    def put(path: tuple[str, list[dict[str, Any]]]) -> None:
        name, rows = path
        content = film.encoded(pixels(rows), square=rows[0]["down"] is not None)
        with writing(f"{out.uri}/{PATHS}/{name}"):
            out.put(f"{PATHS}/{name}", content)

    count = 0
    for _ in in_threads(put, (path for path in named if path[0] not in done), PATHS_AT_ONCE):
        interrupt.check()
        count += 1
    print(f"{count} files written to {config.out}/{PATHS}, {len(done)} existed before")
    if broken:
        print(f"{broken} paths lack frames: {config.run} is not complete", file=sys.stderr)
        return 1
    return 0
