"""The constraints of sampling as the logits processors of `transformers` apply them."""

import torch
from transformers.generation import logits_process as processors

from afnext.runtime.engine.sampler import SamplingParams


def processed(params: SamplingParams, prompt: list[int], answer: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The scores that `transformers` makes of `logits` [vocab], by its processors in its order."""
    ends = list(params.stop_token_ids)
    chain: list[processors.LogitsProcessor] = []
    if params.sequence_bias:
        chain.append(processors.SequenceBiasLogitsProcessor(dict(params.sequence_bias)))
    if params.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram_size:
        chain.append(processors.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.bad_words_ids:
        chain.append(processors.NoBadWordsLogitsProcessor([list(w) for w in params.bad_words_ids], ends))
    if params.min_new_tokens and ends:
        least = params.min_new_tokens
        chain.append(processors.MinNewTokensLengthLogitsProcessor(len(prompt), least, ends, device="cpu"))
    if params.suppress_tokens:
        chain.append(processors.SuppressTokensLogitsProcessor(list(params.suppress_tokens)))
    if params.begin_suppress_tokens:
        suppressed = list(params.begin_suppress_tokens)
        chain.append(processors.SuppressTokensAtBeginLogitsProcessor(suppressed, len(prompt)))
    scores, ids = logits[None].clone(), torch.tensor([prompt + answer])
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0]
