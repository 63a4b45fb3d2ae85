"""What the layers of a block are told of each other when weights have been laid out, and only kernels want to know."""

from torch import Tensor, nn

from ops.attention import prepare as prepare_attention
from ops.experts import foresee


def prepare(block: nn.Module, first_layer: bool, later: Tensor | None) -> None:
    """block: a TransformerBlock of model.py; first_layer: whether it is the model's first; later: what the next one
    reads first."""
    mixture, soon = block.block_sparse_moe, block.feed_forward and block.feed_forward.first.weight
    prepare_attention(block.attention, first_layer, soon, later)
    if mixture and not block.post_attention_norm:
        foresee(mixture, block.ffn_norm, block.attention.wo)
