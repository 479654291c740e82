"""The demonstration: its corpus, hashing and losses, its command line, and one tiny run."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from adam_transforms.__main__ import main
from adam_transforms._demo import CONTEXT, DemoError, corpus, ngrams, softmax
from adam_transforms._demo.optimizers import OPTIMIZERS
from adam_transforms._demo.options import parse_options
from adam_transforms._demo.training import Problem, largest_difference, train

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
    logits = 3 * jax.random.normal(jax.random.key(0), (batch, classes))
    targets = jnp.arange(batch) * 7
    sampled = softmax.sampled_softmax_loss(
        jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0],
        logits,
        targets,
        jnp.arange(classes),
        jnp.full(classes, 1 / classes),
    )
    np.testing.assert_allclose(sampled, softmax.full_softmax_loss(logits, targets), rtol=1e-5)


def test_sampled_softmax_estimates_the_sum_without_bias():
    classes, samples, trials = 50, 20, 4000
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(size=(1, classes)), jnp.float32)
    target = jnp.array([3])

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


# Training


# The run below trains all optimizers, and test_parity follows Optax's Adam in the first tier.
@pytest.mark.slow
def test_adam_and_optax_take_the_same_trajectory(text, relaxed_promotion):
    problem = Problem(text, rows=1024, dim=8, batch=64, seed=1)
    ours, theirs = (train(problem, OPTIMIZERS[name], 1e-3, 8) for name in ("adam", "optax"))
    np.testing.assert_allclose(ours.losses, theirs.losses, atol=1e-5)
    assert ours.held_out_loss == pytest.approx(theirs.held_out_loss, abs=1e-5)
    assert float(largest_difference(ours.params, theirs.params)) < 1e-4


@pytest.mark.slow  # as the test above
def test_training_starts_from_the_unigram_model_and_improves_on_it(text, relaxed_promotion):
    problem = Problem(text, rows=4096, dim=8, batch=512, seed=0)
    unigram = problem.unigram_loss()
    assert problem.held_out_loss(problem.init_params()) == pytest.approx(unigram, abs=0.05)
    result = train(problem, OPTIMIZERS["options"], 1e-2, 60)
    assert result.held_out_loss < unigram - 0.1


# The command line


def test_a_run_ends_with_a_table_and_a_plot(tmp_path, capsys, monkeypatch, relaxed_promotion):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "curves.png"
    arguments = "--rows 1024 --dim 8 --steps 5 --batch 32 --output".split()
    assert main([*arguments, str(path)], max_files=MAX_FILES) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines if str(path) not in line)
    assert "1,024 rows of 8" in out and "held-out loss" in out and "(unigram)" in out
    first_words = Counter(line.split()[0] for line in lines if line.strip())
    # A line when trained, a line of the table and a line of its legend.
    assert all(first_words[name] == 3 for name in OPTIMIZERS)
    assert "\r" not in out and "\x1b" not in out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert imread(path).shape[2] == 4


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


@pytest.mark.parametrize("package", ["flax", "matplotlib", "rich"])
def test_a_missing_package_is_one_line_that_says_what_to_install(package):
    done = _run_python(
        "-c",
        f"import sys; sys.modules[{package!r}] = None\n"
        "from adam_transforms.__main__ import main; sys.exit(main([]))",
    )
    assert done.returncode == 1 and done.stdout == ""
    assert package in done.stderr and done.stderr.count("\n") == 1
    assert "pip install 'adam_transforms[demo]'" in done.stderr


def test_an_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("adam_transforms._demo.comparison.build_corpus", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "adam_transforms: interrupted\n"


def test_the_package_runs_as_a_program():
    done = _run_python("-m", "adam_transforms", "--steps", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("adam_transforms: error: argument --steps: expected an integer")
