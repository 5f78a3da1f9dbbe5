"""Small copies of the model card's datasets, in the layouts in which they are published."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import afnext.bench

CLIP = Path(afnext.bench.__path__[0]) / "data" / "jfk.flac"
UTTERANCES = {
    ("1089", "134686", "0000"): "HE HOPED THERE WOULD BE STEW FOR DINNER",
    ("1089", "134686", "0001"): "STUFF IT INTO YOU HIS BELLY COUNSELLED HIM",
    ("121", "121726", "0000"): "ALSO A POPULAR CONTRIVANCE",
}


def recording(path: Path) -> None:
    """Put a short recording at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CLIP.read_bytes())


def librispeech(folder: Path, part: str = "test-clean") -> Path:
    """LibriSpeech/PART/SPEAKER/CHAPTER with its transcripts and recordings, as the archive unpacks."""
    for (speaker, chapter, number), text in UTTERANCES.items():
        where = folder / "LibriSpeech" / part / speaker / chapter
        key = f"{speaker}-{chapter}-{number}"
        recording(where / f"{key}.flac")
        with (where / f"{speaker}-{chapter}.trans.txt").open("a", encoding="utf-8") as file:
            file.write(f"{key} {text}\n")
    return folder


def librispeech_table(folder: Path) -> Path:
    """clean/test-*.parquet with the columns of openslr/librispeech_asr."""
    rows = [
        {
            "file": f"{'-'.join(key)}.flac",
            "audio": {"bytes": CLIP.read_bytes(), "path": f"{'-'.join(key)}.flac"},
            "text": text,
            "speaker_id": int(key[0]),
            "chapter_id": int(key[1]),
            "id": "-".join(key),
        }
        for key, text in UTTERANCES.items()
    ]
    _parquet(folder / "test-00000-of-00001.parquet", rows)
    return folder


def mmau(folder: Path) -> Path:
    """mmau-test-mini.json and test-mini-audios/, with the fields of v05.15.25."""
    row = {
        "id": "3fe64f3d-282c-4bc8-a753-68f8f6c35652",
        "audio_id": "./test-mini-audios/3fe64f3d-282c-4bc8-a753-68f8f6c35652.wav",
        "question": "For the given audio sample, identify the source of the speaking voice.",
        "choices": ["Man", "Woman", "Child", "Robot"],
        "answer": "Man",
        "dataset": "AudioSet",
        "task": "speech",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Acoustic Source Inference",
        "difficulty": "hard",
    }
    recording(folder / str(row["audio_id"]))
    (folder / "mmau-test-mini.json").write_text(json.dumps([row], indent=4))
    return folder


def mmar(folder: Path) -> Path:
    """MMAR-meta.json and audio/."""
    row = {
        "id": "Zy_4nmE7wQc_00-00-00_00-00-12",
        "audio_path": "./audio/Zy_4nmE7wQc_00-00-00_00-00-12.wav",
        "question": "Who is the speaker?",
        "choices": ["a president", "a singer"],
        "answer": "a president",
        "modality": "speech",
        "category": "Semantic Layer",
        "sub-category": "Content Analysis",
        "language": "en",
        "source": "youtube",
        "url": "https://www.youtube.com/watch?v=Zy_4nmE7wQc",
        "timestamp": "00:00:00,00:00:12",
    }
    recording(folder / str(row["audio_path"]))
    (folder / "MMAR-meta.json").write_text(json.dumps([row]))
    return folder


