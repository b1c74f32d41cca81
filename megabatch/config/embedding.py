"""Embedding models: loss, similarity and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """Training of text embeddings (`task_type` embedding)."""

    loss_type: Literal["infonce", "cosine_similarity", "contrastive", "online_contrastive"] = param("infonce")
    """What is learned: a row's positive against negatives (infonce), a given similarity (cosine_similarity), or that
    pairs of label 1 are close and those of label 0 apart (contrastive; online_contrastive: the hard ones alone)."""
    pooling: Literal["last", "mean", "cls"] = param("last")
    """A text's vector: the hidden state of its last or first token, or the mean of all."""
    infonce_temperature: float = param(0.1, above=0)
    """Similarities are divided by it."""
    infonce_use_batch: bool = param(True)
    """Whether the texts of other rows of the global batch are negatives too, whatever rank holds them."""
    infonce_mask_fake_negative: bool = param(False)
    """Leaves out negatives that are more similar than the positive by more than `infonce_fake_neg_margin`."""
    infonce_fake_neg_margin: float = param(0.1, at_least=0)
    """In cosine similarity, before the temperature."""
    contrastive_margin: float = param(0.5, above=0)
    """Cosine distance beyond which pairs of label 0 are far enough apart."""
    mrl_dims: Sequence[int] = param(())
    """Matryoshka (arXiv:2205.13147): the loss is also taken of the vectors' first so many dimensions."""
    mrl_weights: Sequence[float] = param(())
    """Weight of each of these losses; empty means 1. The loss of whole vectors has weight 1."""

    def __post_init__(self) -> None:
        freeze_lists(self)
