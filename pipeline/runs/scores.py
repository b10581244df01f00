"""The methods of `palindrome score`, as data: their columns and conventions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from palindrome.pipeline.runs.schemas import IMAGE_FIELDS, PICTURE

AT_LEVEL = "image at the first level, from the last level to alpha 0"
AT_CLEAN_END = "image at the clean end, up to the last level"


@dataclass(frozen=True)
class Method:
    """One method. Its columns in the table are its name, an underscore and theirs."""

    name: str
    steps: int
    """By default."""
    positive: str
    """What an image with a `higher` or `lower` score is said to be."""
    of: str
    columns: tuple[str, ...]
    """float64. P_VALUE is a p-value."""
    path: str
    """Where the path begins and ends, for run.json."""
    follows: str
    """Whose convention that is, for run.json."""
    texts: tuple[str, ...] = ()
    """Columns with a string."""
    arrays: tuple[str, ...] = ()
    """Columns with an array of float64."""
    clipped: bool = False
    """Whether predicted x0 is clipped to the range of pixels."""
    latent: bool = True
    """Whether there is an x_T."""
    map: bool = False
    """Whether there is a picture of where the image differs."""
    from_clean_end: bool = False
    """Whether its path is one of Palindrome's own, up a ladder from the clean end."""
    keyed: bool = False
    """Whether it looks for the keys of a watermark."""

    @property
    def prefix(self) -> str:
        return self.name.replace("-", "_") + "_"


P_VALUE, LEVEL = "p", 0.01  # the column with a p-value, and up to which the summary counts it
DIFFPATH_SUMS = tuple(f"{name}{power}" for name in ("eps_sum", "deps_dt") for power in ("", "_sq", "_cb"))
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "nll",
                10,
                "higher",
                "out of distribution",
                ("nats", "norm"),
                AT_CLEAN_END,
                "plain DDIM inversion",
                from_clean_end=True,
            ),
            Method(
                "diffpath",
                10,
                "higher",
                "out of distribution",
                (*DIFFPATH_SUMS, "deps_dt_sq_sqrt"),
                AT_LEVEL,
                "clear-nus/diffpath, whose configs clip x0; the paper writes of the network's own epsilon",
                arrays=tuple(f"{name}_steps" for name in DIFFPATH_SUMS),
                clipped=True,
            ),
            Method(
                "invad",
                3,
                "higher",
                "anomalous",
                ("nll", "norm_range"),
                AT_LEVEL,
                "SkyShunsuke/InversionAD, on pixels or an autoencoder's states instead of features",
            ),
            Method(
                "secmi",
                11,
                "lower",
                "member",
                ("t_error",),
                "image at the first level; one step up to the last level, and down again",
                "jinhaoduan/SecMI, which compares a step below t_sec; the paper at t_sec",
                latent=False,
            ),
            Method(
                "dire",
                20,
                "lower",
                "generated",
                ("l1",),
                f"{AT_LEVEL}, taken to be the last level again; down to alpha 1",
                "ZhendongWang6/DIRE, with clipped x0 and its resizing (--resample openai)",
                clipped=True,
                map=True,
            ),
            Method(
                "dire-exact",
                20,
                "lower",
                "generated",
                ("l1",),
                f"{AT_CLEAN_END}, and down again",
                "exact inversion, which leaves nothing of any image: near 0 for real and generated ones alike",
                map=True,
                from_clean_end=True,
            ),
            Method(
                "tree-ring",
                20,
                "lower",
                "watermarked",
                ("p", "noise_p", "distance"),
                AT_CLEAN_END,
                "plain DDIM inversion; a Hermitian pattern about frequency 0, unlike YuxinWenRick/tree-ring-watermark",
                texts=("key",),
                from_clean_end=True,
                keyed=True,
            ),
            Method(
                "gaussian-shading",
                20,
                "lower",
                "watermarked",
                ("p", "sign_errors", "bit_errors"),
                AT_CLEAN_END,
                "plain DDIM inversion; all signs of a known message, where bsmhmmlf/Gaussian-Shading counts its bits",
                texts=("key",),
                from_clean_end=True,
                keyed=True,
            ),
        )
    }
)


def scores_of(methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """The key `scores` of run.json: of each column the method, what a positive is, and if it is a p-value, that."""
    return {
        f"{method.prefix}{column}": {
            "method": method.name,
            "positive": method.positive,
            "of": method.of,
            **({"p_value": True} if column == P_VALUE else {}),
        }
        for method in methods
        for column in method.columns
    }


def score_schema(
    methods: Sequence[Method],
    shape: Sequence[int] | None,
    maps: bool,
    kept: Sequence[pa.Field] = (),
) -> pa.Schema:
    """One row per image. `container` and `jpeg_quality` are of its file, `width` and `height` of the picture in it;
    then the methods' scores, their texts, their arrays, with `maps` their maps as PNGs, and x_T [C, H, W] of that
    `shape`, if there is one."""
    fields = [pa.field(f"{m.prefix}{column}", pa.float64(), nullable=False) for m in methods for column in m.columns]
    fields += [pa.field(f"{m.prefix}{column}", pa.string(), nullable=False) for m in methods for column in m.texts]
    fields += [pa.field(f"{m.prefix}{column}", pa.list_(pa.float64())) for m in methods for column in m.arrays]
    fields += [pa.field(f"{m.prefix}map", PICTURE) for m in methods if m.map and maps]
    if shape is not None:
        tensor = pa.fixed_shape_tensor(pa.float32(), tuple(shape))
        fields += [pa.field(f"{m.prefix}latent", tensor, nullable=False) for m in methods if m.latent]
    return pa.schema(
        [
            *IMAGE_FIELDS,
            *kept,
            ("container", pa.string()),
            ("jpeg_quality", pa.int32()),
            *fields,
        ]
    )