def medley(folder: Path) -> Path:
    """The table of Medley-solos-DB beside recordings of two subsets."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "Medley-solos-DB_metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subset", "instrument", "instrument_id", "song_id", "uuid4"])
        for subset, number in (("training", 0), ("test", 4), ("test", 7)):
            identifier = f"0e4371ac-1c6a-51ab-f7a7-{subset}{number}"
            writer.writerow([subset, "whatever", number, 18, identifier])
            recording(folder / f"Medley-solos-DB_{subset}-{number}_{identifier}.wav")
    return folder


_MMAU_PRO: dict[str, Any] = {
    "length_type": "short",
    "perceptual_skills": ["Pitch"],
    "reasoning_skills": [],
    "transcription": None,
    "task_classification": None,
    "task_identifier": None,
    "kwargs": None,
    "sub-cat": "Speech",
}


def mmau_pro(folder: Path) -> Path:
    """test.parquet and data/: a choice, one of two recordings, an open one, an instruction, one without choices."""
    rows: list[dict[str, Any]] = [
        {"category": "speech", "question": "Who speaks?", "choices": ["A man", "A child"], "answer": "A man"},
        {"category": "multi", "question": "Which?", "choices": ["The first", "The second"], "answer": "The first"},
        {"category": "open", "question": "What is it about?", "choices": [], "answer": "It is about duty."},
        {
            "category": "instruction following",
            "question": "Describe it in at most 3 words.",
            "choices": [],
            "answer": None,
            "task_identifier": "Number Words (at most)",
            "kwargs": {"N": 3.0, "keyword": None},
        },
        {"category": "sound", "question": "What rings?", "choices": ["A bell"], "answer": "A bell"},
    ]
    rows = [{**_MMAU_PRO, **row, "id": f"q{i}", "audio_path": [f"data/{i}.wav"]} for i, row in enumerate(rows)]
    rows[1]["audio_path"] = ["data/1.wav", "data/1b.wav"]
    for row in rows:
        for name in row["audio_path"]:
            recording(folder / name)
    _parquet(folder / "test.parquet", rows)
    return folder


def mmsu_rows() -> list[dict[str, Any]]:
    """Two questions of MMSU, of which one has three choices."""
    common = {
        "category": "Perception",
        "sub-category": "Paralinguistics",
        "sub-sub-category": "Speaker Traits",
        "linguistics_sub_discipline": "",
    }
    return [
        {
            "id": "accent_identification_58df4754",
            "task_name": "accent_identification",
            "question": "Which accent is it?",
            "choice_a": "Irish",
            "choice_b": "Scottish",
            "choice_c": "Canadian",
            "choice_d": "American",
            "answer_gt": "American",
            **common,
        },
        {
            "id": "total_speaker_counting_9de100ee",
            "task_name": "total_speaker_counting",
            "question": "How many people speak?",
            "choice_a": "1",
            "choice_b": "2",
            "choice_c": "3",
            "choice_d": None,
            "answer_gt": "1",
            **common,
        },
    ]


def mmsu_tables(folder: Path) -> Path:
    """data/train-*.parquet with the recordings inside."""
    rows = [{**row, "audio": {"bytes": CLIP.read_bytes(), "path": f"{row['id']}.wav"}} for row in mmsu_rows()]
    for i, row in enumerate(rows):
        _parquet(folder / "data" / f"train-0000{i}-of-00002.parquet", [row])
    return folder


def mmsu_lines(folder: Path) -> Path:
    """question/mmsu.jsonl and audio/; a choice may be a number."""
    lines = []
    for row in mmsu_rows():
        name = f"{row['id']}.wav"
        recording(folder / "audio" / name)
        numbers = {k: int(v) if str(v).isdigit() else v for k, v in row.items()}
        lines.append(json.dumps({**numbers, "audio_path": f"/home/author/MMSU/audio/{name}"}))
    (folder / "question").mkdir()
    (folder / "question" / "mmsu.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def long_audio(folder: Path) -> Path:
    """A list in the layout of nvidia/LongAudio beside its recordings."""
    row = {
        "id": 17,
        "sound": "17.wav",
        "duration": 310.5,
        "conversations": [
            {"from": "human", "value": "<sound>\nWhat does the speaker ask for?"},
            {"from": "gpt", "value": "He asks what one can do for one's country."},
        ],
    }
    recording(folder / "17.wav")
    (folder / "LongAudioBench.json").write_text(json.dumps([row]))
    return folder


_GERMAN = (
    ("common_voice_en_1.mp3", 'He said "go".', 'Er sagte "los".', "test"),
    ("common_voice_en_2.mp3", "It rains.", "Es regnet.", "test"),
    ("common_voice_en_3.mp3", "Not validated.", "Nicht geprüft.", "test"),
    ("common_voice_en_4.mp3", "To train on.", "Zum Lernen.", "train_covost"),
)


def covost2(folder: Path, *, split: bool) -> Path:
    """English to German: the publisher's table and Common Voice's, or if `split` what its script makes of them."""
    for name, *_ in _GERMAN[:3]:
        recording(folder / "en" / "clips" / name)
    if split:
        lines = ["path\tsentence\ttranslation\tclient_id"]
        lines += [f"{name}\t{spoken}\t{german}\tc1" for name, spoken, german, _ in _GERMAN[:2]]
        (folder / "covost_v2.en_de.test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder
    lines = ["path\ttranslation\tsplit", *(f"{name}\t{german}\t{part}" for name, _, german, part in _GERMAN)]
    (folder / "covost_v2.en_de.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = [row for row in _GERMAN if "Not" not in row[1]]
    lines = ["client_id\tpath\tsentence", *(f"c1\t{name}\t{spoken}" for name, spoken, *_ in known)]
    (folder / "en" / "validated.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def covost2_table(folder: Path) -> Path:
    """test-*.parquet with the columns of fixie-ai/covost2."""
    rows = [
        {
            "client_id": "c1",
            "file": name,
            "audio": {"bytes": CLIP.read_bytes(), "path": name},
            "sentence": spoken,
            "translation": german,
            "id": name.removesuffix(".mp3"),
        }
        for name, spoken, german, _ in _GERMAN[:2]
    ]
    _parquet(folder / "test-00000-of-00001.parquet", rows)
    return folder


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
