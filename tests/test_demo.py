"""The demonstration: its corpus, hashing and losses, its command line, and one tiny run."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

import adam_transforms
from adam_transforms.__main__ import main
from adam_transforms._core import interrupts
from adam_transforms._demo import (
    CONTEXT,
    DemoError,
    corpus,
    figure,
    ngrams,
    softmax,
    training,
)
from adam_transforms._demo.findings import about_each, in_equal_time
from adam_transforms._demo.optimizers import DEFAULT, OPTIMIZERS
from adam_transforms._demo.options import parse_options
from adam_transforms._demo.problem import Problem
from adam_transforms._demo.progress import show_progress
from adam_transforms._demo.report import NOTEBOOK, README_SECTION, TWO_LINES
from adam_transforms._demo.training import Result, train

MAX_FILES = 60


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.build_corpus(max_files=MAX_FILES)


# The corpus


def test_words_are_those_of_comments_docstrings_and_identifiers():
    source = '''
def total(items, start=0x1F):  # the "sum" of it's items
    """Adds up."""
    name = "not this" + r'nor # this' + """nor
    these 'words'"""
    return start + 1e5 + sum(items)
'''
    assert corpus.read_words(source) == (
        "total items start the sum of it s items Adds up name start sum items".split()
    )


@pytest.mark.parametrize("source", ["", "\x00\ufffd", '"""never closed', "'", "def f(:", "\\"])
def test_any_text_is_read(source):
    corpus.read_words(source)


def test_corpus_is_deterministic(text):
    again = corpus.build_corpus(max_files=MAX_FILES)
    assert again.words == text.words
    for name in ("counts", "train", "held_out"):
        np.testing.assert_array_equal(getattr(again, name), getattr(text, name))


def test_counts_fall_like_zipf(text):
    assert (np.diff(text.counts) <= 0).all()
    ranks = np.arange(1, 1001)
    slope, _ = np.polyfit(np.log(ranks), np.log(text.counts[:1000]), 1)
    assert -1.3 < slope < -0.7


def test_counts_are_those_of_the_training_stream(text):
    stream = text.train[text.positions(text.train)]
    np.testing.assert_array_equal(np.bincount(stream, minlength=len(text.words)), text.counts)


def test_held_out_files_leave_no_trace_in_training(tmp_path):
    names = [f"module_{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"only_{name[:-3]} = only_{name[:-3]}\n")
    built = corpus.build_corpus(tmp_path)
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert 0 < len(held_out) < len(names) / 3
    rare = built.words.index(corpus.RARE)
    assert (built.held_out[built.positions(built.held_out)] == rare).all()
    seen = {built.words[i] for i in built.train[built.positions(built.train)]}
    assert seen == {f"only_{name[:-3]}" for name in names if name not in held_out}


def test_no_context_reaches_into_another_file(text):
    starts = np.flatnonzero(np.diff((text.train == text.pad).astype(int)) == -1)
    for start in starts:
        assert (text.train[start + 1 - CONTEXT : start + 1] == text.pad).all()


def test_undecodable_files_are_read(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_bytes(b"# caf\xe9 \xff\xfe name\nname = name\n")
    assert "name" in corpus.build_corpus(tmp_path).words


@pytest.mark.parametrize("root", ["empty", "missing", "python311.zip"])
def test_missing_library_is_a_clear_error(root, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "python311.zip").write_bytes(b"PK")
    with pytest.raises(DemoError, match="standard library"):
        corpus.build_corpus(tmp_path / root)


# N-grams


def test_rows_of_ngrams_never_change():
    assert [ngrams.row_of(part, 1000) for part in ("<self>", "sel", "é")] == [254, 216, 741]


def test_ngram_rows_are_padded_and_in_range():
    words = ["a", "self", "x" * 30, "a_rather_long_identifier_of_many_parts"]
    table = ngrams.ngram_rows(words, rows=100)
    assert table.shape == (5, ngrams.MAX_NGRAMS) and table.dtype == np.int32
    assert table.min() >= 0 and table.max() < 100
    for line, word in zip(table, words, strict=False):
        number = len(ngrams.ngrams(word))
        assert (line[:number] != ngrams.PADDING).all() and (line[number:] == ngrams.PADDING).all()
    assert (table[-1] == ngrams.PADDING).all()


# The sampled softmax


def test_sampled_softmax_is_full_softmax_when_all_classes_are_sampled():
    batch, classes = 5, 40
    logits = 3 * np.random.default_rng(0).normal(size=(batch, classes)).astype(np.float32)
    targets = np.arange(batch, dtype=np.int32) * 7
    sampled = jax.jit(softmax.sampled_softmax_loss)(
        logits[np.arange(batch), targets],
        logits,
        targets,
        np.arange(classes, dtype=np.int32),
        np.full(classes, 1 / classes, np.float32),
    )
    full = jax.jit(softmax.full_softmax_loss)(logits, targets)
    np.testing.assert_allclose(sampled, full, rtol=1e-5)


def test_sampled_softmax_estimates_the_sum_without_bias():
    classes, samples, trials = 50, 20, 4000
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(size=(1, classes)), jnp.float32)
    target = jnp.array([3])

    @jax.jit
    @jax.vmap
    def loss(negatives):
        probability = softmax.log_uniform_probability(negatives, classes)
        return softmax.sampled_softmax_loss(
            logits[:, 3], logits[:, negatives], target, negatives, probability
        )

    draws = softmax.draw_log_uniform(generator, samples * trials, classes)
    # exp(loss) is the sum over the classes, divided by the target's part of it.
    estimates = np.exp(np.asarray(loss(draws.reshape(trials, samples)), np.float64))
    expected = np.exp(float(softmax.full_softmax_loss(logits, target)[0]))
    error = estimates.std() / np.sqrt(trials)
    assert abs(estimates.mean() - expected) < 4 * error < 0.05 * expected


def test_log_uniform_draws_follow_their_probability():
    classes, samples = 30, 200_000
    draws = softmax.draw_log_uniform(np.random.default_rng(0), samples, classes)
    probability = softmax.log_uniform_probability(jnp.arange(classes), classes)
    np.testing.assert_allclose(probability.sum(), 1.0, rtol=1e-5)
    frequency = np.bincount(draws, minlength=classes) / samples
    np.testing.assert_allclose(frequency, probability, atol=4 * np.sqrt(0.25 / samples))


# One run, of which all tests below look at something


class Run(NamedTuple):
    status: int
    output: str
    results: dict[str, Result]
    turns: list[str]  # the optimizers, in the order of their steps
    figure: Path


NAMES = ("optax", "deferred", "lazy16")
STEPS, WIDTH = 8, 60


def _run_demonstration(folder: Path, names: Sequence[str], steps: int = STEPS) -> Run:
    path, turns, found = folder / "curves.png", [], {}

    def spied(problem, optimizers, learning_rate, steps, observer):
        on_step = observer.on_step
        observer.on_step = lambda name, *values: (turns.append(name), on_step(name, *values))
        found.update(train(problem, optimizers, learning_rate, steps, observer))
        return found

    arguments = f"--rows 1024 --dim 8 --batch 64 --learning-rate 1e-3 --steps {steps}".split()
    arguments += ["--optimizer", *names, "--output", str(path)]
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        contextlib.redirect_stdout(io.StringIO()) as output,
        jax.numpy_dtype_promotion("standard"),  # for Flax and Optax
        jax.numpy_rank_promotion("allow"),
    ):
        monkeypatch.setenv("COLUMNS", str(WIDTH))
        monkeypatch.setattr("adam_transforms._demo.comparison.train", spied)
        monkeypatch.setattr("adam_transforms._demo.held_out.EVALUATED", 256)
        status = main(arguments, max_files=MAX_FILES)
    return Run(status, output.getvalue(), found, turns, path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return _run_demonstration(tmp_path_factory.mktemp("demonstration"), NAMES)


def _check_output(run: Run, names: Sequence[str]) -> None:
    assert run.status == 0
    lines = run.output.splitlines()
    assert all(len(line) <= WIDTH for line in lines if str(run.figure) not in line)
    assert "\r" not in run.output and "\x1b" not in run.output and "nan" not in run.output
    heading = next(i for i, line in enumerate(lines) if "ms/step" in line)
    table = {line.split()[0]: line.split()[1:] for line in lines[heading + 2 :][: len(names)]}
    assert {*table} == {*names}
    for name, (milliseconds, mib, held_out_loss) in table.items():
        result = run.results[name]
        assert milliseconds == f"{result.step_milliseconds:.1f}"
        assert mib == f"{result.state_bytes / 2**20:.1f}"
        assert held_out_loss == f"{result.held_out_loss:.4f}"
    text = " ".join(run.output.split())
    assert all(f"{name} {OPTIMIZERS[name].description}" in text for name in names)
    assert all(" ".join(meaning.split()) in text for meaning in about_each(run.results).values())
    assert f"compiling {', '.join(names)} step 0: held-out loss " in text
    assert text.index("What it means") < text.index("What to do next") < text.index("3. Choose")
    assert run.figure.read_bytes().startswith(b"\x89PNG")
    assert imread(run.figure).shape[2] == 4


def test_a_run_ends_with_a_table_its_meaning_a_figure_and_what_to_do_next(run):
    assert "1,024 rows of 8" in run.output and "(unigram)" in run.output
    _check_output(run, NAMES)


def test_the_optimizers_take_turns_of_one_step_in_varying_order(run):
    turns = [run.turns[i : i + len(NAMES)] for i in range(0, len(run.turns), len(NAMES))]
    assert len(turns) == STEPS
    assert all(sorted(turn) == sorted(NAMES) for turn in turns)
    assert len({*map(tuple, turns)}) > 2


def test_optax_and_deferred_take_the_same_trajectory(run):
    _check_same_trajectory(run.results["optax"], run.results["deferred"])


def _check_same_trajectory(one: Result, other: Result) -> None:
    np.testing.assert_allclose(one.losses, other.losses, atol=1e-5)
    np.testing.assert_allclose(one.held_out_losses, other.held_out_losses, atol=1e-5)
    for p, q in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True):
        np.testing.assert_allclose(p, q, atol=1e-4)


def test_a_small_state_is_smaller(run):
    assert run.results["lazy16"].state_bytes < 0.51 * run.results["optax"].state_bytes


@pytest.mark.slow  # the run above has one of each kind
def test_all_optimizers_run(tmp_path):
    run = _run_demonstration(tmp_path, ["all"])
    _check_output(run, [*OPTIMIZERS])
    _check_same_trajectory(run.results["optax"], run.results["adam"])
    for small, float32 in (("adam8", "adam"), ("lazy8", "lazy")):
        assert run.results[small].state_bytes < 0.27 * run.results[float32].state_bytes


# Training


def test_the_clock_runs_neither_for_batches_nor_for_evaluations(
    text, monkeypatch, relaxed_promotion
):
    problem, now = Problem(text, rows=1024, dim=8, batch=64, seed=0), [0.0]

    def slow(work):
        def worked(*arguments):
            now[0] += 1000.0
            return work(*arguments)

        return worked

    batches = problem.batches
    monkeypatch.setattr(problem, "batches", lambda: map(slow(lambda batch: batch), batches()))
    monkeypatch.setattr(problem.held_out, "loss", slow(problem.held_out.loss))
    monkeypatch.setattr(training, "perf_counter", lambda: now[0])
    result = train(problem, {"optax": OPTIMIZERS["optax"]}, 1e-3, 3)["optax"]
    assert now[0] > 3000 and len(result.held_out_losses) == 4
    assert not result.milliseconds.any() and not result.seconds.any()


@pytest.mark.slow  # the run above starts from there too
def test_training_starts_from_the_unigram_model_and_improves_on_it(text, relaxed_promotion):
    problem = Problem(text, rows=4096, dim=8, batch=512, seed=0)
    unigram = problem.held_out.unigram_loss()
    result = train(problem, {"options": OPTIMIZERS["options"]}, 1e-2, 60)["options"]
    assert result.held_out_losses[0] == pytest.approx(unigram, abs=0.05)
    assert result.held_out_loss < unigram - 0.1


# What is shown during training


def test_bars_say_compiling_until_there_is_a_number():
    console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH)
    with show_progress(console, ["deferred", "lazy8"], 400) as observer:
        before = console.file.getvalue()
        observer.on_step("lazy8", 6.4832, 123.45)
    after = console.file.getvalue().removeprefix(before)
    assert "compiling" in before and "loss" not in before
    assert "loss 6.483  123.5 ms/step" in after and "1/400" in after
    assert "nan" not in before + after
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", after)
    assert all(len(line) <= WIDTH for line in re.split("[\r\n]+", plain))


