"""Files written whole or not at all, and whose error is named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cropi.errors import CropiError
from cropi.files import replacing


def test_an_error_of_a_file_that_is_read_meanwhile_is_not_one_of_writing(tmp_path: Path) -> None:
    out, source = tmp_path / "new" / "out.jsonl", tmp_path / "source.jsonl"
    for number in (errno.EACCES, errno.ENOENT):
        with pytest.raises(OSError, match="source.jsonl") as caught, replacing(out):
            raise OSError(number, "no", str(source))
        assert not isinstance(caught.value, CropiError) and "cannot write" not in str(caught.value)
    assert list(out.parent.iterdir()) == []


def test_an_error_of_the_file_itself_its_folder_or_the_disk_is_one_of_writing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for number, name, remedy in (
        (errno.EACCES, out.with_name(".x.tmp"), "give a path that can be written"),
        (errno.EROFS, tmp_path, "give a path that can be written"),
        (errno.ENOSPC, None, "free some space"),
    ):
        with pytest.raises(CropiError, match=f"cannot write {out}: .*{remedy}"), replacing(out) as temporary:
            raise OSError(number, "no", *([] if name is None else [str(temporary if name.suffix else name)]))
    (tmp_path / "file").write_text("")
    with pytest.raises(CropiError, match="cannot write .*out.jsonl: .*; give a path"):
        with replacing(tmp_path / "file" / "below" / "out.jsonl"):
            pass
