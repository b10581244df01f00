"""Between images and the states that a network denoises."""

from typing import Protocol

from torch import Tensor


class Autoencoder(Protocol):
    """Images [B, *image_shape], about in [-1, 1], and states x0 [B, *latent_shape], float32."""

    def to_state(self, images: Tensor) -> Tensor: ...

    def to_images(self, state: Tensor) -> Tensor: ...


class Identity:
    """That of a pixel model: the images are the states."""

    def to_state(self, images: Tensor) -> Tensor:
        return images

    def to_images(self, state: Tensor) -> Tensor:
        return state