# What it means, and the figure


def _result(ms=10.0, mib=8, losses=(7.0, 6.0, 5.0), offset=0.0) -> Result:
    """A result of steps that all take as long, evaluated at the start and after each."""
    held_out = np.array(losses, np.float64)
    steps = len(held_out) - 1
    return Result(
        losses=held_out[1:] + offset,
        milliseconds=np.full(steps, ms),
        compile_seconds=1.0,
        state_bytes=mib * 2**20,
        evaluated_after=np.arange(steps + 1),
        held_out_losses=held_out + offset,
        params={},
    )


def test_what_it_means_follows_from_the_numbers():
    results = {
        "optax": _result(),
        "adam": _result(ms=10.5, offset=2e-6),
        "lazy": _result(ms=2.5, offset=0.05),
        "lazy8": _result(ms=20.0, mib=2, offset=-0.1),
    }
    assert about_each(results) == {
        "adam": "Steps take as long as with optax, to a tenth."
        " Every training loss is within 2.0e-06 nats of optax's.",
        "lazy": "Steps are 4.0 times as fast as with optax."
        " The held-out loss is 0.0500 nats (1%) above optax's.",
        "lazy8": "Steps take 2.0 times as long as with optax."
        " The held-out loss is 0.1000 nats (2%) below optax's."
        " The state is 4.0 times smaller than lazy's."
        " The held-out loss is 0.1500 nats (3%) below lazy's.",
    }
    assert in_equal_time(results) == (
        "In equal time: the 2 steps of lazy take 0.005 s and reach a held-out loss of 5.050."
        " After 0.005 s optax is at about 6.500; its 2 steps take 0.02 s."
    )


