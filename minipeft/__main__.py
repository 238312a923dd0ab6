"""The command line: `python -m minipeft doctor`."""

import argparse
import sys

from minipeft import doctor


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m minipeft")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has, and what will be slow or missing")
    parser.parse_args(arguments)
    rows = doctor.examine()
    print(doctor.report(rows))
    return doctor.exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
