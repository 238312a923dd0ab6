"""The server's tokens a second with its requests over 16 adapters, against the same server and requests over one.

    python benchmarks/throughput.py

Both servers get the same number of requests, 64 at a time, and no adapter is exchanged meanwhile (`load.py` does that);
the client runs on the same cores.
"""

from __future__ import annotations

from collections.abc import Iterator

from load import run
from side_by_side import Figure, figure, main


def figures(quick: bool = False) -> Iterator[Figure]:
    requests, rounds = (40, 2) if quick else (400, 5)
    pace: dict[int, list[float]] = {1: [], 16: []}
    for _ in range(rounds):
        for adapters, found in pace.items():
            done = run(requests, adapters, pause=3600)
            assert not done["lost"] and not done["mixed"], done
            found.append(done["tokens a second"])
    yield figure(f"the server, {requests} requests", "over 16 adapters / over one", pace[16], pace[1], "≥ 0.8")


if __name__ == "__main__":
    main(figures, __doc__)
