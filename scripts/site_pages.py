"""Put the pages of the site together: docs/, the README files, and an API reference from docstrings.

    python scripts/site_pages.py build/pages

The pages link to one another as they stand in the repository. Here every file gets its place on the site, and links are
written anew: to a page's place, or for other files to the repository.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/cropi-kernels/cropi-kernels/blob/main"
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "cropi_kernels/sketcher/README.md": "sketcher.md",
    "tools/ptx_emulator/README.md": "ptx_emulator.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]*)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(?ms)^```.*?^```")


def pages() -> dict[Path, str]:
    """Every page in the repository, and its name on the site."""
    found = {
        path: "overview.md" if path.name == "README.md" else path.name
        for path in (ROOT / "docs").glob("*.md")
    }
    return found | {ROOT / name: place for name, place in OUTSIDE.items() if (ROOT / name).is_file()}


def rewritten(text: str, path: Path, places: dict[Path, str]) -> str:
    """A page's text with its links as they are on the site."""

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match[1], match[2], match[3] or "", match[4]
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = (path.parent / target).resolve()
        if file in places:
            return f"{before}{places[file]}{anchor}{after}"
        if file.is_relative_to(ROOT / "docs" / "img"):
            return f"{before}img/{file.relative_to(ROOT / 'docs' / 'img')}{after}"
        if not file.exists():
            raise SystemExit(f"{path.relative_to(ROOT)}: the link {target} leads nowhere")
        return f"{before}{REPOSITORY}/{file.relative_to(ROOT)}{after}"

    parts, end = [], 0
    for block in FENCE.finditer(text):  # code stays as it is
        parts += [LINK.sub(link, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(link, text[end:])])


def reference() -> dict[str, str]:
    """Pages of what is public, from its docstrings, each name from the module that defines it."""
    made = {}
    for package in ("cropi", "cropi_kernels"):
        module = importlib.import_module(package)
        own, lent = [], []
        for name in module.__all__:
            where = getattr(getattr(module, name), "__module__", None)
            if where and where.split(".")[0] == package:
                own.append(f"::: {where}.{name}")
            elif where:
                lent.append(f"- `{package}.{name}` is `{where.split('.')[0]}.{name}`.")
        made[f"reference_{package}.md"] = "\n\n".join([f"# {package}", "\n".join(lent), *own]) + "\n"
    return made


def navigation(places: dict[Path, str]) -> list[dict[str, object]]:
    """The site's sections: those of docs/README.md, in their order, with the pages that each links to.

    Raises:
        SystemExit: a page is in no section.
    """
    index = ROOT / "docs" / "README.md"
    sections: list[dict[str, object]] = [{"Home": "index.md"}, {"All pages": places[index]}]
    here: list[dict[str, str]] = []
    left = set(places.values()) - {"index.md", places[index]}
    for line in index.read_text(encoding="utf-8").splitlines():
        if line.endswith(":") and not line.startswith((" ", "#")):
            here = []
            sections.append({line.split(",")[0].rstrip(":"): here})
        for _, target, _, _ in LINK.findall(line):
            place = places.get((index.parent / target).resolve())
            if place in left:
                left.remove(place)
                here.append(place)  # type: ignore[arg-type]
    sections.append({"Reference": ["reference_cropi.md", "reference_cropi_kernels.md"]})
    sections.append(
        {"Project": sorted(left & {"security.md", "changelog.md", "examples.md", "contributing.md"})}
    )
    if left := left - {"security.md", "changelog.md", "examples.md", "contributing.md"}:
        raise SystemExit(f"docs/README.md has no link to {', '.join(sorted(left))}")
    return sections


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the pages of the site together.")
    parser.add_argument("out", type=Path, help="folder of the pages: removed first, if it is there")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    places = pages()
    for path, place in places.items():
        (out / place).write_text(rewritten(path.read_text(encoding="utf-8"), path, places), encoding="utf-8")
    for place, text in reference().items():
        (out / place).write_text(text, encoding="utf-8")
    # JSON is YAML; mkdocs.yml at the root says the rest.
    config = {"INHERIT": "../mkdocs.yml", "docs_dir": "pages", "site_dir": "site", "nav": navigation(places)}
    (out.parent / "mkdocs.yml").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if (ROOT / "docs" / "img").is_dir():
        shutil.copytree(ROOT / "docs" / "img", out / "img")


if __name__ == "__main__":
    main()
