"""Editing a stored image: beside its own path from x_T down to x0, another that is moved, or taken under another
condition, and held to the own one where the image is to stay. From level b to the one below, a:

    own_a = step(own_b)                                                     (eq. 12 of DDIM, eta = 0)
    edited_a = m own_a + (1 - m) move_a(step'(edited_b))

m is 1 where the image is to stay. No pixel of the image is put in: where x_T is the exact inverse of the image, its own
path ends at it, so that the edited one does too where m is 1. This is Blended Diffusion (Avrahami et al., arXiv
2111.14818) with the image's own path in place of noise that is drawn.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, as_state, step
from palindrome.model.interpolate import slerp
from palindrome.model.process import Process

Move = Callable[[Tensor, float], Tensor]
"""(x [B, C, H, W], its level) -> x moved; x itself where nothing moves there."""


def stay(x: Tensor, level: float) -> Tensor:
    """The Move that changes nothing."""
    return x


def towards(other: Tensor, strength: float, top: float) -> Move:
    """At the level `top`, x moved on the sphere towards the latent `other` [C, H, W] by a part of the angle, `strength`
    in [0, 1]: eq. 67 of the DDIM paper. The Move raises ValueError as `slerp` does."""

    def move(x: Tensor, level: float) -> Tensor:
        if level != top or strength == 0:
            return x
        return slerp(x, other.to(x).expand_as(x), x.new_full((len(x),), strength, dtype=torch.float64))

    return move


def along(direction: Tensor, strength: float, at: float) -> Move:
    """At the level `at`, x + strength * direction [C, H, W], for any finite strength."""

    def move(x: Tensor, level: float) -> Tensor:
        return x if level != at or strength == 0 else x + strength * direction.to(x)

    return move


@torch.no_grad()
def edit(
    network: Network,
    x: Tensor,
    levels: Sequence[float],
    process: Process,
    moves: Sequence[Move],
    *,
    source: Condition | None = None,
    condition: Condition | None = None,
    kept: float = 0.0,
    known: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """x at the ladder's top -> x0 of its own path, under `source`, as `ddim.sample` has it, and for each of `moves` x0
    of an edited one, [B, C, H, W] each.

    The fraction `kept` of the steps, from the top on, is taken under `source`, the others under `condition`, which is
    the very object `source` where nothing else is told. Each move is asked at every level, the top and the clean end
    included. Where `known` [B, 1, H, W] is true, an edited path is the own one, to the bit. NFE is one a step, and one
    more for each edited path that has left the own one. Raises ValueError as the moves do, and as `ddim.step`.
    """

    def held(edited: Tensor, level: float, move: Move) -> Tensor:
        moved = move(edited, level)
        return moved if known is None or moved is own else torch.where(known, own, moved)

    own = as_state(x)
    edits = [held(own, levels[-1], move) for move in moves]
    steps = list(reversed(list(pairwise(levels))))
    for number, (low, high) in enumerate(steps):
        told = source if number < round(kept * len(steps)) else condition
        before, own = own, step(network, own, process, high, low, condition=source)
        edits = [
            # What is still on the own path is evaluated once.
            held(
                own if x is before and told is source else step(network, x, process, high, low, condition=told),
                low,
                move,
            )
            for x, move in zip(edits, moves, strict=True)
        ]
    return own, edits
