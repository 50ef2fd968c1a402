"""Contracts of the house itself: who may import whom, what an import costs, what the compiled module is made of."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "cropi_kernels"
LAYER = ROOT / "python" / "cropi"
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
TEXT_SUFFIXES = SOURCE_SUFFIXES | {".md", ".toml", ".txt", ".cmake", ".yml", ".yaml", ".json", ""}
SKIPPED_FOLDERS = {"build", "dist", "__pycache__"}


def files(*suffixes: str) -> list[Path]:
    """Files of the repository with one of these suffixes, outputs and hidden folders left out (.ci is ours)."""
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [n for n in below if n not in SKIPPED_FOLDERS and (not n.startswith(".") or n == ".ci")]
        below[:] = [n for n in below if not (Path(folder, n) / "pyvenv.cfg").exists()]
        found += [Path(folder, name) for name in names if Path(name).suffix in suffixes]
    return sorted(found)


def test_tables_of_files_name_all_of_them() -> None:
    """Of a page's own folder, and of each folder that a heading above a table names."""
    tables = [path for path in files(".md") if "\n| file | what it" in path.read_text("utf-8")]
    assert len(tables) == 2
    for path in tables:
        named: dict[Path, set[str]] = {}
        for above, table in re.findall(
            r"(?s)(.*?)\n\| file \| what it(.*?\n)(?=\n|\Z)", path.read_text("utf-8")
        ):
            heading = re.findall(r"^### (\w+)$", above, re.M)
            rows = re.findall(r"^\| (`[^|]+) \|", table, re.M)
            names = {name.partition(".")[0] for row in rows for name in re.findall(r"`([^`]+)`", row)}
            named[path.parent / heading[-1] if heading else path.parent] = names
        there: dict[Path, set[str]] = {}
        for source in path.parent.rglob("*"):
            shown = source.stem != "__init__" and source.parent.name != "tests"
            if shown and source.suffix in SOURCE_SUFFIXES:
                there.setdefault(source.parent, set()).add(source.stem)
        assert named == there, path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, those inside functions included."""
    base = KERNELS.parent if KERNELS in path.parents else LAYER.parent
    package = path.relative_to(base).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (prefix, node.module or "") if part)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


# ------------------------------------------------------------------------------------------- dependencies
def test_kernel_package_imports_only_torch_triton_and_numpy() -> None:
    allowed = {"torch", "triton", "numpy", "cropi_kernels"} | sys.stdlib_module_names
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in KERNELS.rglob("*.py")
        for line, name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, wrong


@pytest.mark.long
def test_thin_layer_reaches_kernels_only_through_public_names() -> None:
    wrong = []
    for path in LAYER.rglob("*.py"):
        for line, name in imports(path):
            private = any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])
            kernel_file = re.match(r"cropi_kernels\.ops\.\w+\.(cpu|triton|cuda)\b", name)
            if name.startswith("cropi_kernels") and (private or kernel_file):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, wrong


def test_warnings_are_cut() -> None:
    """`cropi.errors.warn` is the way to warn: a value of a megabyte must not become a message of a megabyte."""
    # Their values are ours, or a class's.
    apart = {"errors.py", "_moved.py", "sklearn.py"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in LAYER.rglob("*.py")
        if "warnings.warn(" in path.read_text("utf-8") and str(path.relative_to(LAYER)) not in apart
    ]
    assert not wrong, wrong


# The packages of python/cropi from the top; __init__ is the door, and sklearn stands beside.
FLOORS = [
    {"cli", "curriculum", "trainers", "distributed", "report"},
    {"pipeline", "rollouts"},
    {"sketching", "ranking", "bench"},
    {"gradient", "store"},
    {"data"},
    {"model"},
    {"options"},
    {"grouping"},
    {"option_fields"},
    {"sealed", "commands"},
    {"form", "locks"},
    {"atomic"},
    {"bulk", "checked", "files", "summary", "agreement", "progress"},
    {"amounts", "errors", "temporary", "_moved"},
]


@pytest.mark.long
def test_packages_of_the_thin_layer_import_downwards() -> None:
    """No arrow up and no circle between the packages of cropi; inside a floor only the two that are named."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    beside = {("cli", "curriculum"), ("cli", "trainers"), ("cli", "report"), ("cli", "distributed")}
    beside |= {("curriculum", "trainers"), ("curriculum", "report"), ("gradient", "store")}
    wrong = []
    for path in LAYER.rglob("*.py"):
        here = path.relative_to(LAYER).parts[0].removesuffix(".py")
        if here not in floor:
            continue
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "cropi" or len(parts) < 2 or parts[1] == here:
                continue
            there = parts[1]
            down = there in floor and floor[there] > floor[here]
            if not down and (here, there) not in beside:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, wrong


