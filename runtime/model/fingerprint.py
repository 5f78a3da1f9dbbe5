"""The fingerprint of a model: tells whether another process's keys and values are those that the model computes."""

import hashlib
import math

import torch
from torch import Tensor

from .audio_flamingo import AudioFlamingo
from .sharding import Shard

_DIGEST_BYTES = 32
_SAMPLES = 4096


def model_fingerprint(model: AudioFlamingo) -> str:
    """Identifies the model that computed keys and values: a hash of its config, the shapes and dtypes of its weights,
    and up to 8191 elements of each.

    If this process holds a part of the model, the fingerprint is that of the whole, and all ranks must call this
    together.
    """
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=_DIGEST_BYTES)
    weights = dict(sorted(model.state_dict().items()))
    shapes = {name: tuple(w.shape) if model.shard is None else model.shard.shape(name) for name, w in weights.items()}
    samples = [_sample(name, weight, shapes[name], model.shard) for name, weight in weights.items()]
    if model.shard is not None:
        group, sizes = model.shard.group, list(map(len, samples))
        samples = list(group.all_reduce(torch.cat(samples).to(group.device)).cpu().split(sizes))
    for (name, weight), sample in zip(weights.items(), samples, strict=True):
        digest.update(f"{name} {weight.dtype} {shapes[name]}".encode())
        digest.update(sample.numpy().data)
    return digest.hexdigest()


def _sample(name: str, weight: Tensor, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
    """The bytes of some elements, [bytes] uint8. For a shard, the elements of other ranks are zeros."""
    count = math.prod(shape)
    step = max(1, count // _SAMPLES)
    indices = torch.arange(0, count, step)
    elements = weight.flatten()[::step] if shard is None else shard.elements(name, weight, indices)
    return elements.detach().cpu().contiguous().view(torch.uint8)