def test_what_is_not_faster_is_not_called_so():
    results = {"optax": _result(), "lazy": _result(ms=30.0)}
    assert about_each(results)["lazy"].startswith("Steps take 3.0 times as long as with optax.")
    assert in_equal_time(results) is None


def test_without_another_to_compare_with_nothing_is_claimed():
    for names in (["optax"], ["lazy8"], ["lazy", "deferred"]):
        results = {name: _result() for name in names}
        assert about_each(results) == {} and in_equal_time(results) is None


def test_a_training_that_diverges_is_described_and_drawn(tmp_path):
    results = {"optax": _result(), "lazy": _result(ms=1.0, losses=(7.0, np.nan, np.inf))}
    assert "not finite" in about_each(results)["lazy"] and in_equal_time(results) is None
    figure.save(figure.draw(results), tmp_path / "curves.png")


def test_curves_that_coincide_share_a_label_and_others_do_not():
    results = {
        "optax": _result(),
        "adam": _result(ms=15.0, offset=1e-6),
        "lazy": _result(ms=5.0, offset=0.1),
        "lazy8": _result(ms=5.0, offset=0.101),
    }
    over_steps, over_seconds = figure.draw(results).axes
    assert _labels(over_steps) == [
        "optax = adam (curves coincide): 5.000",
        "lazy = lazy8 (curves coincide): 5.100",
    ]
    assert _labels(over_seconds) == [
        "optax: 0.02 s",
        "adam: 0.03 s",
        "lazy = lazy8 (curves coincide): 0.01 s",
    ]


