"""Output files replace others completely or not at all; only regular files are opened."""

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from afnext.runtime.errors import CheckpointError, ContextFileError
from afnext.runtime.files import open_regular, output_file, read_json_object

MAX_NAME = 255


def write(path: Path, contents: bytes) -> None:
    with output_file(path, ContextFileError) as file:
        file.write(contents)


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    for name in ("new", "n" * MAX_NAME, "ñ\udcff名前"):
        write(tmp_path / name, b"contents")
        assert (tmp_path / name).read_bytes() == b"contents"
        assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 4


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old contents")
    (tmp_path / "old").chmod(0o640)
    write(tmp_path / "old", b"new")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt("mine"), KeyboardInterrupt, "mine"),
        (ValueError("mine"), ValueError, "mine"),
        (OSError(errno.ENOSPC, "No space"), ContextFileError, r"cannot be written \(No space\); free some space"),
    ],
)
def test_after_an_exception_the_folder_is_as_it_was(
    tmp_path: Path, error: BaseException, expected: type[BaseException], message: str
) -> None:
    def write_half(path: Path) -> None:
        with output_file(path, ContextFileError) as file:
            file.write(b"half")
            raise error

    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        with pytest.raises(expected, match=message):
            write_half(tmp_path / name)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"old")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs and limits of file sizes")
def test_what_the_disk_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    """A real refusal of the kernel, in a process that may write 8 KiB to a file."""
    code = (
        "import resource, sys, pathlib\n"
        "from afnext.runtime.errors import ContextFileError\n"
        "from afnext.runtime.files import output_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try:\n"
        "    with output_file(pathlib.Path(sys.argv[1]), ContextFileError) as file:\n"
        "        file.write(bytes(8000)); file.write(bytes(8000))\n"
        "except ContextFileError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "large"], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(path.with_name("secret"))


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("only root can make devices")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize(
    ("make", "kind"), [(fifo, "a FIFO"), (link, "a symbolic link"), (device, "a device"), (Path.mkdir, "a folder")]
)
def test_only_regular_files_are_replaced(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    target = tmp_path / "target"
    (tmp_path / "secret").write_bytes(b"secret")
    make(target)
    before = target.lstat()
    with pytest.raises(ContextFileError, match=f"is {kind}; choose the path"):
        write(target, b"contents")
    assert (target.lstat().st_ino, target.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert {path.name for path in tmp_path.iterdir()} == {"target", "secret"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 256, "choose a shorter name"),
        ("/".join(["folder"] * 1000), "choose a shorter name"),
        ("missing/file", "create the folder first"),
        ("file/file", "create the folder first"),
        ("nul\0", "cannot be written"),
        (".", "is a folder"),
        ("..", "is a folder"),
    ],
)
def test_impossible_paths_are_explained(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ContextFileError, match=message):
        write(tmp_path / name, b"contents")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(ContextFileError, match="change its permissions"):
        write(tmp_path / "old", b"new")
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_planted_temporary_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever guesses the temporary's name and puts a link there gains nothing."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "guessed")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / ".new.guessed.part").symlink_to(tmp_path / "secret")
    with pytest.raises(ContextFileError, match="File exists"):
        write(tmp_path / "new", b"contents")
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_of_two_writers_the_last_to_end_wins_whole(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def writer(value: int) -> None:
        start.wait()
        with output_file(tmp_path / "file", ContextFileError) as file:
            for _ in range(100):
                file.write(bytes([value]) * 1000)

    threads = [threading.Thread(target=writer, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = (tmp_path / "file").read_bytes()
    assert contents == bytes([contents[0]]) * 100_000
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize(("make", "kind"), [(fifo, "a FIFO"), (device, "a device"), (Path.mkdir, "a folder")])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "file.json")
    with pytest.raises(CheckpointError, match=f"x cannot be read: it is {kind}"):
        open_regular(tmp_path / "file.json", "x", CheckpointError)
    with pytest.raises(CheckpointError, match=f"x cannot be read: it is {kind}"):  # would wait for ever on a FIFO
        read_json_object(tmp_path / "file.json", "x", CheckpointError)


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"contents")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link", "x", CheckpointError) as file:
        assert file.read() == b"contents"
    for missing in (tmp_path / "nowhere", tmp_path / "nul\0", tmp_path / ("n" * 256)):
        with pytest.raises(CheckpointError, match=r"x cannot be read .*; check the path"):
            open_regular(missing, "x", CheckpointError)
