"""Which recordings are transcribed, and where each transcript goes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.kernels.errors import AfnextError
from afnext.runtime.app.cli.targets import Recording, is_folder, output_paths, recordings
from afnext.runtime.errors import AudioError


def touched(folder: Path, *names: str) -> list[str]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return [str(path) for path in paths]


def test_folders_are_walked(tmp_path: Path) -> None:
    touched(tmp_path, "b/two.mp3", "a.wav", "b/one.FLAC", "notes.txt", ".hidden/x.wav", "b/.x.wav", "b/c/three.opus")
    found = recordings(["-", "named.txt", str(tmp_path)])
    assert [str(recording.below) for recording in found] == [
        "stdin",
        "named.txt",
        "a.wav",
        "b/one.FLAC",
        "b/two.mp3",
        "b/c/three.opus",
    ]
    assert found[2].source == str(tmp_path / "a.wav")
    touched(tmp_path, "empty/notes.txt")
    with pytest.raises(AudioError, match="no audio or video files"):
        recordings([str(tmp_path / "empty")])


def test_a_slash_means_a_folder(tmp_path: Path) -> None:
    one = [Recording("talk.wav", Path("talk.wav"))]
    assert output_paths(one, str(tmp_path / "out"), "srt", several=False) == [tmp_path / "out"]
    assert output_paths(one, f"{tmp_path}/out/", "srt", several=False) == [tmp_path / "out" / "talk.srt"]
    assert output_paths(one, str(tmp_path), "srt", several=False) == [tmp_path / "talk.srt"]
    assert output_paths(one, None, "srt", several=False) == output_paths(one, "-", "srt", several=False) == [None]
    assert output_paths(one, "/dev/stdout", "srt", several=True) == [None]
    assert (is_folder("x", 1), is_folder("x/", 1), is_folder("x", 2)) == (False, True, True)


def test_equal_names_keep_their_folders_or_suffixes(tmp_path: Path) -> None:
    named = touched(tmp_path, "x/talk.wav", "y/talk.wav", "y/talk.mp3", "y/other.wav")
    out = tmp_path / "out"
    paths = output_paths(recordings(named), str(out), "txt", several=True)
    assert paths == [out / "x/talk.txt", out / "y/talk.wav.txt", out / "y/talk.mp3.txt", out / "other.txt"]
    assert output_paths(recordings([str(tmp_path)]), str(out), "srt", several=True) == [
        out / "x/talk.srt",
        out / "y/other.srt",
        out / "y/talk.mp3.srt",
        out / "y/talk.wav.srt",
    ]


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    [clip, other] = touched(tmp_path, "clip.wav", "other.wav")
    with pytest.raises(AfnextError, match="only once"):
        output_paths(recordings([clip, clip]), str(tmp_path / "out"), "srt", several=True)
    with pytest.raises(AfnextError, match="is a recording"):
        output_paths(recordings([clip]), clip, "srt", several=False)
    with pytest.raises(AfnextError, match="is a file"):
        output_paths(recordings([clip, other]), other, "srt", several=True)


names = st.lists(st.sampled_from(["a", "A", "b"]), min_size=1, max_size=3).map("/".join)
files = st.tuples(names, st.sampled_from([".wav", ".mp3", ".b.wav"])).map("".join)


@given(st.lists(files, min_size=1, max_size=8, unique=True), st.sampled_from(["srt", "txt"]))
def test_transcripts_never_meet(sources: list[str], suffix: str) -> None:
    found = [Recording(source, Path(Path(source).name)) for source in sources]
    try:
        paths = output_paths(found, "out/", suffix, several=True)
    except AfnextError:
        assert len({source.casefold() for source in sources}) < len(sources), "all can be told apart"
        return
    assert len({str(path).casefold() for path in paths}) == len(paths)
    assert all(path is not None and path.parts[0] == "out" and ".." not in path.parts for path in paths)
    assert all(path is not None and path.suffix == f".{suffix}" for path in paths)
