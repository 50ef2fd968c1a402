"""Files written whole or not at all, and whose error is named."""

from __future__ import annotations

import codecs
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cropi.atomic import make_folder, replacing, write_atomic
from cropi.cli.config import read_config
from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.data.saved import save_folder
from cropi.errors import CropiError
from cropi.files import check_outputs, check_room
from cropi.gradient.template import template_text
from cropi.ranking.scores import Scores
from cropi.ranking.selection_files import read_selection, selected_rows
from cropi.rollouts.rewards import Reward
from cropi.store.store import SketchStore
from cropi.trainers.dumps.pickled import load_dump
from cropi.trainers.dumps.recognise import recognise


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file whose first page cannot be read")
@pytest.mark.parametrize(
    "work",
    [
        lambda path: list(read(path)),
        lambda path: list(read(path, columns={"prompt": "question"})),
        lambda path: load_dump(path, "a dump"),
        lambda path: read_dataset(path.with_suffix(".jsonl")),
        lambda path: read_dataset(path.with_suffix(".json")),
        lambda path: list(selected_rows(path)),
        lambda path: template_text(str(path)),
        lambda path: recognise(path),
    ],
    ids=["records", "columns", "dump", "lines", "json", "selection", "template", "recognise"],
)  # fmt: skip
def test_a_disk_that_cannot_be_read_is_said_in_words(tmp_path: Path, work: Callable[[Path], Any]) -> None:
    """By every function that reads what a user gives, not by the commands alone."""
    for ending in ("", ".jsonl", ".json"):
        (tmp_path / f"x{ending}").symlink_to("/proc/self/mem")
    with pytest.raises(CropiError, match=f"cannot read {tmp_path}/x.*: input/output error; see to the disk"):
        work(tmp_path / "x")


def test_a_link_that_was_planted_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who may write into the folder and guesses the temporary name: the link's target stays as it is."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "00000000")
    target, out = tmp_path / "target", tmp_path / "out.txt"
    target.write_text("precious")
    with replacing(out) as temporary:
        name = temporary.name
        temporary.write_text("new")
    (tmp_path / name).symlink_to(target)
    with pytest.raises(CropiError, match="cannot write .*out.txt: file exists"):
        write_atomic(out, "newer")
    assert (target.read_text(), out.read_text()) == ("precious", "new")


def test_permissions_of_a_replaced_file_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    before = os.umask(0o027)
    try:
        write_atomic(out, "1")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o640, "a new file has those of any new file"
    out.chmod(0o604)
    write_atomic(out, "2")
    assert (out.stat().st_mode & 0o777, out.read_text()) == (0o604, "2")


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    out, code = tmp_path / "a[1].txt", "import os, sys\nfrom cropi.atomic import replacing\n"
    code += (
        "with replacing(__import__('pathlib').Path(sys.argv[1])) as t:\n    t.write_text('half'); os._exit(9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(out)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    other = tmp_path / f".a[1].txt.elsewhere.{os.getpid()}.00.tmp"
    other.write_text("another machine's")
    with replacing(out) as temporary:
        temporary.write_text("whole")
        write_atomic(out, "by another call meanwhile")
        assert temporary.exists(), "a living process's file stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, other.name])
    assert out.read_text() == "whole"


SAVES = """
import os, sys
from pathlib import Path
from datasets import Dataset
from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.data.saved import save_folder

out, stop, count = Path(sys.argv[1]), int(sys.argv[2]), 0
rename = os.replace

def replace(*names):
    global count
    count += 1
    if count == stop:
        os._exit(9)
    rename(*names)

save_folder(out, Dataset.from_dict({"a": [1]}))
os.replace = replace
save_folder(out, Dataset.from_dict({"a": [2]}))
"""


@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 2])
def test_a_data_set_that_was_saved_before_survives_a_kill(stop: int, tmp_path: Path) -> None:
    """Also between the two renames, where neither stands in its place: the next call puts it back, if it fails too."""
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "saved"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", SAVES, str(out), str(stop)], env=env, capture_output=True)
    assert killed.returncode == 9 and out.exists() == (stop == 1), killed.stderr

    class Full:
        def save_to_disk(self, path: str) -> None:
            Path(path).mkdir()
            raise OSError(errno.ENOSPC, "no space", path)

    with pytest.raises(CropiError, match="cannot write .*saved: .*free some space"):
        save_folder(out, Full())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert datasets.load_from_disk(str(out))["a"][:] == [1]
    save_folder(out, datasets.Dataset.from_dict({"a": [3]}))
    assert datasets.load_from_disk(str(out))["a"][:] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_byte_order_mark_is_no_part_of_what_a_user_wrote(tmp_path: Path) -> None:
    """An id, a row and a template would begin with U+FEFF."""

    def marked(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
        return path

    rows = [{"id": "a", "q": "é"}, {"id": "b", "q": "\u2028"}]
    assert read_selection(marked("ids.txt", "a\nb\n")) == ["a", "b"]
    assert list(read_dataset(marked("d.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows)))) == rows
    assert list(read_dataset(marked("d.json", json.dumps(rows)))) == rows
    template = "<{{ messages[0].content }}>\n"
    assert template_text(str(marked("t.jinja", template))) == template
    assert read_config(marked("c.toml", "[sketch]\ndim = 64\n")) == {"dim": 64}
    assert read_config(marked("c.yaml", "dim: 64\n")) == {"dim": 64}


def test_a_home_folder_that_no_shell_has_replaced_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called ~ would be made in the present one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/homes/me")
    for work in (
        lambda path: write_atomic(path, b"x"), make_folder, lambda path: list(read(path)),
        SketchStore.open, Scores.open, read_config, lambda path: check_room(path, 1, "rows"),
        lambda path: check_outputs({"--out": str(path)}, {}),
        lambda path: Reward(f"{path}:f"),
    ):  # fmt: skip
        with pytest.raises(CropiError, match=r"~ is no folder here.*; give /homes/me/f/x\.py$"):
            work(Path("~/f/x.py"))
    assert not list(tmp_path.iterdir())
    # What is called so is a name like any other.
    write_atomic(Path("~x.json"), b"x")
    (tmp_path / "~").mkdir()
    write_atomic(Path("~/f/x.py"), b"x")
    assert (tmp_path / "~/f/x.py").read_bytes() == b"x"


def test_what_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for out, told in (
        ("folder", "--out: .*folder is a folder; give the path of a file"),
        ("file/x.parquet", "--out: .*file is a file; give a folder"),
        ("table", "--near: .*table is the file that --out writes; give another path"),
    ):
        with pytest.raises(CropiError, match=told):
            check_outputs({"--out": str(tmp_path / out), "--near": str(tmp_path / "table")}, {})
    check_outputs(
        {"--export": str(tmp_path / "folder"), "--out": str(tmp_path / "new" / "x"), "--plot": None}, {}
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CropiError, match="--out: nothing can be written to .*; give another folder"):
        check_outputs({"--out": str(tmp_path / "x")}, {})
