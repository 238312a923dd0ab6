"""`python -m minipeft.serve FOLDER`: serves a base model and every adapter in the folder over HTTP.

It listens on this machine alone, unless --host says otherwise, and then the variable MINIPEFT_TOKEN must hold a token
that clients give as their API key.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minipeft.serve", description=__doc__)
    parser.add_argument("folder", help="a folder that holds a folder for each adapter")
    parser.add_argument("--model", default="pocket", help="the base: pocket, a folder, or a name of the hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=32, help="texts that are written at once")
    parser.add_argument("--waiting", type=int, default=1000, help="texts that may wait for a row")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long one answer may take")
    options, token = parser.parse_args(arguments), os.environ.get("MINIPEFT_TOKEN")
    try:
        serve(options, token)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    return 0


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(options: argparse.Namespace, token: str | None) -> None:
    if not is_loopback(options.host) and not token:
        raise ValueError(f"{options.host} can be reached from elsewhere: put a token into MINIPEFT_TOKEN first.")
    try:
        import uvicorn

        from minipeft.serve.server import Limits, Service, application
    except ModuleNotFoundError as error:
        raise ValueError(f'the server needs {error.name}: pip install "minipeft[serve]".') from error
    from minipeft.serve.engine import Engine
    from minipeft.serve.folder import Folder
    from minipeft.serve.tenants import Bank
    from minipeft.world.base import load

    model, tokenizer = load(options.model)
    engine = Engine(Bank(model), options.rows, options.waiting)
    folder = Folder(engine, options.folder, reserved=options.model)
    folder.look(settled=False)
    service = Service(engine.start(), tokenizer, folder.watch(), options.model, Limits(seconds=options.seconds))
    try:
        uvicorn.run(application(service, token), host=options.host, port=options.port, log_level="warning")
    finally:
        folder.close()
        engine.close()


if __name__ == "__main__":
    sys.exit(main())
