"""What a user names and the system does not let us read: an error in words that names the file, from Python too."""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import os
import pickle
import re
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from data.make_formats import HERE, records
from safetensors.torch import save_file
from support.made_data import make_model, make_tokenizer, save_policy
from support.made_dumps import KINDS, MORE, made, write

from cropi import atomic, files
from cropi.cli.config import read_config
from cropi.cli.contents import describe_file
from cropi.data.export import read_dataset
from cropi.data.prompt_ids import PromptIds
from cropi.data.readers import read
from cropi.data.scan import scan
from cropi.errors import CropiError
from cropi.gradient.template import template_text
from cropi.model.adapting import with_adapter
from cropi.model.load import load_generation_config, load_model, load_tokenizer
from cropi.model.moments import file_of, read_moments
from cropi.ranking.selection_files import read_selection
from cropi.sealed import read_sealed, summed
from cropi.store.parts import part_paths
from cropi.trainers.dumps.auto import opened as dumps
from cropi.trainers.dumps.auto import read_rollouts
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.folders import expanded
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.selected import Selected
from cropi.trainers.trl.checkpoints import newest_whole
from cropi.trainers.trl.rollout_log import log_files

DUMPS = KINDS | MORE


def whole(path: Path) -> None:
    scan(read(path))


def taken(path: Path) -> None:
    """Records by their places: only the second pass fails."""
    groups = read(path)
    ids = [group.id for group in groups]
    deque(read(path).take(ids[:1]), maxlen=0)


def dumped(kind: str) -> Callable[[Path], None]:
    return lambda path: deque(
        read_rollouts(path, kind.split()[0], Reading(temperature=0.7), Left()), maxlen=0
    )


def put(name: str, content: bytes | str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def copied(name: str) -> Callable[[Path], Path]:
    return put(name, (HERE / name).read_bytes())


LINES = "".join(json.dumps(row) + "\n" for row in records())
# By name: what makes the file, what reads it.
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    **{f"records.{end}": (copied(f"records.{end}"), whole) for end in ("jsonl", "jsonl.gz", "jsonl.zst")},
    "an array": (copied("array.json"), whole),
    "places": (copied("records.jsonl"), taken),
    **{f"dump of {kind}": (lambda folder, kind=kind: write(folder / DUMPS[kind][0], made(kind)), dumped(kind))
       for kind in DUMPS if not DUMPS[kind][0].endswith(".parquet")},
    "recognised": (lambda folder: write(folder / "7.pt", made("slime")), dumps),
    "a dataset": (put("d.jsonl", LINES), read_dataset),
    "a dataset, whole": (put("d.json", f"[{LINES.strip().replace(chr(10), ',')}]"), read_dataset),
    "a selection": (put("s.jsonl", '{"id": "a"}\n'), read_selection),
    "a config": (put("c.yaml", "dim: 64\n"), read_config),
    "a template": (put("t.jinja", "x"), lambda path: template_text(str(path))),
    "sealed": (put("s.json", "{}"), lambda path: read_sealed(path, {}, "")),
    "an optimizer's state": (put("o.pt", pickle.dumps({})), lambda path: read_moments(path, torch.nn.Linear(2, 2))),
    "info": (put("i.json", "[1, 2]"), describe_file),
}  # fmt: skip


# How a file fails: when it is opened, or at its first, second or third read.
FAULTS = {"denied": errno.EACCES, "gone": errno.ENOENT, "descriptors": errno.EMFILE, "0": 0, "1": 0, "2": 0}


class Failing(io.FileIO):
    """A file that fails."""

    path, fault, left = Path(), "", 0

    def __init__(self, file: Any) -> None:
        self.ours = Path(file) == Failing.path
        if self.ours and not Failing.fault.isdigit():
            number = FAULTS[Failing.fault]
            raise OSError(number, os.strerror(number), str(file))
        super().__init__(file)

    def readinto(self, buffer: Any) -> Any:
        self._fail()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._fail()
        return super().readall()

    def _fail(self) -> None:
        Failing.left -= self.ours
        if self.ours and Failing.left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class FailingInWords(files._Readable, Failing):
    """The same under `cropi.files.open_to_read`."""


def faulty(file: Any, mode: str = "r", *words: Any, right: Any = io.open, **named: Any) -> Any:
    """``open``, for which the file fails."""
    if not isinstance(file, (str, Path)) or Path(file) != Failing.path:
        return right(file, mode, *words, **named)
    raw = io.BufferedReader(Failing(file))
    return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_read_is_an_error_in_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reader = READERS[name]
    path, ends = make(tmp_path), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fault in FAULTS:
            with monkeypatch.context() as patched:
                Failing.path, Failing.fault, Failing.left = path, fault, int(fault) if fault.isdigit() else 0
                patched.setattr(builtins, "open", faulty)
                patched.setattr(io, "open", faulty)
                patched.setattr(files, "_Readable", FailingInWords)
                try:
                    reader(path)
                except CropiError as error:
                    assert str(path) in str(error) and "Errno" not in str(error), (fault, str(error))
                    ends.add(fault)
    assert ends >= {"denied", "gone", "descriptors", "0"}


