"""The server, asked by the official client: each adapter's own text, whoever else is in the batch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import shutil
import socket
import time

import pytest
import serving
import tiny
import torch
from serving import NAMES, PROMPTS

openai = pytest.importorskip("openai", reason='the tests of the server need pip install "minipeft[test,serve]"')
pytest.importorskip("starlette")
import httpx  # noqa: E402

TOKENS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        serving.write_adapter(path / name, seed)
    return path


@pytest.fixture(scope="module")
def right(folder):
    """{(model, prompt): the text that it writes alone}."""
    paths = {name: folder / name for name in NAMES} | {"base": None}
    found = {(n, p): serving.alone(path, p, TOKENS) for n, path in paths.items() for p in PROMPTS}
    for prompt in PROMPTS:
        assert len({found[name, prompt] for name in paths}) == len(paths), "the texts tell the adapters apart"
    return found


@pytest.fixture(scope="module")
def running(folder):
    with serving.served(folder, body=20_000, prompts=8) as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, model, prompt, tokens=TOKENS, **more):
    return client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, **more)


def head(length: int) -> bytes:
    """The beginning of a request whose body has so many bytes, for a client of our own."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def settled(look, seconds: float = 10.0) -> bool:
    """Whether `look()` comes true."""
    end = time.monotonic() + seconds
    while not look():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# -- answers ----------------------------------------------------------------------------------------------------------
def test_models(client):
    assert [m.id for m in client.models.list()] == ["base", *sorted(NAMES)]
    assert client.models.retrieve("zoe").id == "zoe"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("nobody")