# The folders of the sketcher from the top; what users call stands above them all.
SKETCHER = ["checks", "policy", "attach", "taps", "sums", "batch", "model"]


def test_folders_of_the_sketcher_import_downwards() -> None:
    root = KERNELS / "sketcher"
    assert sorted(SKETCHER) == sorted(path.parent.name for path in root.glob("*/__init__.py"))
    wrong = []
    for path in root.glob("*/*.py"):
        below = SKETCHER[SKETCHER.index(path.parent.name) :]
        for line, name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["cropi_kernels", "sketcher"] and not set(parts[2:3]) & set(below):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, wrong


def test_kernels_in_csrc_know_neither_python_nor_torch() -> None:
    foreign = re.compile(r"#include\s*[<\"](Python\.h|pybind11/|torch/|ATen/|c10/|omp\.h)")
    wrong = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files(".cpp", ".h", ".cu", ".cuh")
        if ROOT / "csrc" in path.parents and ROOT / "csrc" / "bindings" not in path.parents
        for match in foreign.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


def test_every_kernel_has_a_reference() -> None:
    """An op that is plain torch is its own reference; as soon as it has a kernel, it needs one to be held to."""
    kernels = [path for name in ("cpu", "triton", "cuda") for path in (KERNELS / "ops").glob(f"*/{name}.py")]
    assert kernels
    missing = sorted({path.parent.name for path in kernels if not path.with_name("reference.py").exists()})
    assert not missing, f"ops with a kernel and no reference.py: {missing}"


# --------------------------------------------------------------------------------------------- importing
WATCHER = """
import json, sys, threading, time
import numpy, torch                        # what the package may count on; their cost is not its own
seen, before, threads = [], set(sys.modules), threading.active_count()
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
    if event in ("subprocess.Popen", "os.system", "os.fork", "os.exec", "socket.connect", "compile") or writes:
        if event != "compile" or args[1] is not None and str(args[1]).endswith((".cu", ".cpp")):
            if not (writes and "__pycache__" in str(args[0])):
                seen.append(f"{event} {str(args[0])[:80]}")
sys.addaudithook(watch)
start = time.process_time()
import MODULE
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "seen": seen, "threads": threading.active_count() - threads,
                  "new": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
                  "sketcher": "cropi_kernels.sketcher" in sys.modules}))
"""


@pytest.mark.long
@pytest.mark.parametrize("module", ["cropi_kernels", "cropi"])
def test_importing_does_no_work(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHER.replace("MODULE", module)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["seen"], f"import {module} starts or writes something: {report['seen']}"
    assert report["threads"] == 0
    heavy = {"transformers", "triton", "pandas", "matplotlib", "pyarrow", "scipy"} & set(report["new"])
    assert not heavy, f"import {module} imports {heavy}"
    assert not report["sketcher"], "the sketcher takes three quarters of the time, and ops do without it"
    assert report["seconds"] < 1.5, (
        f"import {module} took {report['seconds']:.2f} s of CPU beyond torch and numpy"
    )


# --------------------------------------------------------------------------------------- compiled module
def compiled() -> Path:
    from cropi_kernels import _C  # a missing _C must fail here, not skip

    return Path(_C.__file__)


def objdump(*args: str) -> str:
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("objdump is not installed (Debian: binutils)")
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_compiled_module_needs_neither_torch_nor_openmp_nor_cuda() -> None:
    needed = set(re.findall(r"NEEDED\s+(\S+)", objdump("-p", str(compiled()))))
    system = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "libpthread.so", "ld-linux")
    foreign = sorted(name for name in needed if not name.startswith(system))
    assert needed and not foreign, f"_C is linked to {foreign}"


# ---------------------------------------------------------------------------------------------- packaging
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project() -> dict[str, object]:
    return pyproject()["project"]  # type: ignore[no-any-return]


