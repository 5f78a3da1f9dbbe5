"""The adaptor between encoder and decoder: two linear layers with a GELU between them."""

from torch import Tensor, nn

from ...kernels.activation import gelu
from ...quant.linear import Linear


class Adaptor(nn.Module):
    """linear_2(GELU(linear_1(x))), from the encoder's width to the decoder's."""

    def __init__(self, encoder_width: int, decoder_width: int, *, bias: bool):
        super().__init__()
        self.linear_1 = Linear(encoder_width, decoder_width, bias=bias)
        self.linear_2 = Linear(decoder_width, decoder_width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., encoder_width]. Returns [..., decoder_width]."""
        return self.linear_2(gelu(self.linear_1(x)))
