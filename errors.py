"""User errors: one clear line on stderr and exit status 2, never a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message is one line that names the value and what is accepted."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line `main`; a UserError or Ctrl-C ends it without a traceback (status 2 and 130)."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
