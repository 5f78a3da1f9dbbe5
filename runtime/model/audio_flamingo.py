"""The whole network: encoder, adaptor and decoder, filled from a checkpoint."""

from collections.abc import Callable
from os import PathLike

import torch
from torch import Tensor, nn

from ...kernels.device_state import sent
from ...kernels.log_mel import log_mel
from ...quant.linear import Embedding, Linear
from ...quant.recipe import Recipe
from .adaptor import Adaptor
from .checkpoint import load_weights
from .config import ModelConfig
from .decoder import Decoder
from .encoder import Encoder
from .group import Group
from .opened import OpenCheckpoint, open_checkpoint
from .parameters import ENCODER_LAYERS
from .quantized import layer_schemes, to_quantize
from .sequence_parallel import SequenceParallel
from .sharding import Shard
from .weights import fill


class AudioFlamingo(nn.Module):
    """Audio Flamingo Next, Music Flamingo or Audio Flamingo 3, as its config says."""

    def __init__(self, config: ModelConfig, group: Group | None = None):
        """group: the ranks that share the decoder, of which this process holds a part; `config` is that of the whole
        model."""
        super().__init__()
        self.config = config
        self.shard = None if group is None else Shard(config, group)
        self.sequence_parallel: SequenceParallel | None = None
        part = config if self.shard is None else self.shard.config
        self.encoder = Encoder(config.encoder, config.rote)
        self.adaptor = Adaptor(config.encoder.hidden_size, config.decoder.hidden_size, bias=config.projector_bias)
        self.decoder = Decoder(part.decoder)
        if self.shard is not None:
            self.shard.parallelize(self.decoder)
        for layer, scheme in layer_schemes(part).items():
            self._matrix(layer).use(scheme)

    def _matrix(self, layer: str) -> Linear | Embedding:
        module = self.get_submodule(layer)
        assert isinstance(module, Linear | Embedding)
        return module

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: OpenCheckpoint,
        *,
        device: torch.device,
        dtype: Callable[[str], torch.dtype],
        release_encoder: bool = False,
        quant: Recipe | None = None,
        group: Group | None = None,
        sequence: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "AudioFlamingo":
        """Load the weights of a checkpoint, tensor by tensor.

        dtype: maps the name of the config's dtype to the dtype to compute in. release_encoder: keep the encoder's
        layers in host memory, see `Encoder.forward`. quant: quantize dense weights while loading. group: hold a part of
        the decoder, see `sharding`. sequence: also hold the whole decoder, see `sequence_parallel`. `progress` is
        called with (bytes done, total bytes).

        Raises ConfigError, CheckpointError or SchemeError naming the file, tensor or layer at fault.
        """
        weights, config = checkpoint.weights, checkpoint.config
        model = cls(to_quantize(config, quant), None if sequence else group)
        compute, host = dtype(config.dtype), torch.device("cpu")

        def place(name: str) -> torch.device:
            return host if release_encoder and name.startswith(ENCODER_LAYERS) else device

        fill(
            model,
            load_weights(
                weights, config, device=place, dtype=compute, quant=quant, shard=model.shard, progress=progress
            ),
        )
        model._prepare(compute)
        if sequence and group is not None:
            return model._divided(group, compute)
        if device.type == "cuda":
            model.decoder.join()
        return model

    def _prepare(self, dtype: torch.dtype) -> None:
        for layer in layer_schemes(self.config):
            self._matrix(layer).prepare(dtype)

    def _divided(self, group: Group, dtype: torch.dtype) -> "AudioFlamingo":
        """This rank's part of the whole model; tensors cut by rows share its memory. The whole decoder computes long
        chunks."""
        part = AudioFlamingo(self.config, group)
        assert part.shard is not None
        cut = part.shard.cut
        fill(part, ((name, cut(name, tensor)) for name, tensor in self.state_dict().items()))
        part._prepare(dtype)
        part.sequence_parallel = SequenceParallel(self.decoder, group)
        return part

    @classmethod
    def from_folder(
        cls, folder: str | PathLike[str], *, device: torch.device, dtype: Callable[[str], torch.dtype]
    ) -> "AudioFlamingo":
        """Open a checkpoint folder and load its weights; see `from_checkpoint`."""
        return cls.from_checkpoint(open_checkpoint(folder), device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.decoder.norm.weight.dtype

    def log_mel(self, windows: list[Tensor]) -> Tensor:
        """Log-mel features of 1-D float32 waveforms of at most 30 s. Returns [batch, mel_bins, frames] in `dtype`."""
        batch = sent(nn.utils.rnn.pad_sequence(windows, batch_first=True), self.device)
        return log_mel(batch, mel_bins=self.config.encoder.mel_bins, dtype=self.dtype)

    def encode(self, mel: Tensor, samples: list[int], windows: list[int]) -> list[Tensor]:
        """Audio embeddings of a batch of windows, as the decoder takes them.

        mel: from `log_mel`; samples: length of each window; windows: index of each in its own audio.
        Returns one [tokens, decoder hidden] tensor per window.
        """
        encoded = self.encoder(mel, samples, windows)
        return list(self.adaptor(torch.cat(encoded)).split([len(tokens) for tokens in encoded]))