def test_version_has_one_source() -> None:
    import cropi_kernels

    assert importlib.metadata.version("cropi-kernels") == cropi_kernels.__version__
    holders = [
        path
        for path in files(".py", ".toml")
        if re.search(r"(?m)^(__version__|version) = \"", path.read_text("utf-8"))
    ]
    assert holders == [KERNELS / "_version.py"]


def test_links_of_the_readme_lead_to_files_of_the_release_on_pypi() -> None:
    """What the build makes of README.md, by its own rules: PyPI resolves no relative link."""
    import cropi_kernels

    rules = pyproject()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    shown = original = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in rules["substitutions"]:
        shown = re.sub(rule["pattern"], rule["replacement"], shown)
    shown = shown.replace("$HFPR_VERSION", cropi_kernels.__version__)
    repository, tag = "cropi-kernels/cropi-kernels", f"v{cropi_kernels.__version__}"
    link = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]*)\)")
    expected = []
    for image, target in link.findall(original):
        host = f"raw.githubusercontent.com/{repository}" if image else f"github.com/{repository}/blob"
        outside = "://" in target
        assert outside or (ROOT / target.split("#")[0]).exists(), target
        expected.append((image, target if outside else f"https://{host}/{tag}/{target}"))
    assert link.findall(shown) == expected
    assert {"!", ""} == {image for image, _ in expected} and link.sub("", shown) == link.sub("", original)


def test_torch_and_numpy_are_the_only_hard_dependencies() -> None:
    names = {re.split(r"[\[<>=; ]", line)[0] for line in project()["dependencies"]}  # type: ignore[attr-defined]
    assert names == {"torch", "numpy"}


