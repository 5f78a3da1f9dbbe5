"""Quality of the answers: word error rate, accuracy of multiple choice, perplexity of one model against another.

Each row of a manifest gives a CSV row as soon as it is done, so an interrupted run continues where it stopped. The rows
carry fingerprints of the model and of the manifest: rows of another model are never mixed into a score.
"""

import csv
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ...kernels.errors import AfnextError
from ...runtime.app.api import Model
from ...runtime.app.conversation import Conversation
from ...runtime.engine.kv_cache import KVCache, page_table
from ...runtime.engine.prefill import AudioInput, PromptEmbeddings
from ...runtime.engine.sampler import SamplingParams
from ...runtime.engine.timings import Timings
from ...runtime.errors import AudioError, ContextLengthError, PromptError
from ..core.record import Record, ResultsError, append
from .data import GROUPS, Item, Items, Manifest, Task, choice_prompt, match_choice, normalise, read_manifest


class UnscorableError(AfnextError):
    """A text has no token that the model predicts."""


Progress = Callable[[int, int], None]
_ROW_ERRORS = (AudioError, PromptError, ContextLengthError, UnscorableError)
TRANSCRIBE = "Transcribe the input speech."
_COMMON = ("number", "id", "audio")
_LAST = ("finish_reason", "error", "model", "manifest", "status")  # the status last: a truncated row has none
_COLUMNS: dict[Task, tuple[str, ...]] = {
    "asr": ("reference", "hypothesis", "words", "substitutions", "deletions", "insertions"),
    "choice": ("answer", "reply", "chosen", "correct", *GROUPS),
    "perplexity": ("tokens", "nll", "baseline_nll", "kl", "top1_agreements"),
}
_LOGIT_ROWS = 32  # positions whose scores are in memory at once: 152 000 float64 each, 39 MB for one model


