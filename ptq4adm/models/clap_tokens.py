"""Make-An-Audio's text encoder: the BERT of Microsoft's CLAP (2022), every token projected.

CLAP projects the first token alone. Make-An-Audio projects all 77, padding included and not masked,
and its UNet attends to all of them.

    e = W1 h        projection = LayerNorm(e + W2 gelu(e))
"""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel


class TokenProjection(nn.Module):
    """Projection of each vector by itself.

    Args:
        width: of the input.
        projected: of the output.
    """

    def __init__(self, width: int, projected: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, projected, bias=False)
        self.linear2 = nn.Linear(projected, projected, bias=False)
        self.layer_norm = nn.LayerNorm(projected)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., projected]."""
        first = self.linear1(x)
        y: Tensor = self.layer_norm(first + self.linear2(functional.gelu(first)))
        return y


class ClapTokenEncoder(ModelMixin, ConfigMixin):
    """Token ids to one vector a token.

    Args:
        vocab_size: of the tokenizer; the published one is bert-base-uncased.
        hidden_size: width of BERT; its heads are 64 wide.
        num_hidden_layers: of BERT.
        intermediate_size: of its feed-forward layers.
        max_position_embeddings: longest input, in tokens.
        type_vocab_size: kinds of tokens.
        projection_dim: width of the result.
        max_length: tokens of a prompt: longer ones are cut, shorter ones padded.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        projection_dim: int = 1024,
        max_length: int = 77,  # noqa: ARG002 - read from the config
    ) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=hidden_size // 64,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
        )
        self.base = BertModel(config, add_pooling_layer=False)
        self.projection = TokenProjection(hidden_size, projection_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors of all tokens, none masked.

        Args:
            input_ids: int64 [B, L].

        Returns:
            [B, L, projection_dim].
        """
        vectors: Tensor = self.projection(self.base(input_ids=input_ids).last_hidden_state)
        return vectors
