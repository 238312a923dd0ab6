"""Federated LoRA under Flower: `Averaging` is a Flower strategy with the rules of `averaging.py`, and `simulate` is
`federate` in Flower's simulation engine, to the same numbers bit for bit.

Flower's pins clash with the course's, so it has an environment of its own, which `make test` builds as well:

    bash tools/setup.sh flower
    .venv-flower/bin/python -m pytest tests/test_flower.py

A deployment uses the same two parts: a `ClientApp` by `client_app` at every site, and `Averaging` in the `ServerApp`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before flwr is imported, which reports its use otherwise

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import Strategy  # noqa: E402
from flwr.serverapp.strategy.strategy_utils import sample_nodes  # noqa: E402
from torch import nn  # noqa: E402

from minipeft.layer import Method  # noqa: E402
from minipeft.learn.averaging import Rule, rule_of  # noqa: E402
from minipeft.learn.federated import (  # noqa: E402
    Client,
    Federation,
    Privacy,
    State,
    Update,
    aggregate,
    begin,
    fresh,
    train,
)
from minipeft.learn.plan import Plan  # noqa: E402

MOVED = "moved:"  # how the names of what has moved into the base begin in an ArrayRecord


def packed(state: State) -> ArrayRecord:
    return ArrayRecord.from_torch_state_dict(state.numbers | {MOVED + key: t for key, t in state.moved.items()})


def unpacked(arrays: ArrayRecord, number: int) -> State:
    every = arrays.to_torch_state_dict()
    moved = {name.removeprefix(MOVED): t for name, t in every.items() if name.startswith(MOVED)}
    return State({name: t for name, t in every.items() if not name.startswith(MOVED)}, moved, number)


class Averaging(Strategy):
    """A Flower strategy: in each round every node trains, and `rule` combines what arrives; see `aggregate`.

    `done` is the `Federation` so far. A node that answers with an error, or not before Flower's timeout, is left out.
    """

    def __init__(
        self, model: nn.Module, method: Method | Sequence[Method], rule: str = "fedit", nodes: int = 2, seed: int = 0
    ):
        self.rule, self.nodes = rule_of(rule), nodes
        self.restart: Callable[[int], dict] = lambda number: fresh(model, method, number + 1)
        self.done = Federation(method, begin(model, method, self.rule, seed), ())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["number"] = self.done.state.number
        nodes, _ = sample_nodes(grid, self.nodes, self.nodes)
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node) for node in nodes]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        updates, lost = [], {}
        for reply in replies:
            if reply.has_error():
                lost[f"node {reply.metadata.src_node_id}"] = f"dropped out: {reply.error.reason}"
                continue
            said = reply.content["said"]
            if "lost" in said:
                lost[said["name"]] = said["lost"]
            else:
                numbers = reply.content["arrays"].to_torch_state_dict()
                updates.append(Update(said["name"], said["rows"], numbers, said["number"], said["stopped"]))
        state = self.done.state
        state, happened = aggregate(state, updates, self.rule, lost, lambda: self.restart(state.number))
        self.done = Federation(self.done.method, state, (*self.done.rounds, happened))
        return packed(state), MetricRecord({"used": len(happened.used), "missed": happened.missed})

    def configure_evaluate(self, server_round, arrays, config, grid) -> Iterable[Message]:
        return []  # what the clients learnt is evaluated by whoever holds `done`

    def aggregate_evaluate(self, server_round, replies) -> None:
        return None

    def summary(self) -> None:
        """There is nothing to log that `done` does not hold."""


def client_app(
    model: nn.Module,
    method: Method | Sequence[Method],
    clients: Sequence[Client],
    rule: Rule,
    plan: Plan,
    privacy: Privacy | None = None,
) -> ClientApp:
    """An app for every site; the node's `partition-id` says which of `clients` it is."""
    app = ClientApp()

    @app.train()
    def _(message: Message, context: Context) -> Message:
        client = clients[context.node_config["partition-id"]]
        state = unpacked(message.content["arrays"], message.content["config"]["number"])
        try:
            update = train(model, method, state, client, rule, plan, privacy)
        except OSError as error:
            said = {"name": client.name, "lost": f"dropped out: {type(error).__name__} {error}".rstrip()}
            return Message(content=RecordDict({"said": ConfigRecord(said)}), reply_to=message)
        said = {"name": update.name, "rows": update.rows, "number": update.number, "stopped": update.stopped}
        arrays = ArrayRecord.from_torch_state_dict(update.numbers)
        return Message(content=RecordDict({"arrays": arrays, "said": ConfigRecord(said)}), reply_to=message)

    return app


def simulate(
    model: nn.Module,
    method: Method | Sequence[Method],
    clients: Sequence[Client],
    rule: str = "fedit",
    rounds: int = 5,
    plan: Plan = Plan(steps=10),  # noqa: B008  frozen
    privacy: Privacy | None = None,
) -> Federation:
    """`federate` under Flower's simulation engine, each client a node of its own."""
    from flwr.simulation import run_simulation

    strategy = Averaging(model, method, rule, len(clients), plan.seed)
    server = ServerApp()

    @server.main()
    def _(grid: Grid, context: Context) -> None:
        strategy.start(grid, packed(strategy.done.state), num_rounds=rounds)

    app = client_app(model, method, clients, strategy.rule, plan, privacy)
    run_simulation(server, app, num_supernodes=len(clients))
    return strategy.done