def test_each_adapter_writes_its_own_text(client, right):
    for (model, prompt), text in right.items():
        answer = ask(client, model, prompt)
        assert (answer.choices[0].text, answer.model, answer.object) == (text, model, "text_completion")
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_is_not_streamed(client, right):
    for (model, prompt), text in right.items():
        pieces = list(ask(client, model, prompt, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.text for piece in pieces for c in piece.choices) == text
        assert len(pieces) > 3, "it comes in pieces"
        reasons = [c.finish_reason for piece in pieces for c in piece.choices]
        assert reasons[-1] in ("length", "stop") and set(reasons[:-1]) <= {None}
        assert pieces[-1].usage.completion_tokens <= TOKENS and not pieces[-1].choices


def test_many_at_once_are_never_mixed(client, right, running):
    """More texts than rows, of all adapters, lengths and both ways of asking."""
    work = [(key, tokens, stream) for key in right for tokens in (1, 3, TOKENS) for stream in (False, True)]

    def one(job):
        (model, prompt), tokens, stream = job
        answer = ask(client, model, prompt, tokens, stream=stream)
        text = "".join(p.choices[0].text for p in answer) if stream else answer.choices[0].text
        return right[model, prompt].startswith(text) and (tokens < TOKENS or text == right[model, prompt])

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert all(pool.map(one, work))
    assert settled(lambda: not running[1].rows), "a text that is done leaves before the next token"
    assert running[1].waiting() == 0


def test_several_prompts_and_token_ids(client, right, running):
    answer = ask(client, "zoe", PROMPTS)
    assert [(c.index, c.text) for c in answer.choices] == [(i, right["zoe", p]) for i, p in enumerate(PROMPTS)]
    ids = [running[2].tokenizer(p).input_ids for p in PROMPTS]
    assert [c.text for c in ask(client, "zoe", ids).choices] == [c.text for c in answer.choices]
    assert ask(client, "zoe", ids[1]).choices[0].text == right["zoe", PROMPTS[1]]
    texts = [""] * len(ids)
    for piece in ask(client, "zoe", PROMPTS, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [right["zoe", p] for p in PROMPTS]


def test_stop_ends_the_text_before_it(client, right):
    text = right["b", PROMPTS[0]]
    words = text.split()
    stop = f" {words[3]}"
    for stream in (False, True):
        answer = ask(client, "b", PROMPTS[0], stop=[stop, "never"], stream=stream)
        choices = [p.choices[0] for p in answer] if stream else answer.choices
        assert "".join(c.text for c in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_draws_follow_the_seed_and_not_the_company(client):
    def drawn(seed, **more):
        create = client.completions.create
        return create(model="base", prompt="The", max_tokens=12, temperature=1, seed=seed, **more).choices[0].text

    alone = [drawn(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn, range(4))) == alone
    assert len(set(alone)) == 4
    assert drawn(3, top_p=1e-9) == ask(client, "base", "The", 12).choices[0].text, "one token is all that is left"


# -- refusals ---------------------------------------------------------------------------------------------------------
BAD = {
    "no body": (b"", 400, None),
    "no JSON": (b"{", 400, None),
    "a list": (b"[]", 400, None),
    "nested too deep": (b"[" * 15_000, 400, None),
    "no model": ({"prompt": "a"}, 400, "model"),
    "a model of another type": ({"model": 3, "prompt": "a"}, 400, "model"),
    "an unknown model": ({"model": "nobody", "prompt": "a"}, 404, "model"),
    "no prompt": ({"model": "base"}, 400, "prompt"),
    "an empty list": ({"model": "base", "prompt": []}, 400, "prompt"),
    "a mixed list": ({"model": "base", "prompt": ["a", 3]}, 400, "prompt"),
    "a prompt of truths": ({"model": "base", "prompt": [True]}, 400, "prompt"),
    "a token that is none": ({"model": "base", "prompt": [10**9]}, 400, "prompt"),
    "a negative token": ({"model": "base", "prompt": [-1]}, 400, "prompt"),
    "too many prompts": ({"model": "base", "prompt": ["a"] * 9}, 400, "prompt"),
    "too long": ({"model": "base", "prompt": "the " * 120, "max_tokens": 20}, 400, "max_tokens"),
    "no tokens": ({"model": "base", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    "half a token": ({"model": "base", "prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    "true tokens": ({"model": "base", "prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    "cold": ({"model": "base", "prompt": "a", "temperature": -1}, 400, "temperature"),
    "NaN": (b'{"model": "base", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    "top_p": ({"model": "base", "prompt": "a", "top_p": 2}, 400, "top_p"),
    "a seed of words": ({"model": "base", "prompt": "a", "seed": "x"}, 400, "seed"),
    "stop of numbers": ({"model": "base", "prompt": "a", "stop": [1]}, 400, "stop"),
    "too many stops": ({"model": "base", "prompt": "a", "stop": list("abcde")}, 400, "stop"),
    "stream of words": ({"model": "base", "prompt": "a", "stream": "yes"}, 400, "stream"),
    "several choices": ({"model": "base", "prompt": "a", "n": 2}, 400, "n"),
    "probabilities": ({"model": "base", "prompt": "a", "logprobs": 3}, 400, "logprobs"),
    "an unknown parameter": ({"model": "base", "prompt": "a", "temprature": 0}, 400, "temprature"),
    "too large": (b" " * 20_001, 413, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused(case, running):
    body, status, param = BAD[case]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{running[0]}/v1/completions", content=data, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"].rstrip().endswith(".") and len(error["message"]) < 300 and answer.json().keys() == {"error"}
    assert running[1].rows == [] and running[1].waiting() == 0


def test_other_addresses_and_kinds(running):
    address = running[0]
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)):
        answer = httpx.request(method, address + path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    answer = httpx.post(f"{address}/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415, "a page of another site could send it"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_token_is_asked_for(folder):
    with serving.served(folder, token="s3cret") as (address, *_):
        for key, fits in (("s3cret", True), ("s3cre", False), ("x", False), ("S3CRET", False)):
            answer = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == (200 if fits else 401)
            assert fits or answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{address}/metrics").status_code == 401 and httpx.get(f"{address}/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="s3cret") as client:
            assert client.models.list().data


@pytest.mark.parametrize(
    "host, token, opens",
    [("127.0.0.1", None, True), ("::1", None, True), ("localhost", None, True), ("0.0.0.0", None, False),
     ("example.org", None, False), ("0.0.0.0", "x", True)],
)  # fmt: skip
def test_it_opens_to_others_only_with_a_token(host, token, opens, folder, monkeypatch, capsys):
    import uvicorn

    from minipeft.serve import __main__ as command

    called = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **how: called.append(how["host"]))
    monkeypatch.setenv("MINIPEFT_TOKEN", token or "")
    (empty := folder.parent / "empty").mkdir(exist_ok=True)
    assert command.main([str(empty), "--host", host]) == (0 if opens else 2)
    assert called == ([host] if opens else []) and opens == ("MINIPEFT_TOKEN" not in capsys.readouterr().err)


# -- the life of a row ------------------------------------------------------------------------------------------------
LONG = 100


@contextlib.contextmanager
def slow(engine, seconds: float = 0.03):
    """Tokens that take their time."""
    write, engine._write = engine._write, lambda: (time.sleep(seconds), write())
    try:
        yield
    finally:
        engine._write = write


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(stream, running):
    address, engine, _ = running
    port = int(address.rpartition(":")[2])
    body = json.dumps({"model": "b", "prompt": "The", "max_tokens": LONG, "temperature": 0, "stream": stream})
    with slow(engine):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(head(len(body)) + body.encode())
            assert settled(lambda: len(engine.rows) == 1)
        steps = engine.steps
        assert settled(lambda: not engine.rows) and engine.steps - steps < LONG / 2


def test_an_answer_that_takes_too_long(folder, right):
    with serving.served(folder, seconds=0.3) as (address, engine, _), slow(engine, 0.1):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="over 0.3 s") as error:
                ask(client, "b", "The", LONG)
            assert error.value.status_code == 504
            with pytest.raises(openai.APIError, match="over 0.3 s"):
                list(ask(client, "b", "The", LONG, stream=True))
            assert settled(lambda: not engine.rows)
            assert ask(client, "b", PROMPTS[0], 1).choices[0].text


def test_a_full_queue_says_so(folder):
    with serving.served(folder, rows=1, waiting=2) as (address, engine, _), slow(engine, 0.2):

        def one(_):
            body = {"model": "b", "prompt": "The", "max_tokens": 3}
            return httpx.post(f"{address}/v1/completions", json=body, timeout=30)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(one, range(8)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 2
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["type"] == "rate_limit_error" and refused.headers["retry-after"]


def test_a_body_that_does_not_come(folder):
    with serving.served(folder, seconds=0.3) as (address, *_):
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as line:
            line.sendall(head(99) + b"{")
            assert b" 408 " in line.recv(1000)


def test_a_broken_batch_is_told_and_the_server_goes_on(running, client, right, monkeypatch):
    engine, call = running[1], running[1].bank

    class Breaks:
        model = call.model
        broken = True

        def __call__(self, *args, **kwargs):
            if self.broken:
                self.broken = False
                raise RuntimeError("no memory left")
            return call(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(call, name)

    monkeypatch.setattr(engine, "bank", Breaks())
    with pytest.raises(openai.InternalServerError, match="no memory left"):
        ask(client, "b", PROMPTS[0])
    assert ask(client, "b", PROMPTS[0]).choices[0].text == right["b", PROMPTS[0]]


# -- the folder -------------------------------------------------------------------------------------------------------
def test_adapters_come_change_and_go(folder, right, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    prompt = PROMPTS[0]
    with serving.served(shelf) as (address, engine, service):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
            assert [m.id for m in client.models.list()] == ["base"]
            shutil.copytree(folder / "zoe", shelf / "new")
            assert settled(lambda: "new" in engine.adapters)
            assert ask(client, "new", prompt).choices[0].text == right["zoe", prompt]
            with slow(engine):
                begun = iter(ask(client, "new", prompt, stream=True))
                first = next(begun).choices[0].text
                shutil.copytree(folder / "b", shelf / "new", dirs_exist_ok=True)
                assert settled(lambda: engine.swaps == 2)
                rest = "".join(piece.choices[0].text for piece in begun)
            assert first + rest == right["zoe", prompt], "a text is finished by whom it was begun"
            assert ask(client, "new", prompt).choices[0].text == right["b", prompt]
            assert settled(lambda: len(engine.bank.names()) == 1), "the old version is gone"
            weights = shelf / "new" / "adapter_model.safetensors"
            whole = weights.read_bytes()
            weights.write_bytes(whole[:-8])
            assert settled(lambda: "safetensors" in service.folder.refused.get("new", ""))
            assert ask(client, "new", prompt).choices[0].text == right["b", prompt], "what is damaged replaces nothing"
            weights.write_bytes(whole)
            assert settled(lambda: not service.folder.refused)
            shutil.rmtree(shelf / "new")
            assert settled(lambda: not engine.adapters)
            with pytest.raises(openai.NotFoundError, match="not served"):
                ask(client, "new", prompt)
            (shelf / "base").mkdir()
            shutil.copytree(folder / "b", shelf / "base", dirs_exist_ok=True)
            assert settled(lambda: "name of the base" in service.folder.refused.get("base", ""))
            assert ask(client, "base", prompt).choices[0].text == right["base", prompt]


def test_an_adapter_of_another_model_says_why(folder, tmp_path):
    from minipeft.attach import attach
    from minipeft.methods.lora import LoRA

    shelf = tmp_path / "shelf"
    attach(tiny.llama(), LoRA(rank=2)).save(shelf / "foreign")
    with serving.served(shelf) as (address, engine, service):
        answer = httpx.post(f"{address}/v1/completions", json={"model": "foreign", "prompt": "The"})
        assert answer.status_code == 404 and "this model needs" in answer.json()["error"]["message"]


def test_metrics_count(running, client):
    from prometheus_client.parser import text_string_to_metric_families

    def look():
        text = httpx.get(f"{running[0]}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return {(s.name, *s.labels.values()): s.value for s in samples}

    before = look()
    ask(client, "zoe", PROMPTS[0], 5)
    with pytest.raises(openai.NotFoundError):
        ask(client, "nobody", PROMPTS[0], 5)
    after = look()
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert grown["minipeft_requests_total", "200"] == grown["minipeft_requests_total", "404"] == 1
    assert grown["minipeft_tokens_total", "written"] == 5 and grown["minipeft_first_token_seconds_count",] == 1
    assert (after["minipeft_adapters",], after["minipeft_running",]) == (len(NAMES), 0)


# -- the engine -------------------------------------------------------------------------------------------------------
def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=tiny.V, hidden_size=tiny.D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, mistral], ids=["grouped", "Conv1D", "sliding"])
def test_rows_equal_texts_alone_on_other_architectures(make, tmp_path):
    import random

    from minipeft.attach import attach
    from minipeft.methods.lora import LoRA
    from minipeft.serve.engine import Engine, Request
    from minipeft.serve.tenants import Bank

    pick = random.Random(0)
    prompts = [[pick.randrange(3, tiny.V) for _ in range(pick.randrange(1, 12))] for _ in range(6)]
    right, got = {}, {}
    engine = Engine(Bank(make().double()), rows=4)
    for seed, name in enumerate(["zoe", "Ada", None]):
        model = make().double()
        if name:
            model = attach(model, LoRA(rank=2))
            tiny.randomise(model, seed, scale=1.0)
            model.save(tmp_path / name)
            engine.swap(name, tmp_path / name)
        for i, ids in enumerate(prompts):
            most, row = 5 + 2 * i, torch.tensor([ids])
            out = model.generate(row, attention_mask=row * 0 + 1, max_new_tokens=most, do_sample=False, eos_token_id=2)
            text = out[0, len(ids) :].tolist()
            right[name, i] = [*text[:-1], "stop"] if text[-1] == 2 else [*text, "length"]
            got[name, i] = []
            engine.submit(Request(name, ids, most, got[name, i].append, ends=frozenset([2])))
    while engine.step():
        pass
    assert got == right and len({tuple(right[name, 0]) for name, _ in right}) == 3


def test_other_models_are_refused():
    from minipeft.serve.engine import Engine
    from minipeft.serve.tenants import Bank

    for model in (tiny.t5(), tiny.bert("SequenceClassification")):
        with pytest.raises(ValueError, match=r"\.$"):
            Engine(Bank(model))
    for rows in (0, True, 1.5):
        with pytest.raises(ValueError, match="rows must be"):
            Engine(Bank(tiny.llama()), rows=rows)


def test_nan_breaks_its_own_row_alone(folder, tmp_path):
    from minipeft.serve.engine import Engine, Request
    from minipeft.serve.tenants import Bank

    engine, got = Engine(Bank(tiny.llama())), {"good": [], "bad": []}
    call = engine.bank.__class__.__call__

    class Spoils:
        def __init__(self, bank):
            self.bank, self.model = bank, bank.model

        def __call__(self, ids, adapters, **how):
            out = call(self.bank, ids, adapters=adapters, **how)
            out.logits[0, -1, 5] = float("nan")
            return out

    engine.bank = Spoils(engine.bank)
    for name in ("bad", "good"):
        engine.submit(Request(None, [5, 6, 7], 1, got[name].append))
    engine.step()
    assert isinstance(got["bad"][0], ArithmeticError) and got["good"][1:] == ["length"]


# -- under load -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_under_load_none_is_lost_and_none_mixed():
    """300 of the 10,000 requests that benchmarks/load.py sends while adapters are exchanged."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "benchmarks" / "load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    found = load.run(requests=300, adapters=5, at_once=40, rows=8, pause=0.05)
    assert (found["lost"], found["mixed"], found["left in the batch"]) == (0, 0, 0), found["why"]
    assert min(found["versions"]) > 10 and found["swaps"] > 10, "both versions of the adapters were at work"
