"""The settings of DDIM inversion, as commands, workers, run.json and the notebook use them."""

from dataclasses import dataclass
from typing import Any

from palindrome.model.inversion import evaluations
from palindrome.model.ladder import Ladder
from palindrome.pipeline.runs.manifest import Manifest


@dataclass(frozen=True)
class Inversion:
    """DDIM inversion along `levels`. Each step is corrected by `corrections` further evaluations (0: the paper's
    inversion), or by fewer once the residual (root mean square, pixels in [-1, 1]) is expected below `tolerance` (0:
    never). `exact` decodes each latent and spends more evaluations on images that are not recovered bit by bit. Latents
    are stored as `dtype`, float16 or float32, and decoded by DDIM along the same levels."""

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
        """Network evaluations from an image to its latent, at most, without the further attempts of `exact`."""
        return evaluations(self.steps, self.corrections)

    @property
    def method(self) -> str:
        return "fixed point" if self.corrections else "ddim"

    def record(self) -> dict[str, Any]:
        """The key `inversion` of run.json, which records `levels` and the dtype under other keys."""
        return {
            "method": self.method,
            "corrections": self.corrections,
            "tolerance": "exact" if self.exact else self.tolerance or None,
            "nfe": self.nfe_up,
        }

    @classmethod
    def of(cls, manifest: Manifest) -> "Inversion":
        """The inversion of an encode run, from its run.json; runs of the first versions have no tolerance."""
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
