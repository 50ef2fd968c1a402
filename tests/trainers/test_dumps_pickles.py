"""Dumps that are pickles: no code of theirs is run, and what they hold is read for certain."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_dumps import ROLLOUTS, made, words, write

from cropi.cli import main
from cropi.errors import CropiError
from cropi.trainers.dumps.auto import read_rollouts
from cropi.trainers.dumps.pickled import load_dump
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.unpickle import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


class Evil:
    """Loading it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def pickled(path: Path, value: Any) -> Path:
    if path.suffix == ".pt":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    return path


@pytest.mark.parametrize(("source", "name"), [("slime", "7.pt"), ("verl", "tq.pt"), ("verl", "gen_batch.dp")])
def test_no_code_of_a_dump_is_run(
    source: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "was_run"
    path = pickled(tmp_path / name, {"rollout_id": 0, "samples": [Evil(target)], "keys": [Evil(target)]})
    convert = ["convert", str(path), "--source", source, "--out", str(tmp_path / "o.jsonl")]
    for more in ((), ("--skip-bad",)):
        assert main([*convert, *more]) == 2
        error = capsys.readouterr().err
        assert str(path) in error and "it calls posix.mkdir" in error and "pass --allow-pickle" in error
        assert not target.exists()
    if name == "7.pt":  # the others need verl's packages for it
        assert main([*convert, "--allow-pickle"]) == 2
        assert target.exists() and "--allow-pickle: code that" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "form"), [("slime", "zip"), ("slime", "legacy"), ("vllm", "pickle")])
def test_a_trusted_pickle_is_read_as_it_is_without_trust(source: str, form: str, tmp_path: Path) -> None:
    """Whichever way it was written."""
    held, written = made(source), []
    for number, (name, more) in enumerate(((form, ["--allow-pickle"]), ("pickle", []))):
        path, out = tmp_path / str(number) / "7.pt", tmp_path / f"{number}.jsonl"
        path.parent.mkdir()
        if name == "pickle":
            path.write_bytes(pickle.dumps(held))
        else:
            torch.save(held, path, _use_new_zipfile_serialization=name == "zip")
        convert = ["convert", str(path), "--source", source, "--temperature", "0.7", "--out", str(out), *more]
        assert main(convert) == 0
        written.append(out.read_text())
    assert written[0] == written[1] and len(written[0]) > 100


CALLS = {
    "os.system": b"cos\nsystem\n(S'true'\ntR.",
    "builtins.eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(S'1'\nS'x'\ntR.",
    "torch.load": b"ctorch\nload\n(S'x'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
    "torch.hub.load": b"ctorch.hub\nload\n(S'x'\ntR.",
    "operator.attrgetter": b"coperator\nattrgetter\n(S'x'\ntR.",
    "collections.Counter": b"ccollections\nCounter\n(tR.",
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_named_in_the_list_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.dp"
    path.write_bytes(CALLS[name])
    with pytest.raises(CropiError, match=f"it calls {name}, which a dump has no need of"):
        load_dump(path, "a dump")


# Each would take memory or change the reader; a value or an error in words, at once.
BOMBS = {
    "bytes of a number": b"cbuiltins\nbytes\n(I99999999999\ntR.",
    "bytearray of a number": b"cbuiltins\nbytearray\n(I99999999999\ntR.",
    "a tensor of a number": b"ctorch\nTensor\n(I99999999999\ntR.",
    "an array of a shape": b"cnumpy\nndarray\n((I99999\nI99999\nttR.",
    "attributes of a function": b"c_codecs\nencode\n(N}S'x'\nI1\nstb.",
    "attributes of a type": b"cbuiltins\ndict\n(N}S'x'\nI1\nstb.",
    "a storage without a file": b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI5\ntQ.",
    "a stack without an end": b"(((((",
    "a long of a gigabyte": b"\x80\x02\x8b\xff\xff\xff\x3f.",
    "many digits": b"I" + b"9" * 5000 + b"\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_take_memory_or_change_the_reader(name: str, tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "x.dp"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        load_dump(path, "a dump")
    except CropiError as error:
        assert len(str(error)) < 2000 and str(path) in str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    assert load_dump(pickled(tmp_path / "y.dp", {"a": b"\xff" * 3}), "a dump") == {"a": b"\xff" * 3}


def test_files_that_are_larger_than_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "7.pt", made("slime"))
    assert main([*words("slime", path, tmp_path / "o.jsonl"), "--max-gib", "1e-6"]) == 2
    assert "pass a larger --max-gib" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02N." + b"\0" * 50_000_000)
    with pytest.raises(CropiError, match="more than 1000000 bytes unpacked"):
        load_dump(tmp_path / "bomb.pt", "a dump", largest=1_000_000)


def forged(path: Path, tensor: torch.Tensor, size: int) -> Path:
    """A file whose storage is said to hold ``size`` numbers."""
    torch.save({"t": tensor}, tmp := path.with_suffix(".orig"))
    with zipfile.ZipFile(tmp) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"K" + bytes([tensor.numel()]) + b"tq", b"K" + bytes([size]) + b"tq", 1)
            new.writestr(name, data)
    return path


