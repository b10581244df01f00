"""Files of directions: the difference of the means of two groups of latents, as safetensors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from palindrome.model.ladder import Ladder, check_ladder
from palindrome.pipeline.storage.folder import file_at

TENSOR, FORMAT, VERSION = "direction", "palindrome_direction", "1"


@dataclass(frozen=True, eq=False)
class Direction:
    """`values`, float32 [C, H, W], is the mean of x over the latents for which `where` is true less that over those for
    which `against` is; `counts` are how many these are. x is the state of the model of that digest after `steps` steps
    from the top of the ladder `levels`."""

    values: Tensor
    model_digest: str
    levels: Ladder
    num_train_timesteps: int
    steps: int
    where: str
    against: str
    counts: tuple[int, int]

    @property
    def level(self) -> float:
        """Where x is on the ladder."""
        return self.levels[len(self.levels) - 1 - self.steps]

    def check(self, model_digest: str, levels: Ladder, shape: tuple[int, int, int]) -> None:
        """Raises ValueError where it is of no use for latents [C, H, W] of that model, decoded on that ladder."""
        if self.model_digest != model_digest:
            there, here = self.model_digest[:12], model_digest[:12]
            raise ValueError(f"it is of latents of another model: digest {there}…, and this one's is {here}…")
        if self.level not in levels:
            raise ValueError(f"it is of x at level {self.level:g}, which the ladder here does not visit")
        if self.values.shape != shape:
            raise ValueError(f"it has the shape {list(self.values.shape)}, and the latents have {list(shape)}")

    def record(self) -> dict[str, Any]:
        """For run.json: what it says of itself, and a digest of its values."""
        digest = hashlib.sha256(self.values.contiguous().numpy().tobytes()).hexdigest()
        groups = {"where": self.where, "against": self.against, "counts": list(self.counts)}
        return {"level": self.level, **groups, "sha256": digest}


def write_direction(found: Direction, uri: str) -> None:
    about = {name: json.dumps(value) for name, value in vars(found).items() if name != "values"}
    content = safetensors.torch.save({TENSOR: found.values.contiguous()}, {FORMAT: VERSION, **about})
    folder, name = file_at(uri)
    folder.put(name, content)


def read_direction(uri: str) -> Direction:
    """Raises OSError for a file that can't be read, and ValueError for one that has no direction."""
    folder, name = file_at(uri)
    content = folder.read(name)
    try:
        values = safetensors.torch.load(content)[TENSOR]
        about = _metadata(content)
        if about.pop(FORMAT) != VERSION:
            raise ValueError(f"its version is not {VERSION}, which this Palindrome reads")
        found = {name: json.loads(value) for name, value in about.items()}
        levels = check_ladder(found["levels"], found["num_train_timesteps"])
        more, less = found["counts"]
        if not 0 <= found["steps"] < len(levels):
            raise ValueError(f"{found['steps']} steps are not on its ladder")
        direction = Direction(values.float(), **{**found, "levels": levels, "counts": (more, less)})
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(f"{uri} is no file of palindrome direction: {type(e).__name__}: {e}") from e
    if not direction.values.isfinite().all():
        raise ValueError(f"{uri} has values that are not finite")
    return direction


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file that is sound: a length of 8 bytes, little-endian, and so many bytes of JSON come first."""
    header: Mapping[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header["__metadata__"])
