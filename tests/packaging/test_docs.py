"""The documentation: every code block runs, links lead somewhere, the index has every page, the site is complete."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cropi.store.store import SketchStore

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# What cannot run here, and where it does.
ELSEWHERE = {
    ("scaling.md", 0): "needs ranks: tests/sketcher/test_sharded.py",
    ("scaling.md", 1): "needs ranks: tests/sketcher/test_tensor_parallel.py",
    ("trl.md", 0): "tests/packaging/test_readme.py",
    ("project.md", 1): "goes on with the page's first block: tests/packaging/test_readme.py",
    ("trl.md", 1): "tests/trainers/test_trl_recording.py",
    ("rollout.md", 0): "needs a model that talks: tests/cropi/test_rollout.py",
    ("trainers.md", 1): "needs OpenRLHF: tests/trainers/test_other_trainers.py",
    ("trainers.md", 2): "needs SkyRL: tests/trainers/test_other_trainers.py",
    ("live.md", 0): "needs a trainer: tests/sketcher/test_live.py",
}


def blocks(path: Path) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", path.read_text(encoding="utf-8"))


ALL = [(path.name, i) for path in PAGES for i in range(len(blocks(path)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and stores that the pages name."""
    import pyarrow
    import pyarrow.parquet
    from support.made_data import make_model, make_records, make_tokenizer, write_lines

    import cropi

    path = tmp_path_factory.mktemp("docs")
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for number, name in enumerate(("train", "math", "code", "more")):
        records = [record | {"id": f"{name}-{record['id']}"} for record in make_records(12, seed=number)]
        write_lines(path / f"{name}.jsonl", records)
    shutil.copy(path / "train.jsonl", path / "rollouts.jsonl")
    flat = [
        {"question": record["prompt"], "output": response, "score": reward}
        for record in make_records(6)
        for response, reward in zip(record["responses"], record["rewards"])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), path / "rollouts.parquet")
    for name in ("train", "more"):
        out = path / "sketches" / name
        cropi.sketch(model, path / f"{name}.jsonl", tokenizer, out=out, progress=False)
    return path


@pytest.fixture
def names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take as given: a model, records and tensors; files and stores in the working directory."""
    import datasets
    from support.made_data import make_model, make_records, make_tokenizer

    import cropi

    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    model, tokenizer = make_model(), make_tokenizer()
    rows = torch.tensor([[5, 8, 13, 21, 2], [5, 8, 13, 34, 2], [7, 9, 11, 4, 2], [7, 9, 11, 6, 2]])
    labels = rows.clone()
    labels[:, :3] = -100
    train, valid = (SketchStore.open(f"sketches/{name}") for name in ("train", "more"))
    table = datasets.Dataset.from_list([{"id": name, "question": name} for name in sorted(train_ids(train))])
    pushed: list[str] = []
    monkeypatch.setattr(
        "cropi.ranking.saving.push_to_hub", lambda chosen, name, *rest, **more: pushed.append(name)
    )
    yield {
        "cropi": cropi, "model": model, "tokenizer": tokenizer, "scores": cropi.influence(train, valid),
        "train": "train.jsonl", "valid": make_records(12, seed=3), "train_dataset": table,
        "dataset": table.remove_columns("id"), "input_ids": rows, "rows": rows, "labels": labels,
        "attention_mask": torch.ones_like(rows), "completion_mask": labels != -100,
        "prompt_of_row": torch.tensor([0, 0, 1, 1]), "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0]),
        "old_per_token_logps": torch.full((4, 2), -3.0), "pool": (rows, torch.ones_like(rows), labels),
        "held_out": (rows[:2], torch.ones_like(rows[:2]), labels[:2]),
    }  # fmt: skip
    assert set(pushed) <= {"me/chosen"}


def train_ids(store: SketchStore) -> list[str]:
    return [row.id for row in store.rows()]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "number"), ALL, ids=lambda value: str(value))
def test_code_blocks_run(page: str, number: int, names: dict[str, Any]) -> None:
    if (page, number) in ELSEWHERE:
        pytest.skip(f"runs in {ELSEWHERE[page, number]}")
    code = blocks(ROOT / "docs" / page)[number]
    if ", faiss" in code:  # it takes the exports of both sides
        pytest.importorskip("faiss")
        from cropi.store import export

        for store, name in (("sketches/train", "train"), ("sketches/more", "valid")):
            export(SketchStore.open(store), f"{name}.npy", normalise=True)
    exec(compile(code.replace("Qwen/Qwen2.5-0.5B-Instruct", "model"), f"docs/{page}", "exec"), names)


def test_what_runs_elsewhere_is_there() -> None:
    assert set(ELSEWHERE) <= set(ALL)
    for where in ELSEWHERE.values():
        file = where.rpartition(" ")[2]
        assert (ROOT / file).is_file(), file


def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_leads_to_a_page_or_a_file() -> None:
    pages = site()
    places = pages.pages()
    anchors = {name: headings(path, pages.FENCE) for path, name in places.items()}
    for path in places:
        text = pages.rewritten(path.read_text(encoding="utf-8"), path, places)
        for target, anchor in re.findall(r"\]\(([a-z_]+\.md)?#([^)\s]+)\)", pages.FENCE.sub("", text)):
            assert anchor in anchors[target or places[path]], f"{path.name}: {target}#{anchor}"


def test_lists_and_tables_are_read_alike_on_the_site() -> None:
    """The site's Markdown takes what is in a list item for its own only from four spaces on, and a table to go on until
    an empty line; GitHub's takes both ways."""
    pages, item = site(), r"(?:[-*+]|1\.) "
    for path in pages.pages():
        text = pages.FENCE.sub("", path.read_text(encoding="utf-8"))
        wrong = re.findall(
            rf"(?m)^ {{1,3}}(?:{item}|\|).*|^ *\|.*\n(?! *\|)(?=.*\S).*|^[^\s|].*\n *\|.*", text
        )
        assert not wrong, f"{path.name}: indent by four spaces, and leave lines empty around tables: {wrong}"


def headings(path: Path, fence: re.Pattern[str]) -> set[str]:
    """The anchors of a page."""
    found = re.findall(r"(?m)^#+ (.*)$", fence.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in found}


def test_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in PAGES} - {"README.md"} == linked


def test_sections_of_the_site_are_those_of_the_index() -> None:
    nav = site().navigation(site().pages())
    held = json.dumps(nav)
    for place in site().pages().values():
        assert f'"{place}"' in held, f"{place} is not in the site's navigation"


def test_workflows_call_what_exists() -> None:
    yaml = pytest.importorskip("yaml")
    rules = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    commands = []
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        called = [job["uses"] for job in jobs if "uses" in job]
        assert all((ROOT / other).is_file() for other in called), called
        steps = [step for job in jobs for step in job.get("steps", [])]
        commands += [step["run"] for step in steps if "run" in step]
    assert len(commands) > 10
    for command in commands:
        words = command.split()
        assert words[0] == "make" and words[1] in rules, command


def test_citation_and_changelog_name_the_version() -> None:
    yaml = pytest.importorskip("yaml")
    import cropi_kernels

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == cropi_kernels.__version__
    assert f"## {cropi_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
