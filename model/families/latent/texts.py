"""Texts as a pipeline's encoders have them, each encoded once."""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palindrome.model.families.latent.parts import Tokenizer, imported, quiet

if TYPE_CHECKING:
    from palindrome.model.families.latent.pipelines import LatentOfTexts

AT_ONCE = 16  # texts
KEPT_BYTES = 1 << 28  # of encoded texts: 700 of SDXL's, 50 of a T5's


class PromptEncoder:
    """A `TextEncoder`: the encoders of a model on a device, and what they last made, on the CPU. It serves several
    threads, one at a time."""

    def __init__(self, model: "LatentOfTexts", device: torch.device | str) -> None:
        self._model, self._device, self._lock = model, device, threading.Lock()
        self._pipeline = _pipeline(model)
        self._found: dict[str | None, Mapping[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str | None]) -> dict[str, Tensor]:
        with self._lock:
            found = {text: self._found[text] for text in texts if text in self._found}
            new = sorted({"" if text is None else text for text in texts} - found.keys())
            if new:
                self._pipeline.to(self._device)
            for start in range(0, len(new), AT_ONCE):
                part = new[start : start + AT_ONCE]
                with quiet():  # of several texts diffusers says that each is cut but the longest
                    encoded = self._model.encode(self._pipeline, part, self._device)
                for row, text in enumerate(part):
                    found[text] = {name: value[row].float().cpu() for name, value in encoded.items()}
            if None in texts:
                found[None] = self._model.encode_none(found[""])
            self._keep(found)
        names = next(iter(found.values())) if found else ()
        return {name: torch.stack([found[text][name] for text in texts]) for name in names}

    def leave(self) -> None:
        with self._lock:
            self._pipeline.to("cpu")

    def is_cut(self, text: str) -> bool:
        tokenizer, most = self._model.longest(self._pipeline)
        with self._lock, quiet():
            return len(tokenizer(text).input_ids) > most

    def _keep(self, found: dict[str | None, Mapping[str, Tensor]]) -> None:
        """Keeps these, and those before as far as there is room."""
        kept, room = {}, KEPT_BYTES
        for text, tensors in {**found, **self._found}.items():
            room -= sum(value.nbytes for value in tensors.values())
            if room < 0:
                break
            kept[text] = tensors
        self._found = kept


def _pipeline(model: "LatentOfTexts") -> Any:
    """diffusers' pipeline with its text encoders alone, in float32, on the CPU: `encode_prompt` needs no more."""
    absent = {model.NETWORK[0]: None, model.AUTOENCODER: None, "scheduler": None, **model.WITHOUT}
    texts: dict[str, Any] = dict.fromkeys(model.TEXTS)
    for name in model.TEXTS:
        if (part := model.parts.get(name)) is not None:
            texts[name] = part.load() if isinstance(part, Tokenizer) else part.module()
    return imported("diffusers", model.PIPELINE)(**texts, **absent)
