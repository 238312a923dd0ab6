"""The widgets without a browser: values in, pictures and artists out, and a run that a second move cancels."""

import io
import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from processes import until
from tiny import llama, small

import minipeft as mp
from minipeft.explore import LoRAExplorer, Predict, SliderPlot
from minipeft.hook import seats


def lines(explorer):
    return {line.get_label(): line for line in explorer.figure.axes[0].get_lines()}


@pytest.fixture
def short(monkeypatch):
    """Runs of twelve steps, where it does not matter how far training gets."""
    monkeypatch.setattr("minipeft.explore.training.STEPS", 12)


def test_a_slider_redraws_its_figure_at_once():
    import ipywidgets

    def draw(figure, rank):
        figure.subplots().plot([0, rank])
        return f"rank {rank}"

    plot = SliderPlot(draw, {"rank": ipywidgets.IntSlider(value=1, min=1, max=9)})
    plot.controls["rank"].value = 7
    assert plot.text.value == "rank 7" and plot.values == {"rank": 7}
    assert list(plot.figure.axes[0].get_lines()[0].get_ydata()) == [0, 7]
    first = bytes(plot.image.value)
    plot.controls["rank"].value = 8
    assert bytes(plot.image.value) != first and first.startswith(b"\x89PNG")
    plot.controls["rank"].value = 7
    assert bytes(plot.image.value) == first, "the same values give the same picture, to the byte"


def test_a_picture_is_that_of_a_new_figure_and_no_garbage_is_looked_for_meanwhile():
    import gc
    import io

    import ipywidgets
    from matplotlib.figure import Figure

    found = []

    def draw(figure, rank):
        left, right = figure.subplots(1, 2)
        left.set(title="a line", ylabel="y", yscale="log", xlabel=f"x at {rank}")
        left.plot([1, 2, 30 * rank], label="it")
        left.legend()
        right.set_title("a small title", fontsize="small")
        right.plot([2e-6, rank * 1e-6])
        figure.colorbar(left.twinx().scatter([1, 2], [2, 1], c=[0, rank]), ax=right)
        figure.suptitle("over all")
        found.append(gc.isenabled())

    plot = SliderPlot(draw, {"rank": ipywidgets.IntSlider(value=1, min=1, max=9)})
    for rank in (3, 2):
        plot.controls["rank"].value = rank
        new, buffer = Figure(figsize=(9.6, 3.8), dpi=100), io.BytesIO()
        draw(new, rank)
        new.savefig(buffer, format="png", dpi=100)
        assert bytes(plot.image.value) == buffer.getvalue()
    assert found == [False, True] * 2 and gc.isenabled()
    plot.draw = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        plot.redraw()
    assert gc.isenabled()


def measuring(base):
    """The explorers that measure in the kernel, each with a move."""
    pirate = mp.load_adapter(base, mp.shipped("pirate"), "pirate")
    task = mp.world.pirate()
    yield mp.MixtureExplorer(pirate, {"pirate": task}, {"pirate": 1.0}, n=5), "pirate", 0.5
    yield mp.RankExplorer(pirate, task, n=5), "rank", 2
    yield mp.TemplateExplorer(mp.load("pocket")[0], n=10), "template", "{text} he felt"
    yield mp.MemoryCalculator("gpt2-xl"), "rank", 4


@pytest.mark.parametrize("which", range(4))
def test_on_a_page_a_picture_comes_before_what_it_lacks_is_measured(page, monkeypatch, which):
    explorer, name, value = list(measuring(mp.load("pocket")[0]))[which]
    shown = []

    def display(data, **_):
        shown.append((data, bool(explorer.lacking(**explorer.values))))
        return type("Handle", (), {"update": lambda self, data, **_: display(data)})()

    monkeypatch.setattr("minipeft.explore.slider.display", display)
    explorer._ipython_display_()
    *_, (first, lacked), (last, lacks) = shown
    assert lacked and not lacks and first["image/png"] != last["image/png"]
    assert "…" not in explorer.text.value

    pictures = []
    explorer.image.observe(lambda _: pictures.append(bool(explorer.lacking(**explorer.values))), "value")
    before = explorer.values[name]
    explorer.controls[name].value = value
    assert pictures == [True, False], "the one that lacks something, and the one that does not"
    explorer.controls[name].value = before
    assert pictures == [True, False, False], "what is known is shown at once"


