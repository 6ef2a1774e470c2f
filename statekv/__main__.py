"""The `statekv` command, also as `python -m statekv`."""

import signal
import sys


def main() -> None:
    """Run the command line. Its import takes long enough to be interrupted: that is a word and no traceback either."""
    try:
        from statekv import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("statekv: interrupted\n")
        raise SystemExit(130) from None
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own leaving takes a moment too


if __name__ == "__main__":
    main()
