"""The model: an existing Hugging Face folder or hub name, or the shape of a new model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass

_LARGEST = 1 << 32
"""Upper limit for a dimension, as in the converters: an estimate has a row for each part of a model."""
_FAMILY = "belongs to families that are not built yet (docs/families.md)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The model to train.

    With `model` set, its `config.json` decides the shape, and the other fields must be unset or agree with it. With
    `model` None the run creates a new model of `model_type` with the shape given here, initialised from the seed.
    Unless `tokenizer` is given, it also trains a byte-level BPE tokenizer of `padded_vocab_size` entries on the
    training data. The flag `--model` on such a recipe takes a given model instead, and leaves out the recipe's shape.
    """

    model: str | None = param(None)
    """Folder or hub name of Hugging Face safetensors weights; None creates a new model of the shape given below."""
    model_type: str | None = param(None)
    """Model family, in Hugging Face's spelling (`qwen3_moe`, `llama`); only needed if `model` is None."""
    tokenizer: str | None = param(None)
    """Folder or hub name of a tokenizer; None uses the model's own, or trains one for a new model."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = param(None)
    """Type of the weights in forward and backward; None uses config.json's, or bfloat16 if it has none."""
    new_special_tokens: Sequence[str] = param(())
    """Special tokens added to the tokenizer, or paths of `.txt` files with one token per line. The embedding and the
    output layer grow where they have no rows for them; a new row is the mean of the model's own."""

    num_layers: int | None = param(None, at_least=1, at_most=10_000)
    """Transformer layers."""
    hidden_size: int | None = param(None, at_least=1, at_most=_LARGEST)
    """Width of the residual stream."""
    ffn_hidden_size: int | None = param(None, at_least=1, at_most=_LARGEST)
    """Width of a dense MLP; None means 4 times `hidden_size` for a new model."""
    num_attention_heads: int | None = param(None, at_least=1, at_most=100_000)
    """Query heads per layer."""
    group_query_attention: bool | None = param(None)
    """Whether query heads share keys and values; None means yes if `num_query_groups` is above 1."""
    num_query_groups: int = param(1, at_least=1, at_most=100_000)
    """Key and value heads per layer; only used with `group_query_attention`, otherwise each query head has its own."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = param("vanilla", built=("vanilla",), refused=_FAMILY)
    """Attention softmax: plain, with a constant 1 added to the denominator, or with a learned sink per head."""
    window_size: str | None = param(None)
    """Sliding attention window of a new model as `left,right` tokens: with `127,0` each token sees 127 earlier ones
    and itself. None lets it see all earlier ones; a given model has its own."""
    window_attn_skip_freq: int | Sequence[int] | None = param(None)
    """Every n-th layer attends fully despite `window_size`; or a list with a 0 or 1 per layer (1 is windowed). Qwen's
    dense families alone have such layers."""
    max_position_embeddings: int | None = param(None, at_least=1, at_most=_LARGEST)
    """Largest position that the model supports, in tokens."""
    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "relative", "none"] = param(
        "rope", built=("rope",), refused=_FAMILY
    )
    """How positions enter the model."""
    rotary_base: float = param(10000, above=0)
    """Base (theta) of the rotary frequencies."""
    rotary_percent: float = param(1.0, built=False, refused=_FAMILY, above=0, at_most=1)
    """Fraction of each head's dimensions that is rotated."""
    normalization: Literal["LayerNorm", "RMSNorm"] = param("RMSNorm", built=("RMSNorm",), refused=_FAMILY)
    """Normalisation before attention and MLP and after the last layer."""
    norm_epsilon: float = param(1e-5, above=0)
    """Added to the variance before its square root."""
    swiglu: bool = param(True, built=False, refused=_FAMILY)
    """Gated SiLU in the MLP; False is a plain GELU."""
    quick_geglu: bool = param(False, built=False, refused=_FAMILY)
    """Gated sigmoid approximation of GELU in the MLP."""
    activation_func_clamp_value: float | None = param(None, built=False, refused=_FAMILY, above=0)
    """Clamps the MLP's first projection to ± this value before the activation (quick GEGLU only)."""
    glu_linear_offset: float = param(0.0, built=False, refused=_FAMILY)
    """Added to the linear half of a gated MLP before it multiplies the activated half."""
    untie_embeddings_and_output_weights: bool = param(True)
    """Separate matrices for input embedding and output layer; False shares one."""
    disable_bias_linear: bool = param(True, built=False, refused=_FAMILY)
    """No bias in linear layers."""
    add_qkv_bias: bool = param(True)
    """Bias on the query, key and value projections; in a new model the family decides if it allows only one value."""
    attention_dropout: float = param(0.0, at_least=0, below=1)
    """Probability of dropping an attention weight in training; the model's config.json is not asked."""
    hidden_dropout: float = param(0.0, at_least=0, below=1)
    """Probability of dropping an element of the embeddings and of what attention and MLP add to the residual stream,
    in training."""
    kv_channels: int | None = param(None, at_least=1, at_most=_LARGEST)
    """Dimensions per head; None means `hidden_size // num_attention_heads`."""
    qk_layernorm: bool = param(False)
    """Normalises each query and key head; in a new model the family decides if it allows only one value."""
    qk_l2_norm: bool = param(False, built=False, refused=_FAMILY)
    """Scales queries and keys to unit length, as Llama 4 does."""
    no_rope_freq: int | Sequence[int] | None = param(None, built=False, refused=_FAMILY)
    """Layers without rotary embedding: every n-th; or a list with a 0 or 1 per layer (1 has none)."""
    moe_apply_probs_on_input: bool = param(False, built=False, refused=_FAMILY)
    """Scales an expert's input by its routing probability, instead of its output."""
    padded_vocab_size: int | None = param(None, at_least=1, at_most=_LARGEST)
    """Rows of the embedding, including padding; for a new model also the size of the tokenizer that it trains."""
    rope_scaling: Mapping[str, Any] | None = param(None)
    """Rotary scaling as in config.json (`rope_type`, `factor`, …); on the command line as JSON."""

    def __post_init__(self) -> None:
        freeze_lists(self)
