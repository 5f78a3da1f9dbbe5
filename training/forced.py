"""The divergence of afnext-tiny, stored in several ways, on the right lists of long recordings.

    python -m training.forced FOLDER --minutes 10 --recordings 3

FOLDER is that of `train` and `export`. The right list (of all events, of the words, of the sounds) follows the question
token by token, and the probabilities of each next token are compared with those of the dense model with a float32 KV
cache. In a list that the model writes itself, one other token changes all that follow; here every token counts alone.
Prints a table in Markdown.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor

from afnext.runtime.app.conversation import Conversation
from afnext.runtime.checkpoint_folder import CheckpointFolder
from afnext.runtime.engine.kv_cache import QUANTIZED, KVCache
from afnext.runtime.engine.prefill import PromptEmbeddings, prefill, run_chunk
from afnext.runtime.engine.timings import Timings
from afnext.runtime.io.prompt import PromptTemplate
from afnext.runtime.io.tokenizer import Tokenizer
from afnext.runtime.model.audio_flamingo import AudioFlamingo

from .evaluate import long_recording
from .scenes import Item, lines
from .schemes import Storage, Stored
from .vocabulary import DESCRIBE, SOUNDS_TIMES, TRANSCRIBE_TIMES
from .voices import RATE, VoiceBank

STORAGES = (
    *(Storage(kv=kv) for kv in ("auto", "int8", "int4")),
    *(Storage(scheme) for scheme in ("int4-g64", "small", "int3-g64")),
)
"""The first is the one that others are compared with."""
_PAGE, _CHUNK = 256, 1024


@dataclass(frozen=True)
class Forced:
    """A prompt with a recording, and the tokens of the right answer, the end included."""

    conversation: Conversation
    answer: list[int]


def right_lists(items: list[Item]) -> dict[str, str]:
    """The right list by question: of all items, of the words, of the sounds."""
    words, sounds = ([item for item in items if item.is_word == kind] for kind in (True, False))
    return {DESCRIBE[0]: lines(items, quoted=True), TRANSCRIBE_TIMES[0]: lines(words), SOUNDS_TIMES[0]: lines(sounds)}


def forced(folder: Path, samples: np.ndarray, answers: Mapping[str, str]) -> Iterator[Forced]:
    """Questions about a recording with their answers. folder: of the checkpoint."""
    files = CheckpointFolder(folder)
    tokenizer, template = Tokenizer.from_folder(files), PromptTemplate.from_folder(files)
    end = min(tokenizer.eos_ids)
    for question, answer in answers.items():
        parts = [{"type": "audio", "audio": (samples, RATE)}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        conversation = Conversation.load(messages, tokenizer, template, max_audio_seconds=1800, truncate=False)
        yield Forced(conversation, [*tokenizer.encode(answer), end])


@torch.inference_mode()
def log_probabilities(network: AudioFlamingo, asked: Sequence[Forced], kv: str) -> list[Tensor]:
    """The log-probabilities of each token of the answers, [tokens, vocabulary] float64, with a KV cache in the format
    `kv`. The questions are about one recording, which is read once."""
    ids = [each.conversation.prompt.token_ids for each in asked]
    shared = next(at for at, tokens in enumerate(zip(*ids, strict=False)) if len({*tokens}) > 1)
    longest = max(len(tokens) + len(each.answer) for tokens, each in zip(ids, asked, strict=True))
    cache = KVCache(
        network.config.decoder,
        pages=-(-longest // _PAGE),
        page_size=_PAGE,
        device=network.device,
        dtype=QUANTIZED.get(kv, network.dtype),
    )
    pages = cache.pool.allocate(cache.pool.pages)
    timings = Timings()
    embeddings = PromptEmbeddings(network, ids[0], asked[0].conversation.audio, encode_batch=4, timings=timings)
    prefill(network, cache, pages, embeddings, shared, chunk_size=_CHUNK, timings=timings)
    scored = []
    for tokens, each in zip(ids, asked, strict=True):
        rest = tokens[shared:]
        x = network.decoder.embed(torch.tensor(rest + each.answer[:-1]))[None]
        hidden = run_chunk(network, cache, pages, x, shared)[0, len(rest) - 1 :]
        scored.append(network.decoder.logits(hidden).double().log_softmax(-1))
    return scored


def divergences(exact: Sequence[Tensor], other: Sequence[Tensor], asked: Sequence[Forced]) -> Tensor:
    """For each token: the KL divergence in nats, 1 if another token is the most probable, and the negative
    log-probability of the right one. [tokens, 3] float64."""
    p, q = torch.cat(list(exact)), torch.cat(list(other))
    changed = p.argmax(-1) != q.argmax(-1)
    right = torch.tensor([token for each in asked for token in each.answer])
    return torch.stack(((p.exp() * (p - q)).sum(-1), changed.double(), -q.gather(1, right[:, None])[:, 0]), -1)


def main(folder: Path, minutes: float = 30.0, recordings: int = 3) -> None:
    """Compare the checkpoint in FOLDER stored in several ways; see the module. minutes: length of a recording."""
    bank = VoiceBank(folder / "bank", "held_out")
    found: dict[str, list[Tensor]] = {storage.name: [] for storage in STORAGES}
    with tempfile.TemporaryDirectory() as work:
        stored = Stored(folder, Path(work))
        for number in range(recordings):
            samples, items = long_recording(bank, number, minutes)
            asked = list(forced(folder / "checkpoint", samples, right_lists(items)))
            scored = [log_probabilities(stored.load(each).network, asked, each.kv) for each in STORAGES]
            for rows, other in zip(found.values(), scored, strict=True):
                rows.append(divergences(scored[0], other, asked))
    print("| | tokens | divergence, thousandths of a nat per token | other token | right token, nats |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in found.items():
        divergence, changed, right = torch.cat(rows).mean(0).tolist()
        print(f"| {name} | {sum(map(len, rows))} | {1000 * divergence:.3g} | {100 * changed:.1f} % | {right:.3f} |")


if __name__ == "__main__":
    typer.run(main)
