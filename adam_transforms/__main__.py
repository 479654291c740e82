"""The demonstration: `python -m adam_transforms`, described by its `--help`."""

import sys
from collections.abc import Sequence

from adam_transforms._demo import DemoError
from adam_transforms._demo.options import parse_options


def main(arguments: Sequence[str] | None = None, *, max_files: int | None = None) -> int:
    """Runs the demonstration and returns its exit status.

    Args:
      arguments: the arguments; None for those of the command line.
      max_files: see `compare`.

    Raises:
      SystemExit: with status 2 for a bad argument, 0 after `--help`.
    """
    options = parse_options(arguments)
    try:
        try:  # a late import: it is slow, and needs the packages of the "demo" extra
            from adam_transforms._demo.comparison import compare
        except ImportError as error:
            return _fail(f"error: {error}; needs pip install 'adam_transforms[demo]'", 1)
        compare(options, max_files=max_files)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except DemoError as error:
        return _fail(f"error: {error}", 1)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"adam_transforms: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