def test_tensors_that_reach_beyond_their_storage(tmp_path: Path) -> None:
    tensor = torch.arange(3)
    assert load_dump(forged(tmp_path / "a.pt", tensor, 3), "a dump")["t"].tolist() == [0, 1, 2]
    with pytest.raises(CropiError, match="a storage has 24 bytes where 9 numbers are said to be"):
        load_dump(forged(tmp_path / "b.pt", tensor, 9), "a dump")
    torch.save(torch.zeros(1).expand(1000, 1000), tmp_path / "c.pt")
    with pytest.raises(CropiError, match="a tensor of 1000000 numbers on a storage of 1"):
        load_dump(tmp_path / "c.pt", "a dump")


# ------------------------------------------------------------------------------------- what is read for certain
VALUES: dict[str, Any] = {
    "containers": {"a": [1, (2.5, None)], "b": {3}, "c": frozenset([4]), "d": b"x", "e": True, "f": 1j},
    "numbers of NumPy": [np.float32(1.5), np.int64(7), np.bool_(True), np.float64(-2)],
    "arrays": {"a": np.arange(6).reshape(2, 3), "b": np.array([{"x": 1}, None], dtype=object)},
    "text": np.array(["ab", "c"]),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3).astype(">i4"),
    "no array": np.array(3.5),
    "empty": np.zeros((0, 4), dtype=np.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("ending", ["pt", "dp"])
def test_plain_data_is_read_as_it_was_written(name: str, ending: str, tmp_path: Path) -> None:
    found = load_dump(pickled(tmp_path / f"x.{ending}", VALUES[name]), "a dump")
    np.testing.assert_equal(found, VALUES[name])
    assert type(found) is type(VALUES[name]) or isinstance(found, np.ndarray)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_pickle(protocol: int, tmp_path: Path) -> None:
    value = [np.arange(4), np.float32(0.5), b"\x00\xff", {"a": (1, "é")}, 2**70]
    (tmp_path / "x.dp").write_bytes(pickle.dumps(value, protocol=protocol))
    np.testing.assert_equal(load_dump(tmp_path / "x.dp", "a dump"), value)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_of_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([[0, 1, 3], [1, 0, 2]]).to(dtype)
    saved = {"a": values, "view": values.t(), "part": values[:, 1:], "one": values[0, 0], "none": values[:0]}
    torch.save(saved, tmp_path / "x.pt")
    found = load_dump(tmp_path / "x.pt", "a dump")
    for key, tensor in saved.items():
        assert found[key].dtype == dtype and torch.equal(found[key], tensor), key


def test_ragged_tensors_are_read_row_by_row(tmp_path: Path) -> None:
    rows = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])]
    for layout in (torch.jagged, torch.strided):
        torch.save(torch.nested.nested_tensor(rows, layout=layout), tmp_path / "x.pt")
        assert [row.tolist() for row in load_dump(tmp_path / "x.pt", "a dump").rows] == [
            [1, 2],
            [3],
            [4, 5, 6],
        ]


def test_objects_of_slimes_own_class_are_read_without_it(tmp_path: Path) -> None:
    """slime has dumped dictionaries only; an older or a changed one may dump its samples as they are."""
    import sys
    import types
    from enum import Enum

    module = types.ModuleType("slime")

    class Status(Enum):
        COMPLETED = "completed"
        ABORTED = "aborted"

    class Sample:
        pass

    for part in (Status, Sample):
        part.__module__, part.__qualname__ = "slime", part.__name__
        setattr(module, part.__name__, part)
    samples = []
    for fields in made("slime")["samples"]:
        sample = Sample()
        vars(sample).update(
            fields, status=Status(fields["status"]) if fields["status"] == "completed" else Status.ABORTED
        )
        samples.append(sample)
    sys.modules["slime"] = module
    try:
        torch.save({"rollout_id": 7, "samples": samples}, tmp_path / "7.pt")
    finally:
        del sys.modules["slime"]
    found = list(read_rollouts(tmp_path / "7.pt", "slime", Reading(id_key="id")))
    # The truncated one was made an aborted one here.
    assert [rollout.id for rollout in found] == ["m0", "m0", "m1"]
    assert found[0].response_ids == ROLLOUTS[0][1]
