"""Activations as rows of channels, without those of padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergetool.errors import PlanError

Batch = Mapping[str, torch.Tensor]


class Tokens:
    """Which places of a batch hold tokens and which only padding.

    Args:
        batch: the keyword inputs of a forward pass.
        composed: whether the model has an encoder and a decoder, which read different tokens.

    Raises:
        PlanError: it cannot be told which tokens count.
    """

    def __init__(self, batch: Batch, composed: bool = False) -> None:
        mask = batch.get("attention_mask")
        self.images = "pixel_values" in batch
        self.mask = None if mask is None or bool((mask != 0).all()) else mask != 0
        if self.mask is None:
            return
        if self.mask.ndim != 2:
            raise PlanError(f"an attention mask must be [samples, tokens], not {list(self.mask.shape)}")
        if composed:
            raise PlanError(
                "padding cannot be told from tokens in a model with an encoder and a decoder",
                fix="give batches without padding: one sample each, or samples of one length",
            )

    def rows(self, x: torch.Tensor, where: str) -> torch.Tensor:
        """The activations ``[..., channels]`` of real tokens as float32 ``[rows, channels]``.

        Raises:
            PlanError: their axes do not show which of them are padding.
        """
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        kept = self.kept(x, where)
        if kept is None:
            return flat
        inner = len(flat) // len(kept)
        kept = kept.to(flat.device)  # one of several that the network is dealt out to
        return flat[kept.repeat_interleave(inner) if inner > 1 else kept]

    def kept(self, x: torch.Tensor, where: str) -> torch.Tensor | None:
        """For each place along the first axes whether it is a token; None where all places count."""
        if self.mask is None:
            return None
        samples, tokens = self.mask.shape
        if x.ndim > 2 and x.shape[:2] == (samples, tokens):
            return self.mask.flatten()
        if x.ndim == 2 and len(x) == samples * tokens:
            return self.mask.flatten()
        if x.ndim == 4 and x.shape[0] == samples and x.shape[2] == tokens:  # heads stand before tokens
            return self.mask[:, None].expand(x.shape[:3]).flatten()
        if x.ndim == 2 and len(x) == samples:  # one row a sample, such as a pooled state
            return None
        if self.images:  # places of images, which have no padding
            return None
        raise PlanError(
            f"padding cannot be told from tokens where activations are {list(x.shape)}",
            where,
            "give batches without padding: one sample each, or samples of one length",
        )


def patches(x: torch.Tensor, conv: Any) -> torch.Tensor:
    """What each place of a convolution's output is made from: ``[samples, places, channels * kernel]``."""
    names = ("kernel_size", "dilation", "padding", "stride")
    kernel, dilation, padding, stride = (getattr(conv, name) for name in names)
    if padding == "valid":
        padding = (0,) * len(kernel)
    if len(kernel) == 1:  # one axis of places: another of length 1 stands before it
        x = x[:, :, None]
        kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    unfolded = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    return unfolded.transpose(1, 2)


def channels_last(y: torch.Tensor) -> torch.Tensor:
    """A convolution's output ``[samples, channels, ...]`` as ``[samples, places, channels]``."""
    return y.flatten(2).transpose(1, 2)
