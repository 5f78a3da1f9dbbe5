"""Small byte-level BPE tokenizers with this model family's special tokens, and the text files of checkpoints.

`write_checkpoint_texts` lays out what a checkpoint's folder holds besides weights and model sizes: tokenizer, template,
processor and generation settings. `unpack_shared` does the same from the real vocabularies beside the repository.
"""

import json
import lzma
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SOUND, BOS, PAD, SOUND_BOS, SOUND_EOS = "<sound>", "[BOS]", "[PAD]", "<|sound_bos|>", "<|sound_eos|>"
TOOL_CALL = "<tool_call>"  # an added token that is not special

AFNEXT_ORDER = (END_OF_TEXT, IM_START, IM_END, TOOL_CALL, SOUND, BOS, PAD, SOUND_BOS, SOUND_EOS)
OTHER_ORDER = (SOUND_EOS, PAD, SOUND, IM_END, TOOL_CALL, END_OF_TEXT, SOUND_BOS, IM_START, BOS)
AF3_ORDER = (END_OF_TEXT, IM_START, IM_END, TOOL_CALL, SOUND, BOS, PAD)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Ċ is a newline and Ġ a space; the merges reach over the seams between template and text.
MERGES = [
    *[("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("u", "s"), ("e", "r"), ("us", "er")],
    *[("s", "o"), ("o", "u"), ("n", "d"), ("ou", "nd"), ("s", "ound"), ("<", "|"), ("|", ">"), ("i", "m")],
    *[("_", "e"), ("_e", "nd"), ("s", "y"), ("s", "t"), ("a", "s"), ("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ċ")],
    *[("Ġ", "Ġ"), ("ĠĠ", "Ċ"), ("Ã", "©"), ("ä", "½"), ("ä½", "ł"), ("ð", "Ł")],
]

DEFAULT_SYSTEM = "You listen — and answer."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\n{% endif %}"
    + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    + "{% if message['content'] | selectattr('type', 'equalto', 'audio') | list %}{{ '<sound>' }}{% endif %}"
    + "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_tokenizer(added: Sequence[str] = AFNEXT_ORDER) -> Tokenizer:
    """Byte-level BPE of 256 bytes and a few merges; `added` get the ids after those, in the order given."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = symbols + ["".join(merge) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    for spelling in added:
        tokenizer.add_tokens([AddedToken(spelling, normalized=False, special=spelling != TOOL_CALL)])
    return tokenizer


def write_checkpoint_texts(folder: Path, added: Sequence[str] = AFNEXT_ORDER, template: str = CHAT_TEMPLATE) -> Path:
    """Write a checkpoint's tokenizer, template, processor and generation files into `folder`."""
    tokenizer = small_tokenizer(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    processor: dict[str, object] = {"audio_token": SOUND, "max_audio_len": 1800}
    if SOUND_BOS in added:
        processor |= {"audio_bos_token": SOUND_BOS, "audio_eos_token": SOUND_EOS}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": BOS,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.token_to_id(IM_END)})
    return folder


def unpack_shared(shared_data: Path, name: str, folder: Path) -> Path:
    """Copy the tokenizer folder `name` of the shared data (`afnextA` or `mfdefaultB`), its vocabulary unpacked."""
    shutil.copytree(shared_data / "tokenizer" / name, folder, dirs_exist_ok=True)
    packed = folder / "tokenizer.json.xz"
    (folder / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