def run_quality(
    model: Model,
    data: Path,
    out: Path,
    *,
    baseline: Model | None = None,
    task: Task | Literal["auto"] = "auto",
    limit: int | None = None,
    subject: str | None = None,
    machine: dict[str, Any] | None = None,
    max_new_tokens: int = 512,
    restart: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Score a model on a manifest; write `out` (CSV, a row per item) and, with the suffix .jsonl, the score.

    data: a manifest or the folder of one, see `quality_data`. baseline: for perplexity, the model to compare with.
    limit: only the first rows. subject: its name, by default "afnext", the dtype and that of a quantized KV cache.
    restart: drop existing rows; otherwise existing rows are kept, failed ones are retried, and rows of another model or
    manifest raise ResultsError. progress: called with (rows done, rows in all). Decoding is greedy.

    A row whose audio or prompt is refused is kept with its error and counts in "failed", not in the score.
    """
    if out.suffix != ".csv":
        raise ResultsError(f"{out} should end in .csv; the summary is written beside it")
    if limit is not None and limit < 1:
        raise ResultsError(f"limit is {limit}; give 1 or more rows, or none for all")
    manifest = read_manifest(data, task)
    _check_baseline(model, baseline, manifest.task)
    if manifest.task == "asr":
        _jiwer()  # a missing package should fail before the first answer
    stamp = {"model": _fingerprint(model, baseline, max_new_tokens), "manifest": manifest.fingerprint}
    items = manifest.items[:limit]
    columns = (*_COMMON, *_COLUMNS[manifest.task], *_LAST)
    if restart:
        out.unlink(missing_ok=True)
    rows = {int(row["number"]): row for row in _resume(out, columns, stamp)}
    report = progress or (lambda done, total: None)
    report(sum(item.number in rows for item in items), len(items))
    for item in items:
        if item.number in rows:
            continue
        row = {"number": item.number, "id": item.id, "audio": item.audio_name, **stamp}
        try:
            row |= _score(model, baseline, manifest.task, item, max_new_tokens) | {"status": "ok"}
        except _ROW_ERRORS as error:
            row |= {"error": str(error), "status": "failed"}
        rows[item.number] = {column: _cell(row.get(column, "")) for column in columns}
        _append_rows(out, columns, [rows[item.number]])
        report(sum(item.number in rows for item in items), len(items))
    scored = [rows[item.number] for item in items]
    record = _summary(manifest, scored, subject or _subject(model), baseline is not None, machine or {})
    out.with_suffix(".jsonl").unlink(missing_ok=True)
    append(out.with_suffix(".jsonl"), record)
    return record


Answered = dict[str, Any]
_ANSWER_COLUMNS = ("figure", "question", "reply", "reference", "category")


def score_items(
    model: Model,
    items: Items,
    out: Path,
    answer: Callable[[Model, Sequence[Item], int], list[Answered]],
    *,
    summary: Callable[[Sequence[str]], dict[str, Any]],
    case: dict[str, Any],
    batch: int = 8,
    max_new_tokens: int = 512,
    restart: bool = False,
    machine: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Record:
    """Score a model by the caller's functions; `out` and resuming are as in `run_quality`.

    answer: given the model, some items and the limit of new tokens, returns for each a row with `figure` (a string that
    `summary` understands), question, reply, reference, category and finish_reason. It gets `batch` items at once; if
    one of them is refused, it gets each alone. summary: of the figures of all answered rows. case: of the record.
    """
    stamp = {"model": _fingerprint(model, None, max_new_tokens), "manifest": items.fingerprint}
    columns = (*_COMMON, *_ANSWER_COLUMNS, *_LAST)
    if restart:
        out.unlink(missing_ok=True)
    rows = {int(row["number"]): row for row in _resume(out, columns, stamp)}
    report = progress or (lambda done, total: None)
    left = [item for item in items.items if item.number not in rows]
    report(len(items.items) - len(left), len(items.items))
    for start in range(0, len(left), batch):
        some = left[start : start + batch]
        for item, found in zip(some, _together(model, some, answer, max_new_tokens), strict=True):
            row = {"number": item.number, "id": item.id, "audio": item.audio_name, **stamp, **found}
            rows[item.number] = {column: _cell(row.get(column, "")) for column in columns}
            _append_rows(out, columns, [rows[item.number]])
        report(len(items.items) - len(left) + start + len(some), len(items.items))
    scored = [rows[item.number] for item in items.items]
    ok = [row for row in scored if row["status"] == "ok"]
    values = {
        "items": len(ok),
        "failed": len(scored) - len(ok),
        "cut_answers": sum(row["finish_reason"] == "length" for row in ok),
        **summary([row["figure"] for row in ok]),
    }
    case = {**case, "fingerprint": items.fingerprint, "rows": len(scored)}
    record = Record("quality", "card", _subject(model), case, values, machine=machine or {})
    out.with_suffix(".jsonl").unlink(missing_ok=True)
    append(out.with_suffix(".jsonl"), record)
    return record


def _together(
    model: Model,
    items: Sequence[Item],
    answer: Callable[[Model, Sequence[Item], int], list[Answered]],
    max_new_tokens: int,
) -> list[Answered]:
    """The rows of some items; a refused item fails only its own row."""
    try:
        return [{**row, "status": "ok"} for row in answer(model, items, max_new_tokens)]
    except _ROW_ERRORS as error:
        if len(items) == 1:
            return [{"error": str(error), "status": "failed"}]
    return [row for item in items for row in _together(model, [item], answer, max_new_tokens)]


def word_errors(reference: str, hypothesis: str) -> dict[str, int]:
    """Number of words of the normalised reference, and substitutions, deletions and insertions in the hypothesis.

    Both are normalised, see `quality_data.normalise`. Raises AfnextError when jiwer is not installed.
    """
    reference, hypothesis = normalise(reference), normalise(hypothesis)
    output = _jiwer().process_words(reference, hypothesis)
    return {
        "words": len(reference.split()),
        "substitutions": output.substitutions,
        "deletions": output.deletions,
        "insertions": output.insertions,
    }


def _jiwer() -> ModuleType:
    try:
        import jiwer
    except ImportError:
        raise AfnextError("word error rates need jiwer: pip install jiwer") from None
    return jiwer


def _check_baseline(model: Model, baseline: Model | None, task: Task) -> None:
    if baseline is None:
        return
    if task != "perplexity":
        raise AfnextError(
            f"a baseline is compared with by perplexity, and this manifest's task is {task}; choose --task perplexity, "
            "or score each model by itself and compare the results"
        )
    sizes = [(one.tokenizer.vocab_size, one.network.config.decoder.vocab_size) for one in (model, baseline)]
    if sizes[0] != sizes[1]:
        raise AfnextError("the baseline has another vocabulary than the model; compare two forms of one checkpoint")


def _score(model: Model, baseline: Model | None, task: Task, item: Item, max_new_tokens: int) -> dict[str, Any]:
    if task == "perplexity":
        return _likelihood(model, baseline, item)
    assert item.audio is not None
    question = TRANSCRIBE if task == "asr" else choice_prompt(item.question, item.choices)
    answer = model.ask(str(item.audio), question, max_new_tokens=max_new_tokens, temperature=0.0)
    row = {"finish_reason": answer.finish_reason}
    if task == "asr":
        return {**row, "reference": item.text, "hypothesis": answer.text, **word_errors(item.text, answer.text)}
    match = match_choice(answer.text, item.choices)
    chosen = "" if match is None else item.choices[match]
    correct = match is not None and normalise(chosen) == normalise(item.text) and bool(chosen)
    return {**row, "answer": item.text, "reply": answer.text, "chosen": chosen, "correct": int(correct), **item.groups}


@torch.inference_mode()
def _likelihood(model: Model, baseline: Model | None, item: Item) -> dict[str, Any]:
    """Sums over the text's tokens, in nats: nll of the model and of the baseline, KL(baseline || model)."""
    text = model.tokenizer.encode(item.text)
    if baseline is not None and baseline.tokenizer.encode(item.text) != text:
        raise AfnextError("the baseline cuts this text into other tokens than the model")
    hidden, targets = _target_states(model, item, text)
    other = None if baseline is None else _target_states(baseline, item, text)[0]
    nll = baseline_nll = kl = 0.0
    agreements = 0
    for start in range(0, len(targets), _LOGIT_ROWS):
        block = slice(start, start + _LOGIT_ROWS)
        wanted = targets[block, None]
        scores = _log_probabilities(model, hidden[block])
        nll -= scores.gather(1, wanted).sum().item()
        if baseline is not None and other is not None:
            expected = _log_probabilities(baseline, other[block]).to(scores.device)
            baseline_nll -= expected.gather(1, wanted).sum().item()
            kl += (expected.exp() * (expected - scores)).sum().item()
            agreements += int((expected.argmax(1) == scores.argmax(1)).sum())
    row = {"tokens": len(targets), "nll": nll}
    return row if other is None else {**row, "baseline_nll": baseline_nll, "kl": kl, "top1_agreements": agreements}


def _log_probabilities(model: Model, hidden: Tensor) -> Tensor:
    return model.network.decoder.logits(hidden).double().log_softmax(-1)


def _target_states(model: Model, item: Item, text: list[int]) -> tuple[Tensor, Tensor]:
    """Normed hidden states that predict the text's tokens, [n, hidden], and those tokens, [n] int64.

    With audio, the text is the answer to `TRANSCRIBE`, after the prompt of the checkpoint's template. Without audio
    there is no prompt, and the first token, which nothing predicts, is left out.
    """
    ids, audio, first = text, tuple[AudioInput, ...](), 1
    if item.audio is not None:
        parts = [{"type": "audio", "audio": str(item.audio)}, {"type": "text", "text": TRANSCRIBE}]
        limit = model.network.config.max_audio_seconds
        messages = [{"role": "user", "content": parts}]
        conversation = Conversation.load(
            messages,
            model.tokenizer,
            model.template,
            max_audio_seconds=limit,
            truncate=False,
        )
        request = conversation.request(SamplingParams(max_new_tokens=1))
        ids, audio, first = [*request.token_ids, *text], request.audio, len(request.token_ids)
    if len(ids) <= first:
        raise UnscorableError("the text is too short to be scored: nothing of it is predicted")
    room = model.network.config.decoder.max_positions
    if len(ids) > room:
        raise ContextLengthError(f"prompt and text are {len(ids)} tokens, the context holds {room}; shorten the text")
    return _hidden_states(model, ids, audio, first - 1), torch.tensor(ids[first:], device=model.network.device)


def _hidden_states(model: Model, ids: list[int], audio: tuple[AudioInput, ...], start: int) -> Tensor:
    """Normed hidden states at the positions start .. len(ids) - 2, in the chunks of the model's own prefill."""
    network, options, length = model.network, model.options, len(ids) - 1
    pages = -(-length // options.page_size)
    cache = KVCache(
        network.config.decoder,
        pages=pages,
        page_size=options.page_size,
        device=network.device,
        dtype=options.cache_dtype(network.dtype),
    )
    table = page_table([cache.allocate(length)], network.device)
    embeddings = PromptEmbeddings(network, ids, audio, encode_batch=options.encode_batch, timings=Timings())
    kept = []
    for begin in range(0, length, options.chunk_size):
        end = min(begin + options.chunk_size, length)
        positions = torch.arange(begin, end, device=network.device)[None]
        hidden = network.decoder(embeddings.piece(begin, end), positions, cache.view(table, positions))
        kept.append(hidden[0, max(0, start - begin) :])
    return torch.cat(kept)


def _subject(model: Model) -> str:
    dtype = str(model.network.dtype).removeprefix("torch.")
    stored = model.network.config.quantization
    if stored is not None:
        dtype += f", {stored.name} weights"
    return f"afnext {dtype}" if model.options.kv == "auto" else f"afnext {dtype}, {model.options.kv} KV"


def _fingerprint(model: Model, baseline: Model | None, max_new_tokens: int) -> str:
    """A hash of the weights (a sample of each tensor), their dtype, the prompt's template and the answers' limit."""
    digest = hashlib.sha256(f"{max_new_tokens} {TRANSCRIBE}".encode())
    for one in (model, baseline):
        if one is None:
            continue
        digest.update(f"|{one.network.dtype}|{one.options.kv}|{one.template.source}".encode())
        for name, tensor in one.network.state_dict().items():
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)].cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _resume(path: Path, columns: tuple[str, ...], stamp: dict[str, str]) -> list[dict[str, str]]:
    """The finished rows of a CSV; removes all others from it. Raises ResultsError for rows with another stamp."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        text = file.read()  # an interruption may split a character; its row is dropped below
    lines = list(_lines(text, path)) if "\n" in text else []
    if lines and lines[0] != list(columns):
        raise ResultsError(f"{path} holds other columns than this task writes; give another --out, or --restart")
    whole = [dict(zip(columns, line, strict=True)) for line in lines[1:] if len(line) == len(columns)]
    whole = [row for row in whole if row["status"] in ("ok", "failed")]
    for part, new in stamp.items():
        if any(row[part] != new for row in whole):
            raise ResultsError(
                f"the rows of {path} were made with another {part} (or other settings of it); give another --out to "
                "keep both, or --restart to drop them"
            )
    done = [row for row in whole if row["status"] == "ok"]
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)
    _append_rows(temporary, columns, done)
    os.replace(temporary, path)
    return done


def _lines(text: str, path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(2**27)
    try:
        yield from csv.reader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise ResultsError(f"{path} is no CSV of this benchmark ({error}); give another --out, or --restart") from None


def _cell(value: Any) -> str:
    """The value for CSV, without NUL, which a model may generate and Python 3.10's csv cannot read."""
    return str(value).replace("\0", "\ufffd")


