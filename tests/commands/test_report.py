"""What runs have done, as tables and pictures."""

import itertools
import json
import re

import pytest
from refusals import has

from megamoe.commands import report


def train_row(step):
    return {
        "kind": "train",
        "step": step,
        "loss": 10 - step / 100,
        "lr": step * 1.5e-6,
        "tokens_per_second": 5000.4,
        "mfu": 0.4,
        "max_vio": 0.9,
        "running_max_vio": 0.456,
        "worst_running_max_vio": 0.7,
        "grad_norm": 1.0,
        "memory_gib": 2.0,
        "skipped_steps": 0,
    }


def valid_row(step):
    return {"kind": "valid", "step": step, "loss": 7.77777, "tokens": 4096, "bits_per_byte": 2.22222}


def write_log(folder, *rows):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(*steps, valid=()):
    log = {"train": [train_row(step) for step in steps], "valid": [valid_row(step) for step in valid]}
    head, *rows = report.loss_table(log).splitlines()
    assert head.split() == ["step", "loss", "valid", "bits/byte", "lr", "MaxVio", "tok/s"]
    return [row.split() for row in rows]


def test_the_loss_table_shows_every_number_of_a_row():
    plain, with_valid = table(10, 20, valid=[20])
    assert plain == ["10", "9.9000", "1.5e-05", "0.46", "5000"]
    assert with_valid == ["20", "9.8000", "7.7778", "2.2222", "3e-05", "0.46", "5000"]


def test_the_loss_table_is_short_even_and_has_the_last_step():
    for count in (1, 2, 15, 16, 17, 31, 32, 33, 100, 1001):
        steps = [int(row[0]) for row in table(*range(10, 10 * count + 1, 10))]
        assert steps[-1] == 10 * count
        assert min(count, 9) <= len(steps) <= 16
        assert len({after - before for before, after in itertools.pairwise(steps)}) <= 1


def test_the_loss_table_shows_evaluations_between_its_lines():
    rows = table(*range(10, 1001, 10), valid=range(50, 1001, 50))
    assert [int(row[0]) for row in rows if len(row) == 7] == [100, 250, 400, 550, 700, 850, 1000]
    assert len(rows) <= 16
    assert len(table(*range(10, 161, 10), valid=[160])) == 16


def is_png(path):
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"


def test_the_report_draws_a_png_and_says_the_result_and_where_things_lie(tmp_path, run):
    write_log(tmp_path, *(train_row(step) for step in range(10, 310, 10)), valid_row(150), valid_row(300))
    code, said = run(report, tmp_path)
    assert (code, said.err) == (0, "")
    assert is_png(tmp_path / "loss_lr.png")
    assert "validation at step 300: 7.7778 nats per token, 2.2222 bits per byte" in said.out
    for place in ("checkpoints", "loss_lr.png", "log.jsonl", "tensorboard", "run.json"):
        assert str(tmp_path / place) in said.out


def test_a_folder_without_a_log_or_without_a_step_is_refused(tmp_path, run):
    code, said = run(report, tmp_path)
    assert code == 2
    assert said.err == f"error: {tmp_path} holds no log.jsonl; give the folder of a run.\n"
    write_log(tmp_path)
    code, said = run(report, tmp_path)
    assert code == 2
    has(said.err, "error: ", str(tmp_path), "no step yet", "wait")
    assert not (tmp_path / "loss_lr.png").exists()


def test_values_of_averaged_weights_are_called_so():
    row = {**valid_row(20), "code_loss": 3.0, "ema_loss": 6.0, "ema_bits_per_byte": 2.0, "ema_code_loss": 2.5}
    assert list(report.results([row])) == [
        "validation at step 20: 7.7778 nats per token, 2.2222 bits per byte",
        "validation on code at step 20: 3.0000 nats per token",
        "validation with averaged weights at step 20: 6.0000 nats per token, 2.0000 bits per byte",
        "validation on code with averaged weights at step 20: 2.5000 nats per token",
    ]


def test_further_sets_and_tasks_have_columns_curves_and_last_values(tmp_path, monkeypatch, run):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    further = {"code_loss": 1.25, "code_bits_per_byte": 0.5, "arc_acc": 0.75}
    tasks_alone = {"kind": "valid", "step": 30, "arc_acc": 0.875}
    write_log(tmp_path, *(train_row(step) for step in (10, 20, 30)), {**valid_row(20), **further}, tasks_alone)
    code, said = run(report, tmp_path)
    assert (code, said.err) == (0, "")
    head, first, second, *_ = said.out.splitlines()
    assert head.split() == ["step", "loss", "valid", "bits/byte", "code", "lr", "MaxVio", "tok/s"]
    assert first.split() == ["10", "9.9000", "1.5e-05", "0.46", "5000"]
    assert second.split() == ["20", "9.8000", "7.7778", "2.2222", "1.2500", "3e-05", "0.46", "5000"]
    assert "validation at step 20: 7.7778 nats per token, 2.2222 bits per byte\n" in said.out
    assert "validation on code at step 20: 1.2500 nats per token, 0.5000 bits per byte\n" in said.out
    assert "arc_acc at step 30: 0.8750\n" in said.out
    loss, _, _, tasks = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ["training", "held out", "held out on code"]
    assert [((*line.get_xdata(),), (*line.get_ydata(),)) for line in tasks.lines] == [((20, 30), (0.75, 0.875))]


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """Of 128 and of 512 tokens per step; the second has no evaluation."""
    monkeypatch.chdir(tmp_path)
    for name, samples in (("small", 4), ("large", 16)):
        (tmp_path / name).mkdir()
        record = {"parameters": 1000 * samples, "seq_len": 32, "samples_per_step": samples}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    slow = {**train_row(20), "tokens_per_second": 1000.0}
    write_log(tmp_path / "small", train_row(10), slow, train_row(30), valid_row(20))
    write_log(tmp_path / "large", {**train_row(10), "running_max_vio": 0.111})
    return ["small", "large"]


