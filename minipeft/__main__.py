"""The command line: `python -m minipeft doctor` and `python -m minipeft diff A B`."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m minipeft")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has, and what will be slow or missing")
    diff = commands.add_parser("diff", help="what changed between two checkpoints, tensor by tensor")
    diff.add_argument("a", help="a folder with an adapter or a model, or a safetensors file")
    diff.add_argument("b", help="another")
    options = parser.parse_args(arguments)
    return compare(options.a, options.b) if options.command == "diff" else examine()


def examine() -> int:
    from minipeft import doctor

    rows = doctor.examine()
    print(doctor.report(rows))
    return doctor.exit_status(rows)


def compare(a: str, b: str) -> int:
    """0 where nothing differs, 1 where something does, 2 where one of them cannot be read: as `diff` does."""
    from minipeft.serve.difference import difference, table

    try:
        changes = difference(a, b)
    except ValueError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    print(table(changes))
    return int(any(change.relative != 0 for change in changes.values()))


if __name__ == "__main__":
    sys.exit(main())
