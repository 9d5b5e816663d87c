"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gluonts_peft.files import replacing, write_atomically


def test_a_file_is_replaced_only_after_all_went_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """The second begins while the first writes, and is done before it: each puts its own text there, whole."""
    path = tmp_path / "a.txt"
    with replacing(path) as slow:
        slow.write_text("slow, beg")
        write_atomically(path, "quick")
        assert path.read_text() == "quick"
        slow.write_text("slow, whole")
    assert path.read_text() == "slow, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    texts = [letter * 200_000 for letter in "abcd"]
    write_atomically(path, texts[0])
    with ThreadPoolExecutor(len(texts)) as pool:
        writers = [pool.submit(lambda text: [write_atomically(path, text) for _ in range(10)], text) for text in texts]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in texts
        for writer in writers:
            writer.result()
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.txt", "text: ü")
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert (tmp_path / "a.txt").read_bytes() == "text: ü".encode()


def test_where_nothing_can_be_written_the_error_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file"):
        write_atomically(tmp_path / "file" / "a.txt", "text")