def _legend(axes) -> Any:
    return axes.get_legend()


def _labels(axes) -> list[str]:
    return [text.get_text() for text in _legend(axes).get_texts()]


def test_no_legend_hides_a_curve_or_is_cut_off():
    drawn = figure.draw({name: _result(ms=i + 1.0) for i, name in enumerate(OPTIMIZERS)})
    drawn.savefig(io.BytesIO())  # lays the figure out
    panels = [axes.get_window_extent() for axes in drawn.axes]
    legends = [_legend(axes).get_window_extent() for axes in drawn.axes]
    for legend in legends:
        assert not any(legend.overlaps(panel) for panel in panels)
        assert drawn.bbox.containsx(legend.x0) and drawn.bbox.containsx(legend.x1)
        assert drawn.bbox.containsy(legend.y0) and drawn.bbox.containsy(legend.y1)
    assert not legends[0].overlaps(legends[1])


def test_the_two_lines_to_change_make_a_table_lazy():
    def step(params, batch):
        names: dict[str, Any] = {"at": adam_transforms, "params": params, "batch": batch}
        names["loss_fn"] = lambda params, ids: (params["my_table"][ids] + params["bias"]).sum()
        exec(TWO_LINES, names)
        updates, _ = names["tx"].update(names["grads"], names["tx"].init(params), params)
        return updates

    params = {"my_table": jnp.ones((5, 2)), "bias": jnp.ones((1, 2))}
    updates = jax.eval_shape(step, params, jnp.array([1, 3]))
    assert isinstance(updates["my_table"], adam_transforms.SparseRows)


def test_the_notebook_and_the_section_to_read_exist():
    root = Path(__file__).parents[1]
    assert (root / NOTEBOOK).exists()
    assert f"\n## {README_SECTION}\n" in (root / "README.md").read_text()