def _append_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", quoting=csv.QUOTE_ALL)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def _summary(
    manifest: Manifest, rows: list[dict[str, str]], subject: str, against_baseline: bool, machine: dict[str, Any]
) -> Record:
    ok = [row for row in rows if row["status"] == "ok"]
    summarise = {"asr": _asr_summary, "choice": _choice_summary, "perplexity": _perplexity_summary}[manifest.task]
    values = {
        "items": len(ok),
        "failed": len(rows) - len(ok),
        "cut_answers": sum(row["finish_reason"] == "length" for row in ok),
        **summarise(ok),
    }
    names = {"asr": "word error rate", "choice": "accuracy", "perplexity": "perplexity"}
    case = {"manifest": manifest.path.name, "fingerprint": manifest.fingerprint, "rows": len(rows)}
    if manifest.task == "perplexity":
        case["baseline"] = against_baseline
    return Record("quality", names[manifest.task], subject, case, values, machine=machine)


def _asr_summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    counts = {name: sum(int(row[name]) for row in rows) for name in _COLUMNS["asr"][2:]}
    errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    return {"wer": _ratio(errors, counts["words"]), **counts}


def _choice_summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for group in GROUPS:
        for name in sorted({row[group] for row in rows if row[group]}):
            by.setdefault(group, {})[name] = _accuracy([row for row in rows if row[group] == name])
    return {**_accuracy(rows), "unclear": sum(not row["chosen"] for row in rows), **({"by": by} if by else {})}


def _accuracy(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Accuracy with the bounds of its 95 % confidence interval (Wilson 1927)."""
    correct, total, z = sum(int(row["correct"]) for row in rows), len(rows), 1.96
    if not total:
        return {"accuracy": None, "correct": 0, "questions": 0}
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    bounds = {"accuracy_low": centre - reach, "accuracy_high": centre + reach}
    return {"accuracy": share, **bounds, "correct": correct, "questions": total}


def _perplexity_summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    tokens = sum(int(row["tokens"]) for row in rows)
    values = {"tokens": tokens, "perplexity": _perplexity(rows, "nll", tokens)}
    if rows and all(row["kl"] for row in rows):
        values["baseline_perplexity"] = _perplexity(rows, "baseline_nll", tokens)
        values["kl_nats_per_token"] = _ratio(math.fsum(float(row["kl"]) for row in rows), tokens)
        values["top1_agreement"] = _ratio(sum(int(row["top1_agreements"]) for row in rows), tokens)
    return values


def _perplexity(rows: list[dict[str, str]], column: str, tokens: int) -> float | None:
    mean = _ratio(math.fsum(float(row[column]) for row in rows), tokens)
    return None if mean is None else math.exp(min(mean, 700.0))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