def test_a_table_that_cannot_be_read_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow opens its files by itself."""
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records()), path)

    def denied(*words: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", denied)
    monkeypatch.setattr(pyarrow.parquet, "read_table", denied)
    for reader in (whole, read_dataset):
        with pytest.raises(CropiError, match="cannot read .*t.parquet: permission denied; give a path"):
            reader(path)


def test_a_full_folder_of_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cropi.data.spilled.pickle.dump", full)
    rows = [{"prompt": "p", "response": text, "reward": 1.0, "id": "a"} for text in ("x", "y")]
    with pytest.raises(
        CropiError, match=r"a temporary file in .* \(TMPDIR names another folder\): no space left"
    ):
        list(read(rows))


def write_sums(path: Path) -> None:
    with summed(path):
        pass


LISTINGS: dict[str, Callable[[Path], Any]] = {
    "entries": files.entries,
    "records": lambda path: expanded([path]),
    "a store's parts": part_paths,
    "rollout logs": lambda path: log_files(path, "train"),
    "checkpoints": lambda path: newest_whole(path, "state.json"),
    "an optimizer's state": file_of,
    "checksums": write_sums,
    "what is synced": atomic.sync_all,
}


@pytest.mark.parametrize("name", LISTINGS)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x").write_text("")

    def refuse(right: Any, path: Any) -> Any:
        if Path(path) == tmp_path / ("below" if name in ("checksums", "what is synced") else ""):
            raise OSError(number, os.strerror(number), str(path))
        return right(path)

    for call in ("listdir", "scandir"):
        monkeypatch.setattr(os, call, functools.partial(refuse, getattr(os, call)))
    with pytest.raises(CropiError, match=f"cannot read {tmp_path}.*: {os.strerror(number).lower()}; "):
        LISTINGS[name](tmp_path)


def test_entries_and_trees(tmp_path: Path) -> None:
    for name in ("b.x", "a.x", "a[1].y", "sub/.z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "sub" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sub" / "round").symlink_to(tmp_path)
    assert [path.name for path in files.entries(tmp_path)] == ["a.x", "a[1].y", "b.x", "sub"]
    assert files.entries(tmp_path, "*.x") == [tmp_path / "a.x", tmp_path / "b.x"]
    assert files.entries(tmp_path / "nowhere") == files.entries(tmp_path / "a.x") == []
    assert dict(files.tree(tmp_path)) == {
        tmp_path: [tmp_path / "a.x", tmp_path / "a[1].y", tmp_path / "b.x"],
        tmp_path / "sub": [tmp_path / "sub" / ".z"],
    }


def test_folders_are_listed_by_what_raises_in_words() -> None:
    """``Path.glob`` and ``os.walk`` leave out what they cannot list."""
    silent = re.compile(r"\.r?glob\(|\bos\.walk\(|\biglob\(")
    root = Path(files.__file__).parent
    found = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if silent.search(path.read_text("utf-8"))
    }
    assert found == {"files.py"}, found


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_one_that_is_not_whole(tmp_path: Path) -> None:
    for step, text in (3, "{}"), (10, "{}"), (12, "{"):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text(text)
    with pytest.warns(
        UserWarning, match=r"checkpoint-12 was not .* \(state.json is .*\): going on from .*-10$"
    ):
        assert newest_whole(tmp_path, "state.json") == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-14").write_text("a file")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "state.json").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-14 was not written to its end"):
        assert newest_whole(tmp_path, "state.json") == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "state.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_whole(tmp_path, "state.json") == tmp_path / "checkpoint-20"


def test_a_generation_config_that_cannot_be_read_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end tokens would be forgotten."""
    model = make_model()
    model.generation_config.eos_token_id = [1, 2]
    model.generation_config.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert load_generation_config(tmp_path, model.config).eos_token_id == [1, 2]
    Failing.path, Failing.fault, Failing.left = tmp_path / "generation_config.json", "descriptors", 0
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", faulty)
        patched.setattr(io, "open", faulty)
        with pytest.raises(
            CropiError, match=f"model '{tmp_path}': cannot read {Failing.path}: too many open files; raise"
        ):
            load_generation_config(tmp_path, model.config)
    Failing.path.unlink()
    assert load_generation_config(tmp_path, model.config).eos_token_id == model.config.eos_token_id


