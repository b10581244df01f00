"""Image collections to diffusion latents and back. In a notebook: `palindrome.open("runs/photos")`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palindrome.notebook import Run, open, restored, scores

__all__ = ["Run", "open", "restored", "scores"]


def __getattr__(name: str) -> Any:
    """Imports them at their first use: they import torch, and the command line imports this package too."""
    if name in __all__:
        from palindrome import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
