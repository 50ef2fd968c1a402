"""What SECURITY.md and docs/store.md promise of all that is written, where no other test does."""

from __future__ import annotations

import ast
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.commands import cropi
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.places import PLACES, WRITTEN

import cropi as package
from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.sealed import check_sums, summed
from cropi.sketching import groups
from cropi.sketching.behind import Behind
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import GradientSketcher, SketchSpec

pytestmark = pytest.mark.long

# What is written beside stores and score tables, by the place that does it.
WITH_SUMS = {
    "export": ["x.npy"], "export parquet": ["x.parquet"], "convert": ["x.jsonl"], "rollout": ["out/r.jsonl"],
    "rollout log": ["merged.jsonl"], "select saved": ["saved"],
    "select exports": ["x.parquet", "x.jsonl", "x.json", "x.txt"],
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_SUMS)
def test_what_is_written_for_others_has_checksums_beside_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``sha256sum`` and ``cropi store verify`` find no fault, and then one changed byte of any of the files."""
    place, rng = (PLACES | WRITTEN)[name], random.Random(name)
    place.prepare(tmp_path)
    place.work(tmp_path)
    for out in (tmp_path / path for path in WITH_SUMS[name]):
        sums = out.with_name(f"{out.name}.sha256")
        named = [line[66:] for line in sums.read_text().splitlines()]
        assert any(one == out.name or one.startswith(f"{out.name}/") for one in named)
        if shutil.which("sha256sum"):
            done = subprocess.run(
                ["sha256sum", "-c", sums.name], cwd=out.parent, capture_output=True, text=True
            )
            assert done.returncode == 0 and done.stdout.count(": OK") == len(named), done.stderr
        assert cropi("store", "verify", out) == 0
        for one in named:
            file = out.parent / one
            whole = file.read_bytes()
            at = rng.randrange(len(whole))
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
            assert cropi("store", "verify", out) == 2
            if one == out.name:
                capsys.readouterr()
                assert cropi("info", out) == 2
                assert "is not the file that was written" in capsys.readouterr().err
            for reader in (read_dataset, lambda path: list(read(path))) if out.suffix in READ else ():
                with pytest.raises(CropiError, match="is not the file that was written: its SHA-256"):
                    reader(out)
            file.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["a\nb", "a\\n\nb", "a\\nb", "a\u2028b", "a\x85b", "a\x0bb", "\u00e9", "a\rb", "\\", "a  b"]
)
def test_checksums_of_a_file_with_an_odd_name(name: str, tmp_path: Path) -> None:
    """str.splitlines() breaks some of them."""
    out = tmp_path / name
    with summed(out):
        out.write_text("1")
    assert check_sums(out, whole=True) == check_sums(out) == 1
    if shutil.which("sha256sum") and "\r" not in name:
        subprocess.run(["sha256sum", "-c", f"{name}.sha256"], cwd=tmp_path, check=True, capture_output=True)
    out.write_text("2")
    with pytest.raises(CropiError, match="is not the file that was written"):
        check_sums(out)


READ = (".jsonl", ".parquet", "")  # endings of files that cropi itself reads


@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
@pytest.mark.parametrize(("seconds", "written"), [(-1.0, True), (60.0, False)])
def test_rows_are_written_after_a_minute(
    seconds: float, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are fewer than the sketches that are written together."""
    assert groups.FLUSH_SECONDS == 60.0 and SketchJob((), "").shard_rows == 64
    monkeypatch.setattr(groups, "FLUSH_SECONDS", seconds)
    compute, found = GradientSketcher.policy_gradient, list[int]()

    def counting(*args: Any, **options: Any) -> Any:
        found.append(sum(row.status == "ok" for row in SketchStore.open(tmp_path / "s").rows()))
        return compute(*args, **options)

    flush = Behind.flush

    def flushed(self: Behind) -> None:  # at once, where the next pass would go on meanwhile
        flush(self)
        self.wait()

    monkeypatch.setattr(Behind, "flush", flushed)
    monkeypatch.setattr(GradientSketcher, "policy_gradient", counting)
    job = SketchJob(
        [write_lines(tmp_path / "t.jsonl", make_records(12))], tmp_path / "s", SketchSpec(dim=512),
        tokens_per_batch=60, verify=False, behaviour_check="off",
    )  # fmt: skip
    sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    # At each pass, what is on the disk of the passes before.
    assert len(found) > 2 and found == sorted(found) and (found[1] > 0) == (found[-1] > found[1]) == written


def test_every_loader_is_told_whether_to_run_a_models_code() -> None:
    """``trust_remote_code`` goes to each, by name or among options."""
    calls, silent = 0, []
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loader = ast.unparse(node.func)
                if node.func.attr not in ("from_pretrained", "from_config") or loader.startswith("peft."):
                    continue  # an adapter is weights and options alone
                calls += 1
                if not {keyword.arg for keyword in node.keywords} & {"trust_remote_code", None}:
                    silent.append(f"{path.name}:{node.lineno} {loader}")
    assert calls > 3 and not silent, silent