def test_several_runs_have_a_line_each_and_one_picture(two_runs, tmp_path, run):
    code, said = run(report, *two_runs)
    assert (code, said.err) == (0, "")
    head, small, large, plot = said.out.splitlines()
    assert head.split() == ["run", "parameters", "tokens", "valid", "bits/byte", "MaxVio", "tok/s"]
    assert small.split() == ["small", "4,000", "3,840", "7.7778", "2.2222", "0.46", "5,000"]
    assert large.split() == ["large", "16,000", "5,120", "0.11", "5,000"]
    assert plot == "plot: comparison.png"
    assert is_png(tmp_path / "comparison.png")
    assert not (tmp_path / "small" / "loss_lr.png").exists()


def test_losses_and_balance_of_several_runs_are_drawn_over_tokens(two_runs, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    report.draw_comparison([report.read_sized_run(tmp_path / name) for name in two_runs], tmp_path / "out.png")
    loss, balance = figures[0].axes
    lines = [[(*line.get_xdata(),) for line in axes.lines] for axes in (loss, balance)]
    small, large = (1280, 2560, 3840), (5120,)
    assert lines == [[small, (2560,), large, ()], [small, large]]
    assert [line.get_ydata()[-1] for line in balance.lines] == [0.456, 0.111]


def test_tokens_of_a_run_with_batch_size_warmup_are_those_of_its_stages_as_last_resumed(two_runs, tmp_path):
    record = json.loads((tmp_path / "small" / "run.json").read_text())
    ramp = [{"samples": 1, "last_step": 12}, {"samples": 2, "last_step": 20}]
    (tmp_path / "small" / "resumes.jsonl").write_text(json.dumps({**record, "run": {"batch_ramp": ramp}}) + "\n")
    run = report.read_sized_run(tmp_path / "small")
    assert run.tokens(run.log["train"]) == [10 * 32, (12 + 8 * 2) * 32, (12 + 8 * 2 + 10 * 4) * 32]


def test_the_picture_goes_where_out_says(two_runs, tmp_path, run):
    for words in (two_runs, ["small"]):
        code, said = run(report, *words, "--out", "a picture.png")
        assert code == 0
        assert re.search(r"plot: a picture\.png$", said.out, re.MULTILINE)
        assert is_png(tmp_path / "a picture.png")
        (tmp_path / "a picture.png").unlink()
    code, said = run(report, "small", "--out", "picture.jpg")
    assert (code, said.out) == (2, "")
    has(said.err, "--out is picture.jpg", ".png")


def test_all_runs_that_cannot_be_compared_are_named_and_nothing_is_drawn(two_runs, tmp_path, run):
    (tmp_path / "large" / "run.json").unlink()
    (tmp_path / "empty").mkdir()
    code, said = run(report, *two_runs, "empty")
    assert (code, said.out) == (2, "")
    large, empty = said.err.splitlines()
    has(large, "large/run.json", "bring the file back")
    has(empty, "empty holds no log.jsonl")
    assert not (tmp_path / "comparison.png").exists()


# --- a reference ---


def test_the_training_loss_is_compared_with_a_reference_at_the_steps_that_both_have(tmp_path, run):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_log(run_dir, *(train_row(step) for step in (10, 20, 30)))
    curve = tmp_path / "curve.tsv"
    curve.write_text("step\tavg_loss\tlr\n10\t9.95\t1e-5\n20\t9.7\t2e-5\n30\t9.8\t3e-5\n\n1000\t1.0\t4e-5\n\n")
    plain, with_curve = tmp_path / "plain.png", tmp_path / "curve.png"
    code, printed = run(report, run_dir, "--reference", curve, "--out", with_curve)
    assert code == 0
    assert "training loss below the reference at 2 of the 3 steps that both have, not at 20" in printed.out
    run(report, run_dir, "--out", plain)
    assert is_png(with_curve)
    assert with_curve.read_bytes() != plain.read_bytes()


def test_a_reference_that_is_no_table_or_is_given_with_several_runs_is_refused(tmp_path, run):
    write_log(tmp_path, train_row(10))
    curve = tmp_path / "curve.tsv"
    no_tables = ("", "step\tloss\n", "step\tloss\nten\t3\n", "step\n10\n", "step\tloss\n10\tnan\n")
    for text in (None, *no_tables):
        if text is not None:
            curve.write_text(text)
        code, printed = run(report, tmp_path, "--reference", curve)
        assert code == 2
        has(printed.err, str(curve), "step")
    assert not (tmp_path / "loss_lr.png").exists()
    code, printed = run(report, tmp_path, tmp_path, "--reference", tmp_path / "curve.tsv")
    assert code == 2
    has(printed.err, "--reference", "2 runs")