# The command line


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], DEFAULT),
        (["--optimizer", "lazy8"], ("lazy8",)),
        (["--optimizer", "adam8", "adam", "adam8"], ("adam", "adam8")),
        (["--optimizer", "all"], tuple(OPTIMIZERS)),
    ],
)
@pytest.mark.every_case
def test_optimizers_are_chosen_by_name(arguments, names, tmp_path):
    options = parse_options([*arguments, "--output", str(tmp_path / "curves.png")])
    assert options.optimizers == names


BAD_VALUES = [
    "--rows -1", "--rows 1", "--rows 1.5", "--rows x", "--rows", "--rows 3000000000",
    "--rows 2000000000 --dim 60000", "--dim 0", "--steps 0", "--steps -3", "--batch 0",
    "--seed -1", "--seed 1e3", "--learning-rate 0", "--learning-rate -1", "--learning-rate nan",
    "--learning-rate inf", "--learning-rate fast", "--optimizer sgd", "--output curves.pdf",
    "--output no/such/folder/a.png", "--output", "--unknown 3", "stray", "--row 5",
]  # fmt: skip


@pytest.mark.parametrize("arguments", [*map(str.split, BAD_VALUES), ["--seed", "1\n2"], ["a\nb"]])
def test_a_bad_value_is_one_line_and_status_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    out, err = capsys.readouterr()
    assert raised.value.code == 2
    assert out == ""
    assert err.startswith("adam_transforms: error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_checking_the_output_leaves_nothing_behind_and_nothing_changed(tmp_path):
    path = tmp_path / "curves.png"
    assert parse_options(["--output", str(path)]).output == path
    assert not path.exists()
    path.write_bytes(b"before")
    parse_options(["--output", str(path)])
    assert path.read_bytes() == b"before"


def test_help_names_every_option_and_optimizer(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    names = "optimizer rows dim steps batch learning-rate seed output".split()
    assert all(f"--{name}" in out for name in names)
    assert all(name in out for name in OPTIMIZERS)


def _run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=root)


def test_a_missing_package_is_one_line_that_says_what_to_install():
    packages = ["rich", "matplotlib", "flax"]  # in the order in which they are imported
    done = _run_python(
        "-c",
        "import sys\n"
        "from adam_transforms.__main__ import main\n"
        f"for package in {packages}:\n"
        "    sys.modules[package] = None\n"
        "    assert main([], max_files=1) == 1\n"
        "    del sys.modules[package]\n",
    )
    assert done.returncode == 0 and done.stdout == ""
    lines = done.stderr.splitlines()
    for line, package in zip(lines, packages, strict=True):
        assert package in line and "pip install 'adam_transforms[demo]'" in line


# A signal reaches a process only where its parent does not ignore it, as a shell in the background
# does for its own.
_INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@pytest.mark.parametrize(
    "sign",
    [
        "jax._src",  # the imports of the package
        pytest.param("flax.", marks=pytest.mark.slow),  # those of the demonstration
        pytest.param("compiling", marks=pytest.mark.slow),
        pytest.param("step 0:", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_quietly_at_any_moment(sign, tmp_path):
    program = "-X importtime -m adam_transforms --optimizer lazy --rows 1024 --steps 100000".split()
    with subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTIBLE, *program, "--output", str(tmp_path / "curves.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).parents[1],
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(sign in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        rest = re.sub("(import time|step).*\n", "", process.stdout.read())
    assert process.returncode == 130
    assert rest == "adam_transforms: interrupted\n"


def test_an_interrupt_of_the_function_is_a_status(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("adam_transforms._demo.comparison.build_corpus", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "adam_transforms: interrupted\n"


def test_only_the_program_itself_takes_over_the_interrupt(monkeypatch):
    def is_program(argv: list[str], original: str) -> bool:
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", original.split())
        return interrupts.is_program("adam_transforms")

    assert is_program(["-m"], "python -m adam_transforms")
    assert is_program(["-m", "--rows", "3"], "python -B -X dev -m adam_transforms --rows 3")
    assert is_program(["-m"], "python -madam_transforms")
    assert not is_program(["-m"], "python -m my_adam_transforms")
    assert not is_program(["-m", "adam_transforms"], "python -m train adam_transforms")
    assert not is_program(["train.py"], "python train.py")
    assert not is_program([], "python")


def test_the_package_runs_as_a_program():
    done = _run_python("-m", "adam_transforms", "--steps", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("adam_transforms: error: argument --steps: expected an integer")