@pytest.mark.parametrize("which", range(3))
def test_a_model_that_cells_use_is_measured_after_the_cell_and_the_picture_comes_before(page, monkeypatch, which):
    explorer, name, value = list(measuring(mp.load("pocket")[0]))[which]
    monkeypatch.setattr("minipeft.explore.slider.WORKER.computing", True)
    waiting, pictures = [], []
    monkeypatch.setattr("minipeft.explore.slider.after_cells", waiting.append)
    explorer.redraw()
    explorer.image.observe(lambda _: pictures.append(bool(explorer.lacking(**explorer.values))), "value")
    explorer.controls[name].value = value
    assert pictures == [True] and len(waiting) == 1 and "when it has ended" in explorer.text.value
    waiting.pop()()
    assert pictures == [True, False] and "…" not in explorer.text.value


def test_the_lora_explorer_trains_and_shows_loss_floor_spectrum_count_and_text():
    explorer = LoRAExplorer(small())
    explorer.controls["rank"].value = 4  # no event loop here, so it works until done
    assert len(explorer.history.losses) == 60 and explorer.history.stopped == "finished"
    shown = lines(explorer)
    assert list(shown["this run, each batch"].get_ydata()) == explorer.history.losses
    floor = mp.world.pirate().floor
    assert shown[f"floor of the task {floor:.3f}"].get_ydata()[0] == floor
    assert f"{explorer.tuned.count()}" in explorer.text.value
    assert f"test loss {explorer.score.loss:.3f}" in explorer.text.value
    each, median = [line.get_ydata() for line in explorer.figure.axes[1].lines]
    deltas = explorer.tuned.deltas().values()
    drawn = each.reshape(len(deltas), 5)[:, :4]
    assert numpy.isnan(each[4::5]).all() and len(median) == 4
    for sigma, delta in zip(drawn, deltas, strict=True):
        assert sigma == pytest.approx(torch.linalg.svdvals(delta)[:4].numpy(), abs=1e-5, rel=1e-4)
    explorer.controls["gamma"].value = 4.0
    assert any(label.startswith("before: r=4, γ=2") for label in lines(explorer))
    assert explorer.tuned.methods["default"][0].gamma == 4.0


@pytest.mark.parametrize("task", ["flip", "cipher"])
def test_every_task_of_the_explorer_can_be_chosen(task, short):
    explorer = LoRAExplorer(small(), task=task)
    explorer.controls["targets"].value = "attention"
    assert explorer.score is not None and explorer.samples[task]


def test_the_adapter_explorer_gathers_a_point_for_every_run_and_says_the_formula(short):
    explorer = mp.AdapterExplorer(small())
    for bottleneck, sharing in ((2, "none"), (4, "none"), (4, "all blocks")):
        explorer.controls["bottleneck"].value = bottleneck
        explorer.controls["sharing"].value = sharing
    d, blocks = 32, 2
    each = {m: 2 * d * m + m + d for m in (2, 4)}
    numbers = [n for n, _ in explorer.points["pirate"].values()]
    assert numbers == [2 * blocks * each[2], 2 * blocks * each[4], each[4]]
    assert f"1 adapter of 2dm + m + d = 2·{d}·4 + 4 + {d} = {each[4]:,}" in explorer.text.value
    shown = {line.get_label(): list(line.get_xdata()) for line in explorer.figure.axes[1].get_lines()}
    assert shown["this run"] == [each[4]] and shown["before"] == numbers[:2]


def test_templates_stay_in_the_picture_and_differ():
    explorer = mp.TemplateExplorer(n=60)
    explorer.redraw()
    explorer.controls["template"].value = "{text} he felt"  # the third, after the two that are there at first
    bars = [bar.get_width() for bar in explorer.figure.axes[0].patches]
    assert (
        bars == [accuracy for accuracy, _ in explorer.found.values()]
        and len(bars) == 3
        and bars[2] > max(bars[:2]) + 0.2
    )


def test_the_prompt_explorer_names_the_nearest_words(short):
    explorer = mp.PromptExplorer(small(), task="flip")
    explorer.controls["length"].value = 2
    assert "n·d = 2·32 = 64" in explorer.text.value and "nearest words" in explorer.text.value
    explorer.controls["start"].value = "lstm"
    assert type(explorer.tuned.methods["default"][0]).__name__ == "PTuning"


