"""The whole network: encoder, adaptor and decoder, filled from a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.log_mel import log_mel
from ...quant.linear import Embedding, Linear
from ...quant.recipe import Recipe
from .adaptor import Adaptor
from .checkpoint import load_weights, open_with_config
from .config import ModelConfig
from .decoder import Decoder
from .encoder import Encoder
from .parameters import ENCODER_LAYERS
from .quantized import layer_schemes, to_quantize
from .weights import fill


class AudioFlamingo(nn.Module):
    """Audio Flamingo Next, Music Flamingo or Audio Flamingo 3, as its config says."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.rote)
        self.adaptor = Adaptor(config.encoder.hidden_size, config.decoder.hidden_size, bias=config.projector_bias)
        self.decoder = Decoder(config.decoder)
        for layer, scheme in layer_schemes(config).items():
            self._matrix(layer).use(scheme)

    def _matrix(self, layer: str) -> Linear | Embedding:
        module = self.get_submodule(layer)
        assert isinstance(module, Linear | Embedding)
        return module

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: Callable[[str], torch.dtype],
        release_encoder: bool = False,
        quant: Recipe | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "AudioFlamingo":
        """Load a checkpoint folder, tensor by tensor.

        dtype: given the name of the dtype that the config names, the one to compute in. release_encoder: leave the
        encoder's layers in the host's memory, see `Encoder.forward`. quant: quantize dense weights on the way.
        `progress` is called with (bytes done, bytes in all).

        Raises ConfigError, CheckpointError or SchemeError naming the file, tensor or layer at fault.
        """
        checkpoint, config = open_with_config(folder)
        model = cls(to_quantize(config, quant))
        compute, host = dtype(config.dtype), torch.device("cpu")

        def place(name: str) -> torch.device:
            return host if release_encoder and name.startswith(ENCODER_LAYERS) else device

        fill(model, load_weights(checkpoint, config, device=place, dtype=compute, quant=quant, progress=progress))
        for layer in layer_schemes(model.config):
            model._matrix(layer).prepare(compute)
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.decoder.norm.weight.dtype

    def log_mel(self, windows: list[Tensor]) -> Tensor:
        """Log-mel features of 1-D float32 waveforms of at most 30 s. Returns [batch, mel_bins, frames] in our dtype."""
        batch = nn.utils.rnn.pad_sequence(windows, batch_first=True).to(self.device)
        return log_mel(batch, mel_bins=self.config.encoder.mel_bins, dtype=self.dtype)

    def encode(self, mel: Tensor, samples: list[int], windows: list[int]) -> list[Tensor]:
        """Audio tokens of a batch of windows, as the decoder reads them.

        mel: from `log_mel`; samples: length of each window; windows: index of each in its own audio.
        Returns one [tokens, decoder hidden] tensor a window.
        """
        encoded = self.encoder(mel, samples, windows)
        return list(self.adaptor(torch.cat(encoded)).split([len(tokens) for tokens in encoded]))
