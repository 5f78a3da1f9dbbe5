"""generation_config.json: a checkpoint's sampling defaults, interpreted as in `transformers`.

Every key is applied, has no effect on the answers of this runtime, or causes a warning at loading.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.constraints import Constraints
from ..engine.sampler import MOST_TOKENS, SamplingParams
from ..errors import ConfigError, SamplingError
from ..files import shown
from ..values import flag, real, whole

FILE = "generation_config.json"
MOST_STOPS, LONGEST_STOP = 256, 1000  # stop strings, and characters per string

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_ALWAYS = ("max_new_tokens", "repetition_penalty", "min_new_tokens", "no_repeat_ngram_size")
_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
# Defaults of `transformers` for a file that enables sampling.
_UNSET = {"temperature": 1.0, "top_k": 50}

# Keys that are not implemented, with the values, besides null, that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "watermarking_config": (),
    "max_time": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
}
_NEUTRAL_IN_SAMPLING = {"typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": ()}

# Token ids, which the tokenizer reads; settings of speed, caches and output format; settings of beam search.
_WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "use_mtp", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "low_memory", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    *("early_stopping", "length_penalty", "renormalize_logits"),
    *("transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code", "chat_format"),
}

_log = logging.getLogger("afnext")


@dataclass(frozen=True)
class GenerationDefaults:
    """A checkpoint's defaults. sampling: fields of `SamplingParams`; stop: strings that end an answer; min_length:
    minimal number of tokens of prompt and answer."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    min_length: int = 0


def generation_defaults(settings: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
    """The defaults in `settings`, the content of generation_config.json, for a vocabulary of that size.

    Sampling options apply only if `do_sample` is true, as in `transformers`; null counts as absent. Raises ConfigError,
    naming file and key, for a value of the wrong type or out of range. Logs one warning that names the unimplemented
    keys that would change answers.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        sampled = flag("do_sample", given.get("do_sample", False), SamplingError)
        chosen = {name: given[name] for name in (*_ALWAYS, *_SAMPLING, *_TOKENS) if name in given}
        checked = SamplingParams(**{"max_new_tokens": 1, **chosen})
        Constraints(checked, (), vocab_size, torch.device("cpu"))
        # Always checked, but without effect unless `do_sample` is true, as in `transformers`.
        names = [name for name in chosen if sampled or name not in _SAMPLING]
        stop = stop_strings("stop_strings", given.get("stop_strings", ()))
        least = whole("min_length", given.get("min_length", 0), SamplingError, least=0, most=MOST_TOKENS)
        ignored = _ignored(given, sampled)
    except SamplingError as error:
        raise ConfigError(f"{FILE}: {error}. Correct or remove it.") from None
    if ignored:
        _log.warning(
            "%s sets %s, which this runtime does not implement: answers may differ from those of transformers",
            FILE,
            ", ".join(ignored),
        )
    defaults = dict(_UNSET) if sampled else {}
    return GenerationDefaults(defaults | {name: getattr(checked, name) for name in names}, stop, least)


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """The stop strings in `value`, one string or several. Raises SamplingError for anything else."""
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise SamplingError(f"{name} is {shown(value)}; it must be a string or a list of strings")
    if "" in stops:
        raise SamplingError(f"{name} has an empty string, which would end every answer at once; remove it")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise SamplingError(f"{name} takes up to {MOST_STOPS} strings of up to {LONGEST_STOP:,} characters")
    return tuple(stops)


def _ignored(given: Mapping[str, Any], sampled: bool) -> list[str]:
    """The keys that would change answers and are not implemented; raises SamplingError for numbers of another type."""
    neutral = {**_NEUTRAL, **_NEUTRAL_IN_SAMPLING}
    known = {"do_sample", "stop_strings", "min_length", "max_length", *_ALWAYS, *_SAMPLING, *_TOKENS, *_WITHOUT_EFFECT}
    ignored = []
    for key, value in given.items():
        if key in known:
            continue
        if key not in neutral:
            ignored.append(shown(key, 40).strip("'"))
            continue
        if neutral[key] and not isinstance(neutral[key][0], bool):
            real(key, value, SamplingError, "finite")
        elif neutral[key]:
            flag(key, value, SamplingError)
        if value not in neutral[key] and (sampled or key not in _NEUTRAL_IN_SAMPLING):
            ignored.append(key)
    if "max_length" in given and "max_new_tokens" not in given:
        whole("max_length", given["max_length"], SamplingError, least=1, most=MOST_TOKENS)
        ignored.append("max_length (set max_new_tokens, which does not count the prompt)")
    return ignored[:20]
