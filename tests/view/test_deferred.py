"""The first picture does not wait for a module that no picture needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vblklab.view.deferred import deferred


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "slow_to_import.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_to_import", raising=False)
    return "slow_to_import"


def test_the_module_is_imported_at_the_first_call(module: str) -> None:
    with deferred(module, "twice"):
        from slow_to_import import twice  # type: ignore[import-not-found]
    assert module not in sys.modules
    assert twice(4) == 8
    assert sys.modules[module].twice(4) == 8


def test_a_module_that_is_loaded_stays(module: str) -> None:
    import slow_to_import  # type: ignore[import-not-found]

    with deferred(module, "twice"):
        assert sys.modules[module] is slow_to_import
    assert sys.modules[module] is slow_to_import


def test_a_figure_needs_no_grammar_of_addresses() -> None:
    code = "import sys, vblklab as vb; vb.path_map(); sys.exit('lark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_addresses_are_checked_as_before() -> None:
    pytest.importorskip("rfc3987_syntax")
    code = (
        "import vblklab as vb; vb.path_map()\n"
        "from jsonschema import Draft202012Validator as V, FormatChecker\n"
        "check = FormatChecker().check\n"
        "check('http://example.org/', 'iri')\n"
        "try:\n    check('no address', 'iri')\nexcept Exception as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "FormatError\n"