@pytest.mark.filterwarnings("error")
def test_every_file_of_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """transformers takes it for one that is not there, and goes on without a template or with other end tokens."""
    model, tokenizer, folder = make_model(), make_tokenizer(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    (folder / ".#config.json").symlink_to("of an editor")
    load_model(folder)
    for file in [path for path in files.entries(folder, "[!.]*") if path.name != "config.json"]:
        held = file.rename(tmp_path / "held")
        for target, said in (
            (file, "too many levels"),
            (tmp_path / "gone", "no such file"),
            (folder, "is a"),
        ):
            file.symlink_to(target)
            with pytest.raises(CropiError, match=f"model '{folder}': cannot read {file}: {said}.*; make it"):
                load_model(folder)
            file.unlink()
        held.rename(file)


def test_a_trainers_selection_that_cannot_be_looked_at_is_not_called_missing(tmp_path: Path) -> None:
    path = tmp_path / "selected.jsonl"
    path.symlink_to(path)
    with pytest.raises(CropiError, match=f"cannot read {path}: too many levels of symbolic links"):
        Selected(path, PromptIds([{"id": "a"}], "id", "d", "id_key"), trainer=("", ""))


def test_an_adapter_and_a_gguf_file_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text("{}")
    weights, packed = tmp_path / "adapter_model.safetensors", tmp_path / "x.gguf"
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(CropiError, match=f"adapter '{tmp_path}': cannot read {weights}: no such file"):
        with_adapter(make_model(), "m", tmp_path)
    packed.write_bytes(b"GGUF")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(CropiError) as told:
        Failing.path, Failing.fault, Failing.left = packed, "denied", 0
        patched.setattr(builtins, "open", faulty)
        load_model(packed)
    assert str(told.value).startswith(f"model '{packed}': cannot read {packed}: permission denied; make it")


@pytest.mark.long
def test_the_hubs_cache_without_the_right_to_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of a hub id and each folder above them, also those that transformers takes for missing ones."""
    from huggingface_hub import constants

    own = tmp_path / "models--me--tiny"
    snapshot = own / "snapshots" / "abc"
    make_model().save_pretrained(snapshot)
    make_tokenizer().save_pretrained(snapshot)
    (own / "refs").mkdir()
    put("main", "abc")(own / "refs")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model("me/tiny", progress=False)[1] is not None
    for file in sorted(snapshot.iterdir()):
        Failing.path, Failing.fault, Failing.left = file, "denied", 0
        with monkeypatch.context() as patched, pytest.raises(CropiError) as told:
            patched.setattr(builtins, "open", faulty)
            load_tokenizer("me/tiny")
        start = (
            f"model 'me/tiny' cannot be read: {file}: permission denied; give this user the right to read it"
        )
        assert str(told.value).startswith(start)
    for folder in (tmp_path, own, own / "refs", own / "snapshots", snapshot):
        with monkeypatch.context() as patched:
            patched.setattr(os, "access", lambda path, *words, folder=folder: path != folder)
            with pytest.raises(CropiError, match=f"me/tiny' cannot be read: {folder}: permission denied"):
                load_tokenizer("me/tiny")


def test_weights_without_the_right_to_be_read_are_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors says of what the hub's cache holds."""
    path = tmp_path / "x"
    path.write_text("")

    def refuse(path: Any, *words: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    failure = files.failure_of(FileNotFoundError(f"No such file or directory: {path}"))
    assert failure is not None and (failure.errno, failure.filename) == (errno.EACCES, str(path))


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("unable to open file <x> in read-only mode: Input/output error (5)", errno.EIO),
        ("unable to open file <x (28)> in read-only mode: Too many open files (24)", errno.EMFILE),
        ("I/O error: Input/output error (os error 5)", errno.EIO),
        ("No space left on device (os error 28)", errno.ENOSPC),
        ("a layer of another size (5)", None),
        ("Permission denied (13)", None),
    ],
)
def test_the_number_in_a_message_of_another_library(message: str, number: int | None) -> None:
    failure = files.failure_of(RuntimeError(message))
    assert (failure and failure.errno) == number


@pytest.mark.parametrize("number", [errno.EMFILE, 0], ids=["descriptors", "for a moment"])
def test_weights_that_cannot_be_opened_are_not_said_to_be_missing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors says."""
    save_policy(tmp_path)
    weights, right = tmp_path / "model.safetensors", os.open
    save_file({"w.exp_avg_sq": torch.ones(2)}, tmp_path / "optimizer.safetensors")

    def refuse(path: Any, *words: Any, **named: Any) -> int:
        if number and Path(path).suffix == weights.suffix:
            raise OSError(number, os.strerror(number), str(path))
        return right(path, *words, **named)

    def unopened(path: Any, *words: Any, **named: Any) -> Any:
        raise FileNotFoundError(f"No such file or directory: {path}")

    said = os.strerror(number or errno.EIO).lower()
    named = f"{weights}: " if number else ""
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        patched.setattr("transformers.modeling_utils.safe_open", unopened)
        patched.setattr("safetensors.torch.load_file", unopened)
        with pytest.raises(CropiError, match=f"model '{tmp_path}' cannot be read: {named}{said}; "):
            load_model(str(tmp_path))
        with pytest.raises(CropiError, match=f"cannot read {tmp_path}/optimizer.safetensors: {said}; "):
            read_moments(tmp_path / "optimizer.safetensors", make_model())
