"""The project as a whole: lint, types, notebooks, tracked files, the lock and what an installation carries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "labs").glob("*.ipynb"))
MAX_FILE_BYTES = 1_500_000

# Written in pieces, so that this file does not hold what it looks for.
HOSTS = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "deb." + "debian", "anaconda" + ".org", "crates" + ".io")
MACHINE_PATH = re.compile(r"(?<![\w.~})])/(?:(?:work|root|farm)/|home/\w)")

CONDA_NAMES = {"kaleido": "python-kaleido"}


def tool(*arguments: str, cwd: Path = ROOT) -> str:
    """Run a tool of this Python; what it said if it failed, else nothing."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()


@cache
def project_files() -> list[Path]:
    """Every file that is tracked or would be: new files count before they are added."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted({path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()})


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- lint and types ---


def test_ruff_finds_nothing() -> None:
    assert not (found := tool("-m", "ruff", "check", "--no-cache", ".")), found


def test_code_is_laid_out_by_ruff() -> None:
    assert not (found := tool("-m", "ruff", "format", "--no-cache", "--check", ".")), f"{found}\nmake format"


def test_types_hold() -> None:
    assert not (found := tool("-m", "mypy")), found


# --- the package as it is installed and imported ---


def test_import_stays_light() -> None:
    """``import vblklab`` must be quick in every cell, CLI call and worker process: what draws comes when it draws."""
    heavy = {"plotly", "ipywidgets", "anywidget", "kaleido", "IPython", "jupyterlab", "pandas", "tqdm"}
    code = f"import sys, vblklab; sys.exit(', '.join(sorted({heavy!r} & sys.modules.keys())))"
    assert not (loaded := tool("-c", code)), f"import vblklab also loads {loaded}"


def test_wheel_carries_data_and_jupyter_settings(tmp_path: Path) -> None:
    assert not (failed := tool("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))), failed
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    version = project()["project"]["version"]
    data = {f"vblklab/_data/{path.relative_to(ROOT / 'data').as_posix()}" for path in project_files() if path.is_relative_to(ROOT / "data")}
    settings = {
        f"vblklab-{version}.data/data/{path.relative_to(ROOT).as_posix()}"
        for path in project_files()
        if path.is_relative_to(ROOT / "etc" / "jupyter")
    }
    assert data
    assert len(settings) == 2
    assert data | settings <= names


def test_jupyter_is_told_to_ask_for_no_news() -> None:
    settings = ROOT / "etc" / "jupyter"
    lab = json.loads((settings / "jupyter_lab_config.json").read_text())["LabApp"]
    overrides = json.loads((settings / "labconfig" / "default_setting_overrides.json").read_text())
    assert lab == {"news_url": None, "check_for_updates_class": "jupyterlab.NeverCheckForUpdate"}
    assert overrides["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false", "checkForUpdates": False}


# --- one set of requirements, said three times ---


def requirements(*groups: str) -> dict[str, Requirement]:
    texts = list(project()["project"]["dependencies"])
    for group in groups:
        texts += project()["dependency-groups"][group]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, texts)}


def test_lock_has_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    entries = [entry for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if entry and not entry.startswith("#")]
    loose = [entry.split()[0] for entry in entries if not re.match(r"[\w.-]+==\S+", entry) or "--hash=sha256:" not in entry]
    assert len(entries) > 50
    assert not loose


def test_lock_is_in_step_with_pyproject() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE):
        pins.setdefault(canonicalize_name(name), []).append(version)
    for name, requirement in requirements("dev", "browser").items():
        assert pins.get(name), f"{name} is not in requirements.lock; make lock"
        assert all(map(requirement.specifier.contains, pins[name])), f"requirements.lock has {name} {pins[name]}; make lock"


def test_conda_environment_is_in_step_with_pyproject() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert dependencies.pop() == {"pip": ["-e ."]}
    conda = {requirement.name: requirement.specifier for requirement in map(Requirement, dependencies)}
    assert conda.pop("python") == Requirement("python" + project()["project"]["requires-python"]).specifier
    assert conda.pop("pip") == ""
    assert conda == {CONDA_NAMES.get(name, name): requirement.specifier for name, requirement in requirements().items()}


# --- notebooks ---


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path: Path) -> None:
    """No outputs, counts or widget state; named cells; stored as JupyterLab itself would store it."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert "version" not in notebook.metadata.get("language_info", {}), "the Python of the machine that saved it"
    ids = [cell.get("id") for cell in notebook.cells]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert not cell.get("outputs"), f"cell {cell.id} has outputs"
        assert cell.get("execution_count") is None, f"cell {cell.id} has a count"
        assert not cell.get("attachments"), f"cell {cell.id} has an attachment"
        assert "execution" not in cell.metadata, f"cell {cell.id} has times"
    assert text == nbformat.writes(notebook) + "\n", "not as JupyterLab stores it: nbformat.write() it once"


# --- every file ---


def text_of(path: Path) -> str | None:
    content = path.read_bytes()
    return None if b"\0" in content[:8192] else content.decode("utf-8")


def test_no_file_is_large() -> None:
    assert not [path for path in project_files() if path.stat().st_size > MAX_FILE_BYTES]


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in project_files()
        for number, line in enumerate((text_of(path) or "").splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_registry_host() -> None:
    assert not (found := lines_with(re.compile("|".join(map(re.escape, HOSTS))))), "\n".join(found)


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not (found := lines_with(MACHINE_PATH)), "\n".join(found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cd /wo" + "rk/main", True),
        ('"/ro' + 'ot/.cache"', True),
        ("/ho" + "me/ann/x", True),
        ("~/wo" + "rk/x", False),
        ("src/wo" + "rk/x", False),
    ],
)
def test_a_path_of_one_machine_is_recognised(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is found
