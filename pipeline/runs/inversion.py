"""How a run's images become latents: the one place that says it, for commands, workers, run.json and the notebook."""

from dataclasses import dataclass
from typing import Any

from palindrome.model.inversion import evaluations
from palindrome.model.schedule import Ladder
from palindrome.pipeline.runs.manifest import Manifest


@dataclass(frozen=True)
class Inversion:
    """DDIM inversion along `levels`. Each step is corrected by `corrections` further evaluations (0: the paper's plain
    inversion), or by fewer once the residual (root mean square, pixels in [-1, 1]) is expected below `tolerance` (0:
    never). `exact` decodes each latent and spends more on those that do not come back to the bit. Latents are stored
    as `dtype`, float16 or float32, and decoded by DDIM along the same levels."""

    levels: Ladder
    corrections: int = 3
    tolerance: float = 0.0
    exact: bool = False
    dtype: str = "float32"

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def nfe_up(self) -> int:
        """Network evaluations from an image to its latent, at most, but for the further tries of `exact`."""
        return evaluations(self.steps, self.corrections)

    @property
    def method(self) -> str:
        return "fixed point" if self.corrections else "ddim"

    def record(self) -> dict[str, Any]:
        """`inversion` of run.json, which has `levels` and the dtype beside it."""
        return {
            "method": self.method,
            "corrections": self.corrections,
            "tolerance": "exact" if self.exact else self.tolerance or None,
            "nfe": self.nfe_up,
        }

    @classmethod
    def of(cls, manifest: Manifest) -> "Inversion":
        """That of an encode run, from its run.json; runs of the first versions have no tolerance."""
        found = manifest.content["inversion"]
        tolerance = found.get("tolerance")
        exact = tolerance == "exact"
        return cls(
            levels=manifest.levels,
            corrections=found["corrections"],
            tolerance=0.0 if exact else tolerance or 0.0,
            exact=exact,
            dtype=manifest.config["dtype"],
        )