def test_the_prefix_explorer_shows_the_attention_that_the_prefix_gets(short):
    from minipeft.explore.prompt import attention_in_front

    explorer = mp.PrefixExplorer(small(), task="flip")
    for start in ("words", "reparametrised", "random"):
        explorer.controls["start"].value = start
    assert "8·2·2·(2·16) = 1,024 in the file" in explorer.text.value
    text = "anna went to the lake ."
    shares = attention_in_front(explorer.tuned, [text, text + " it rained ."])
    assert shares.shape == (2, 2) and (shares > 0).all() and (shares < 1).all()
    alone = attention_in_front(explorer.tuned, [text])
    maps = explorer.tuned.base.config._attn_implementation
    assert maps == "sdpa" and alone.shape == (2, 2)
    shown = [float(t.get_text()) for t in explorer.figure.axes[1].texts]
    assert len(shown) == 4 and all(0 < v < 1 for v in shown)


@pytest.fixture
def page(monkeypatch):
    """As if somebody looked on."""
    monkeypatch.setattr("minipeft.explore.slider.watched", lambda: True)


def ended(explorer):
    """Waits for the end of what a move began."""
    explorer.running.join(60)
    assert not explorer.running.is_alive()
    return explorer


def test_on_a_page_another_process_trains_what_the_kernel_would_have_and_fills_the_row(page, short):
    explorer, here = LoRAExplorer(small()), LoRAExplorer(small())
    for each in (explorer, here):
        each.controls["rank"].unobserve_all("value")
        each.controls["rank"].options = [4, 2, 64]
    before, free = torch.random.get_rng_state(), 0
    explorer.start()
    while explorer.score is None:
        time.sleep(0.001)
        free += 1
        assert free < 300_000, "In five minutes, the run elsewhere came to no score."
    assert free > 2 and torch.equal(before, torch.random.get_rng_state())
    ended(explorer)
    here.finish()
    assert explorer.history.losses == pytest.approx(here.history.losses, rel=1e-5)
    assert explorer.score.loss == pytest.approx(here.score.loss, rel=1e-5) and explorer.samples == here.samples
    for mine, theirs in zip(explorer.tuned.deltas().values(), here.tuned.deltas().values(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)

    ranks = {rank for _, _, rank, *_ in explorer.trained}
    assert ranks == {2, 4}, "all but 64, which is above the width of this model"
    explorer.elsewhere, explorer.afterwards = None, lambda: ()  # what is filled needs no process
    explorer.controls["rank"].value = 2
    explorer.start()
    ended(explorer)
    here.controls["rank"].value = 2
    here.finish()
    assert explorer.score.loss == pytest.approx(here.score.loss, abs=0.02)
    for mine, theirs in zip(explorer.tuned.deltas().values(), here.tuned.deltas().values(), strict=True):
        assert torch.allclose(mine, theirs, atol=0.02)
    assert "alone it may differ" in explorer.text.value and "alone it may" not in here.text.value


def test_controls_of_a_page_take_turns_with_cells_fifty_times_as_often_as_other_threads():
    import sys

    from minipeft.explore.page import TURN, answer_at_once

    class Comm:
        _reply_subshell_for = staticmethod(lambda data, default: "the cells' thread")

    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(5e-3)
        answer_at_once(SimpleNamespace(comm=object()))
        assert sys.getswitchinterval() == pytest.approx(5e-3), "no page, so nothing changes"
        control = SimpleNamespace(comm=Comm())
        answer_at_once(control)
        assert control.comm._reply_subshell_for({}, "its own") == "its own"
        assert sys.getswitchinterval() == pytest.approx(TURN) == pytest.approx(1e-4)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.filterwarnings("ignore:The loss became")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_diverges_is_said_in_a_sentence_and_shown_as_far_as_it_got(elsewhere, monkeypatch):
    explorer = LoRAExplorer(small())
    for control in explorer.controls.values():
        control.unobserve_all("value")
    explorer.controls["lr"].options = [("3", 3.0), ("1e30", 1e30)]
    explorer.controls["rank"].options = [4, 2]
    explorer.controls["lr"].value = 1e30
    monkeypatch.setattr("minipeft.explore.slider.watched", lambda: elsewhere)
    if elsewhere:
        explorer.start()
        ended(explorer)
        assert len(explorer.trained) == 2, "the rest of the row as well"
    else:
        explorer.finish()
    assert "The loss is not finite any more" in explorer.text.value and explorer.score is None
    assert 0 < len(explorer.history.losses) < 60 and len(lines(explorer)["this run, each batch"].get_xdata()) > 0
    next(iter(explorer.tuned.layers())).B.data.fill_(torch.nan)  # as a step with an infinite gradient leaves it
    explorer.seen = None
    explorer.redraw()
    assert "ΔW is not finite" in [text.get_text() for text in explorer.figure.axes[1].texts]
    assert explorer.points == {"pirate": {}} and not any(label.startswith("before") for label in lines(explorer))


def test_no_spectrum_is_computed_before_the_first_step(short):
    asked = []
    explorer = LoRAExplorer(small())
    explorer.look = lambda tuned: asked.append(tuned) or torch.zeros(1, 1)
    steps = explorer._steps()
    next(steps)
    assert not asked and "ΔW = 0" in [text.get_text() for text in explorer.figure.axes[1].texts]
    next(steps)
    assert asked == [explorer.tuned]
    steps.close()


def test_the_process_hears_of_the_cell_that_runs_and_of_every_other(monkeypatch):
    from minipeft.explore.page import tell_of_cells

    heard, shell = [], InteractiveShell()
    monkeypatch.setattr("minipeft.explore.page.get_ipython", lambda: shell)
    tell_of_cells(heard.append)
    assert heard == [True]
    shell.user_ns["heard"] = heard
    shell.events.trigger("post_run_cell", None)
    shell.run_cell("inside = list(heard)\n1 / 0", silent=False)
    assert shell.user_ns["inside"] == [True, False, True] and heard == [True, False, True, False]


@pytest.fixture
def waits(monkeypatch):
    """The page's module with cells that wait, as long as it takes."""
    from minipeft.explore import page

    if page.SIGNAL is None:
        pytest.skip("This system has no signal with which a cell could be told to wait.")
    before = signal.getsignal(page.SIGNAL)
    signal.signal(page.SIGNAL, signal.SIG_DFL)
    monkeypatch.setattr(page, "PAUSE", 60.0)
    page.let_cells_wait()
    yield page
    signal.signal(page.SIGNAL, before)


def counted_while(draw) -> None:
    """Counts in the main thread, as a cell does, until `draw(count)` has ended in another."""
    count = [0]
    drawing = ThreadPoolExecutor(1).submit(draw, count)
    while not drawing.done():
        count[0] += 1
    drawing.result()


def stands_still(count) -> bool:
    before = count[0]
    time.sleep(0.02)
    return count[0] == before


def test_a_cell_waits_while_another_thread_draws_and_then_goes_on(waits):
    def draw(count):
        for _ in range(3):
            with waits.cells_wait():
                until(lambda: stands_still(count), "a cell that waits", 60, pause=0)
                before = count[0]
                time.sleep(0.1)
                assert count[0] == before
            until(lambda: not stands_still(count), "a cell that goes on", 60, pause=0)

    counted_while(draw)


def test_a_cell_waits_no_longer_than_it_may(waits, monkeypatch):
    monkeypatch.setattr(waits, "PAUSE", 0.05)

    def draw(count):
        with waits.cells_wait():
            until(lambda: stands_still(count), "a cell that waits", 60, pause=0)
            until(lambda: not stands_still(count), "a cell that goes on", 60, pause=0)

    counted_while(draw)
    with waits.cells_wait():  # in the thread that would wait
        assert waits.drawn.is_set()


def test_a_cell_that_waits_can_be_interrupted(waits):
    over = threading.Event()

    def draw(count):
        with waits.cells_wait():
            until(lambda: stands_still(count), "a cell that waits", 60, pause=0)
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(60)

    with pytest.raises(KeyboardInterrupt):
        counted_while(draw)
    over.set()


def test_a_signal_that_somebody_else_uses_stays_theirs(waits):
    heard = []
    signal.signal(waits.SIGNAL, lambda *_: heard.append("theirs"))
    waits.let_cells_wait()

    def draw(count):
        with waits.cells_wait():
            time.sleep(0.05)

    counted_while(draw)
    assert not heard
    signal.raise_signal(waits.SIGNAL)
    assert heard == ["theirs"]


def test_a_picture_that_is_gone_on_with_is_the_one_that_would_be_drawn_anew(monkeypatch):
    explorer = mp.AdapterExplorer(small())
    monkeypatch.setattr(explorer, "REDRAW", 1e9)
    monkeypatch.setattr(explorer, "ADVANCE", -1.0)
    steps, pictures = explorer._steps(), []
    for _ in range(9):
        next(steps)
        pictures.append(pixels(explorer))
    assert all((a != b).any() for a, b in itertools.pairwise(pictures[1:]))
    assert "step 8 of 60" in explorer.text.value and explorer.image.tooltip == explorer._said()
    explorer.redraw(sharp=False)
    assert (pixels(explorer) == pictures[-1]).all()
    explorer.dpi = 200
    explorer.redraw()  # as when it is shown again: there is nothing of this size to go on with
    last = pixels(explorer)
    next(steps)
    assert last.shape[0] == 2 * pictures[0].shape[0] and (pixels(explorer) == last).all()
    steps.close()


def pixels(explorer) -> numpy.ndarray:
    with Image.open(io.BytesIO(explorer.image.value)) as image:
        return numpy.asarray(image.convert("RGB"))


def test_a_second_move_cancels_the_run_and_so_does_the_button(page):
    explorer = LoRAExplorer(small())
    explorer.controls["rank"].value = 2
    first = explorer.running
    until(lambda: len(explorer.history.losses) >= 3, "the first three steps", pause=0.001)
    assert explorer.bar.value < 1 and not explorer.stop.disabled
    explorer.controls["rank"].value = 16
    second = explorer.running
    first.join(60)
    assert not first.is_alive()

    def moved() -> bool:
        with explorer.drawing:
            tuned = explorer.tuned  # None while the first picture is drawn
            return tuned is not None and tuned.methods["default"][0].rank == 16 and bool(explorer.history.losses)

    until(moved, "a first step at the other rank", pause=0.001)
    assert len(list(seats(explorer.model))) == 14, "the first adapter is gone"
    explorer.stop.click()
    second.join(60)
    assert not second.is_alive() and "Stopped" in explorer.text.value and explorer.stop.disabled
    assert not explorer.trained


def test_a_task_comes_with_its_rate():
    explorer = LoRAExplorer(small())  # of which the atlas knows nothing
    explorer.finish = lambda: None
    explorer.controls["task"].value = "flip"
    assert explorer.values["lr"] == explorer.rates["flip"] == 3e-3
    measured = {1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}
    explorer.measured = lambda lr, task, **_: (9, [measured[lr]] * 3) if lr in measured and task == "cipher" else None
    explorer.controls["task"].value = "cipher"
    assert explorer.values["lr"] == 1e-3


def test_a_model_of_the_notebook_is_trained_in_the_kernel_which_is_said(page, short, monkeypatch):
    import __main__

    model = small()
    own = type("Own", (type(model),), {"__module__": "__main__"})
    monkeypatch.setattr(__main__, "Own", own, raising=False)  # it pickles, and no other process can read it
    model.__class__ = own
    explorer = LoRAExplorer(model)
    explorer.controls["rank"].value = 4
    assert ended(explorer).score is not None and "trained in the kernel" in explorer.text.value
    assert len(explorer.trained) == 1


def test_what_goes_wrong_on_a_page_is_said_below_the_picture(page, short):
    explorer = LoRAExplorer(small())
    explorer.draw = lambda *_, **__: 1 / 0
    explorer.controls["rank"].value = 4
    assert ended(explorer).text.value == "<b>ZeroDivisionError: division by zero</b>"
    explorer.run, explorer.text.value = None, ""
    explorer.controls["rank"].value = 2
    assert explorer.text.value == "<b>ZeroDivisionError: division by zero</b>"


def test_a_setting_that_cannot_work_is_said_in_one_sentence():
    explorer = LoRAExplorer(small())
    explorer.controls["rank"].value = 64  # the small model is 32 wide
    assert "rank=64 is above" in explorer.text.value


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda base: mp.LoRAExplorer("pirate"), "a task goes by task="),
        (lambda base: mp.AdapterExplorer(base, "nope"), "trains on 'pirate', 'flip', 'cipher'"),
        (lambda base: mp.PromptExplorer(task=mp.world.pirate(4, 1)), "trains on 'forecast', 'flip', 'pirate'"),
        (lambda base: mp.LoRAExplorer(mp.attach(base, mp.LoRA(rank=2))), "carries adapters"),
        (lambda base: mp.PrefixExplorer(llama()), "does not write in the pocket model's 684 words"),
        (lambda base: mp.LoRAExplorer(mp.load("pocket", labels=2)[0]), "does not write in"),
        (lambda base: mp.MemoryCalculator("nope"), "knows the shapes of gpt2-xl"),
        (lambda base: mp.RankExplorer(mp.attach(base, mp.LoRA(rank=2)), mp.world.pirate(4, 1), "nope"), "no 'nope'"),
        (lambda base: mp.MixtureExplorer(mp.attach(base, mp.LoRA(rank=2)), {}, {"b": 1}), "gives 'b' the weight 1"),
    ],
)
def test_what_an_explorer_cannot_show_is_refused_before_it_appears(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(mp.load("pocket")[0])


def test_the_display_carries_a_picture_for_readers_without_a_kernel(monkeypatch, short):
    shown = []
    monkeypatch.setattr(
        "minipeft.explore.slider.display", lambda data, **_: shown.append(data) or type("H", (), {"update": _update})()
    )

    def _update(self, data, raw):
        shown.append(data)

    InteractiveShell.instance()
    LoRAExplorer(small())._ipython_display_()
    assert "image/png" in shown[-1] and "rank = 8" in shown[-1]["text/plain"]
    assert shown[0]["image/png"] != shown[-1]["image/png"], "the picture that stays shows the finished run"


def test_a_prediction_is_locked_and_one_that_is_taken_back_stays_in_view():
    question = Predict("How many?", ["few", "many"], "Now measure.")
    few, many = question.buttons
    many.click()
    assert question.chosen == "many" and "Now measure." in question.answer.value
    assert few.disabled and many.disabled and question.undo.layout.display is None
    question.undo.click()
    assert question.chosen is None and not few.disabled and "Now measure." not in question.answer.value
    few.click()
    assert question.chosen == "few" and question.before == ["many"]
    assert "You said “few”, after “many”. Now measure." in question.answer.value


def test_a_redraw_is_quick_enough_to_drag(short):
    """Not a benchmark: a redraw that does hidden work, such as training again, would take seconds."""
    explorer = LoRAExplorer(small())
    explorer.finish()
    started = time.process_time()
    explorer.redraw()
    assert time.process_time() - started < 2


def test_an_explorer_shows_the_atlas_at_once_and_only_for_the_model_that_it_is_about():
    from minipeft.course import atlas

    explorer = LoRAExplorer()
    found, where = atlas.measured()
    [numbers, losses] = found[repr(mp.LoRA(rank=8, gamma=2.0)), "pirate", 1e-2]
    steps = explorer._steps()
    next(steps)  # before the first step of training
    assert not explorer.history.losses
    shown = {container.get_label() for container in explorer.figure.axes[0].containers}
    assert shown == {f"atlas: {sum(losses) / len(losses):.3f}, {len(losses)} seeds"}
    assert where in explorer.text.value
    next(steps)
    assert where in explorer.text.value and numbers == explorer.tuned.count().trainable
    steps.close()
    started = time.process_time()
    explorer.redraw()
    assert time.process_time() - started < 1  # 0.1 s when nothing else runs
    of = atlas.of(atlas.load(), "pirate", mp.LoRA(rank=8, gamma=2.0))
    assert sorted(losses) == sorted(of[of.lr == 1e-2].loss)
    for other in (LoRAExplorer(small()), mp.AdapterExplorer(small())):
        assert (
            other.measured(1e-2, "pirate", **{k: v for k, v in other.values.items() if k not in ("lr", "task")}) is None
        )
    adapters = mp.AdapterExplorer()
    adapters.redraw()
    right = adapters.figure.axes[1]
    assert len(adapters.curve()) == 7 and len(right.containers) == 1


def test_settings_side_by_side_are_the_best_of_the_atlas_with_every_seed(monkeypatch):
    import matplotlib.pyplot as plt

    from minipeft.course import atlas
    from minipeft.explore.compare import compare

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    runs, methods = atlas.load(), {"full": mp.Full(), "r=4": mp.LoRA(4, gamma=2.0)}
    table = compare(runs, "pirate", methods, {"before": 9.0})
    best = {label: atlas.best(runs, "pirate", method) for label, method in methods.items()}
    assert table["best rate"].to_dict() == {label: each["lr"] for label, each in best.items()}
    assert table["loss, mean"].to_dict() == {label: round(each["mean"], 2) for label, each in best.items()}
    [axes] = shown[0].axes
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    for x, (line, label) in enumerate(zip(points, methods, strict=True)):
        assert set(line.get_xdata()) == {x} and len(line.get_ydata()) == best[label]["count"]
        assert min(line.get_ydata()) == best[label]["min"] and max(line.get_ydata()) == best[label]["max"]
    assert {"before 9.00", "floor of the task 0.794"} <= {text.get_text() for text in axes.get_legend().get_texts()}
    plt.close(shown[0])
    with pytest.raises(ValueError, match="no runs of LoRA.rank=5"):
        compare(runs, "pirate", {"r=5": mp.LoRA(5, gamma=2.0)})
