"""How `python -m adam_transforms` ends at C-c."""

import contextlib
import os
import signal
import sys
from typing import Any


def is_program(name: str) -> bool:
    """Whether Python is importing the package `name` for `python -m name`."""
    arguments = getattr(sys, "argv", [])
    return arguments[:1] == ["-m"] and sys.orig_argv[-len(arguments)].removeprefix("-m") == name


def end_quietly() -> None:
    """From now on C-c prints one line and ends the process with status 130.

    Python's own handler raises KeyboardInterrupt, which an import, a callback or the end of the
    interpreter may catch, replace or print. A signal that the parent process ignores stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: Any) -> None:
    with contextlib.suppress(OSError):  # a closed stream
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # shows the cursor, which progress bars hide
        os.write(2, b"adam_transforms: interrupted\n")
    os._exit(130)
