"""A process that draws does not build what only jsonschema's IRI check needs, and everything else is as it was."""

from __future__ import annotations

import subprocess
import sys

_LOADS = """
import sys
from vblklab import view
assert "plotly" in sys.modules and "rfc3987_syntax" not in sys.modules
import jsonschema, nbformat
from jsonschema import FormatChecker
jsonschema.validate({"at": "2026-01-01"}, {"properties": {"at": {"format": "date"}}}, format_checker=FormatChecker())
view.path_map().to_json()
view.FigureWidget
"""


def test_drawing_loads_without_the_grammar() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_can_be_imported_afterwards() -> None:
    code = "from vblklab import view\nimport importlib.util, sys\nassert sys.modules.get('rfc3987_syntax', 0) is not None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
