"""Entries that are looked at in the configuration of an original InternVL checkpoint and its tokenizer."""

from typing import Annotated

from pydantic import Field

from emloc.artefacts.schema import Finite, Schema, Size

Pixels = Annotated[int, Field(ge=1, le=1 << 16)]
Key = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Id = Annotated[int, Field(ge=0, le=1 << 31)]


class _Vision(Schema):
    hidden_size: Size = 1
    intermediate_size: Size = 1
    num_hidden_layers: Size = 1
    num_attention_heads: Size = 1
    num_channels: Size = 3
    image_size: Pixels = 224
    patch_size: Pixels = 14
    hidden_act: str = ""
    norm_type: str = ""
    layer_norm_eps: Finite = 1e-6
    initializer_range: Finite = 0.02
    initializer_factor: Finite = 0.1
    attention_dropout: Finite = 0.0
    dropout: Finite = 0.0
    qk_normalization: bool = True
    qkv_bias: bool = False


class _Language(Schema):
    model_type: str | None = None
    vocab_size: Size = 1
    hidden_size: Size = 1
    intermediate_size: Size = 1
    num_hidden_layers: Size = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size | None = None
    tie_word_embeddings: bool | None = None
    bias: bool = True


class ChatConfig(Schema):
    """The keys that are looked at here; transformers looks at those of the two models as well."""

    vision_config: _Vision = Field(default_factory=_Vision)
    llm_config: _Language
    downsample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    force_image_size: Pixels | None = None
    select_layer: Annotated[int, Field(ge=-1000, le=1000)] = -1
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: Size = 1
    max_dynamic_patch: Size = 6
    torch_dtype: str | None = None
    dtype: str | None = None
    ps_version: str = "v1"
    template: str | None = None


class Token(Schema):
    """A token that was added to a vocabulary."""

    content: str
    id: Id = 0


class TokenizerFile(Schema):
    """`tokenizer.json`."""

    added_tokens: list[Token] = Field(default_factory=list[Token])


class TokenizerConfig(Schema):
    """`tokenizer_config.json`; ids are the keys."""

    added_tokens_decoder: dict[Key, Token] = Field(default_factory=dict[str, Token])


class AddedTokens(Schema):
    """`added_tokens.json`, as the one value of an object."""

    tokens: dict[str, Id]
