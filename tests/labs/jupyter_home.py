"""A Jupyter that reads and writes nothing of the user's: every folder of its own, inside a temporary one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["LABS", "copy_labs", "jupyter_env"]

LABS = Path(__file__).resolve().parents[2] / "labs"
COMPILED = LABS.parent / ".cache" / "compiled"

_FOLDERS = {
    "HOME": "home",
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "TMPDIR": "tmp",
}
_INHERITED = ("LANG", "LC_ALL", "PATH", "VBLKLAB_CI")


def jupyter_env(home: Path) -> dict[str, str]:
    """The environment of a server or kernel that lives in ``home``. Nothing else of the caller's environment is passed on."""
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    for name, folder in _FOLDERS.items():
        (home / folder).mkdir(parents=True, exist_ok=True)
        env[name] = str(home / folder)
    env["NUMBA_CACHE_DIR"] = str(COMPILED)  # compiling takes seconds, and is not what a lab shows
    return env


def copy_labs(target: Path) -> Path:
    """The notebooks and what lies beside them, without earlier figures, as a learner's own copy."""
    return Path(shutil.copytree(LABS, target, ignore=shutil.ignore_patterns("figures", ".ipynb_checkpoints", "__pycache__")))
