"""What a typed error looks like in a notebook: one message, no traceback."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout

import pytest
from IPython.core.interactiveshell import InteractiveShell

from vblklab import errors
from vblklab.errors import GuestCommandFailed, GuestDied, GuestError, GuestTimeout, VblkError

CONSOLE = "\n".join(f"[    {n}.000000] line {n}" for n in range(25))
EACH: dict[str, VblkError] = {
    "BadAddress": errors.BadAddress(0x1000, 4096),
    "KvmError": errors.KvmError("KVM_RUN", 5, "Input/output error"),
    "KvmExit": errors.KvmExit("KVM_EXIT_SHUTDOWN", dict.fromkeys(("rip", "rsp", "rflags"), 0), b"\xf4"),
    "VirtioError": errors.VirtioError("a chain has a loop", "2.7.5"),
}
"""Those whose arguments are not what and remedy."""
TYPES = sorted(name for name in errors.__all__ if issubclass(getattr(errors, name), VblkError))


@pytest.fixture(scope="module")
def shell() -> Iterator[InteractiveShell]:
    made = InteractiveShell()
    made.history_manager.enabled = False
    yield made
    made.history_manager.end_session()


def shown(shell: InteractiveShell, error: BaseException) -> list[str]:
    """The lines below a cell that raises this error from some way down."""
    shell.user_ns["error"] = error
    with redirect_stdout(io.StringIO()) as out:
        shell.run_cell("def deep(n):\n    if n: deep(n - 1)\n    raise error\ndeep(5)", store_history=False)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("name", TYPES)
def test_a_typed_error_is_one_line(shell: InteractiveShell, name: str) -> None:
    error = EACH.get(name) or getattr(errors, name)("this thing", "do that")
    assert shown(shell, error) == [f"{name}: {error}"]


def test_an_error_of_another_kind_keeps_its_traceback(shell: InteractiveShell) -> None:
    assert "deep" in "\n".join(shown(shell, ZeroDivisionError("a slip")))


@pytest.mark.parametrize("kind", [GuestError, GuestDied, GuestTimeout, GuestCommandFailed])
def test_the_message_about_a_guest_does_not_drown_in_its_console(shell: InteractiveShell, kind: type[GuestError]) -> None:
    lines = shown(shell, kind("the guest did not boot within 120 s", "give a longer boot_timeout_s", CONSOLE))
    assert lines[0] == f"{kind.__name__}: the guest did not boot within 120 s: give a longer boot_timeout_s"
    assert lines[1] == "the last 4 of 25 lines (sys.last_value.output has all):"
    assert lines[2:] == CONSOLE.splitlines()[-4:]


def test_what_a_command_said_is_shown_whole_if_it_is_short(shell: InteractiveShell) -> None:
    assert shown(shell, GuestCommandFailed("guest command 'ls x' ended with status 1", "no x", "ls: x\n\nno x\n"))[1:] == ["ls: x", "no x"]


def test_the_whole_console_is_where_the_message_says(shell: InteractiveShell) -> None:
    shown(shell, GuestTimeout("the guest did not boot", "wait longer", CONSOLE))
    with redirect_stdout(io.StringIO()) as out:
        shell.run_cell("import sys\nprint(sys.last_value.output)", store_history=False)
    assert out.getvalue().rstrip() == CONSOLE