def requirements() -> list[tuple[str, str]]:
    """(name, bounds) of every package that pyproject.toml names, the package itself left out."""
    named: dict[str, list[str]] = {"": project()["dependencies"]} | project()["optional-dependencies"]  # type: ignore[dict-item, operator]
    lines = [line.split(";")[0].strip() for extra in named.values() for line in extra]
    split = [re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?(.*)", line) for line in lines]
    return [(m[1].lower(), m[2]) for m in split if m and m[1] != "cropi-kernels"]


def pins(name: str) -> dict[str, set[str]]:
    """Package to its versions, of a constraints file."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if "==" in line:
            package, version = line.split(";")[0].strip().split("==")
            found.setdefault(package, set()).add(version)
    return found


def test_every_named_package_is_pinned() -> None:
    missing = {name for name, _ in requirements()} - pins("constraints.txt").keys()
    assert not missing, f"no pin in constraints.txt: {missing}"


def test_what_a_missing_package_says_names_the_extra_that_brings_it() -> None:
    from cropi.errors import EXTRAS

    needed = {
        m for path in files(".py") for m in re.findall(r'\boptional\(\s*"(\w+)', path.read_text("utf-8"))
    }
    # The standard library's; what comes with its own installation, under the name it is imported by; and what no extra
    # brings alone: a table of rows needs no TRL.
    assert needed - EXTRAS.keys() == {"tomllib", "pandas", "tensordict", "vllm", "datasets"}
    distributions = {"yaml": "pyyaml", "math_verify": "math-verify", "sklearn": "scikit-learn"}
    brought = {"markupsafe": "jinja2", "huggingface_hub": "transformers"}
    extras: dict[str, list[str]] = project()["optional-dependencies"]  # type: ignore[assignment]
    for package, extra in EXTRAS.items():
        name = distributions.get(package, brought.get(package, package))
        assert any(re.match(rf"{name}\b", line) for line in extras[extra]), (package, extra)


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    """What `make test-lowest` installs is what pyproject.toml promises."""
    lowest = pins("constraints-lowest.txt")
    bounds = {name: m[1] for name, text in requirements() if (m := re.search(r">=([\d.]+)", text))}
    apart = {"ray", "triton", "mkdocs-material"}  # extras that `make test-lowest` does not install
    assert lowest.pop("huggingface-hub")  # what goes with the lowest transformers
    assert lowest.keys() == bounds.keys() - apart
    for name, (version,) in lowest.items():
        assert re.fullmatch(re.escape(bounds[name]) + r"(\.0)*", version), (name, version, bounds[name])


def test_tensors_do_not_depend_on_torchs_defaults() -> None:
    """``torch.set_default_device`` and ``set_default_dtype`` are the caller's: a new tensor names its device, and its
    dtype where torch would take the default one."""
    floats = {"empty", "zeros", "ones", "eye", "rand", "randn", "linspace"}
    calls = [
        (path, node, {keyword.arg for keyword in node.keywords})
        for path in files(".py")
        if {KERNELS, LAYER} & {*path.parents}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")
    ]
    made = floats | {"arange", "full", "randint", "randperm", "tensor"}
    wrong = []
    for path, node, given in calls:
        name = ast.unparse(node.func).removeprefix("torch.")
        numbers = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        of_floats = (
            name in floats or name in ("full", "tensor") and any(isinstance(n, float) for n in numbers)
        )
        wanted = {"device", "dtype"} if of_floats else {"device"} if name in made else set()
        if missing := wanted - given:
            wrong.append(
                f"{path.relative_to(ROOT)}:{node.lineno} {name} without {', '.join(sorted(missing))}"
            )
    assert len(calls) > 200 and not wrong, wrong


# -------------------------------------------------------------------------------------------------- text
def test_no_file_is_longer_than_500_lines() -> None:
    sources = files(*SOURCE_SUFFIXES)
    assert len(sources) > 20
    long = {
        str(path.relative_to(ROOT)): n
        for path in sources
        if (n := len(path.read_text("utf-8").splitlines())) > 500
    }
    assert not long, f"one idea a file; split {long}"


def test_no_comment_has_had_code_wrapped_around_it() -> None:
    """What the formatter makes of a comment that is too long for its line; it belongs above."""
    closing = r"^\s*[\])}]+[,:]?  # (?!fmt:|type:|noqa)"
    alone = r"= \(\n[^\n]*\S  # [^\n]*\n\s*\)$"  # one value in parentheses of its own
    wraps = re.compile(f"{closing}|{alone}", re.MULTILINE)
    wrapped = [str(path.relative_to(ROOT)) for path in files(".py") if wraps.search(path.read_text("utf-8"))]
    assert not wrapped, wrapped


def test_links_between_documents_lead_somewhere() -> None:
    documents = files(".md")
    assert ROOT / "README.md" in documents
    broken = []
    for path in documents:
        text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))  # kernel[grid](x) is no link
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not broken, broken


def test_files_that_prose_names_exist() -> None:
    """`docs/sketch.md` in a page, ``tests/kernels/vectors`` in a docstring: what moves must be renamed there too."""
    tops = "csrc|cropi_kernels|python|tests|benchmarks|docs|examples|scripts|tools"
    named = re.compile(rf"(?<![\w./-])((?:{tops})/[\w./-]*\w)(?![\w<*{{])")
    # They name what was there.
    history = {ROOT / "CHANGELOG.md", *(ROOT / "benchmarks" / "results").glob("gpu_*.md")}
    written_later = {"benchmarks/results/gpu.md"}
    wrong = []
    for path in [p for p in files(".md", ".py", ".cpp", ".h", ".cu", ".cuh") if p not in history]:
        if path.parent == ROOT / "tests" / "packaging":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            prose = path.suffix == ".md" or "``" in line or line.lstrip().startswith(("#", "//"))
            for name in named.findall(line) if prose else ():
                if (
                    name not in written_later
                    and not (ROOT / name).exists()
                    and not list(ROOT.glob(f"{name}.*"))
                ):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {name}")
    assert not wrong, wrong


def test_no_machine_path_in_any_file() -> None:
    """A path that only exists where a file was written breaks for everybody else."""
    machine = re.compile(r"(?<![\w.])/(?:root|home|work|farm|mnt|Users)/\w+")
    wrong = []
    for path in files(*TEXT_SUFFIXES):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := machine.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not wrong, wrong


def test_fuzz_tests_are_found_by_their_name() -> None:
    """`-k fuzz` runs all of them, every night."""
    wrong = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "fuzz" in path.name or path.parent == ROOT / "tests" / "packaging":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if "fuzz.run(" in ast.unparse(node) and "fuzz" not in getattr(node, "name", ""):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, f"{wrong}: put 'fuzz' into the name of the test or of its file"
