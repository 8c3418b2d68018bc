"""What runs have done, as tables and pictures."""

import itertools
import json

from refusals import has, refusal, refusals

from megamoe.commands import report


def train_row(step):
    return {
        "kind": "train",
        "step": step,
        "loss": 10 - step / 100,
        "lr": step * 1.5e-6,
        "tokens_per_second": 5000.4,
        "max_vio": 0.9,
        "running_max_vio": 0.456,
        "worst_running_max_vio": 0.7,
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
    code, out, problems = run("report", tmp_path)
    assert (code, problems) == (0, [])
    assert is_png(tmp_path / "loss_lr.png")
    assert "validation at step 300: 7.7778 nats per token, 2.2222 bits per byte" in out
    for place in ("checkpoints", "loss_lr.png", "log.jsonl", "tensorboard", "run.json"):
        assert str(tmp_path / place) in out
    run("report", tmp_path, "--out", tmp_path / "a picture")
    assert (tmp_path / "a picture").read_bytes() == (tmp_path / "loss_lr.png").read_bytes()


def test_a_folder_without_a_log_or_without_a_step_is_refused(tmp_path, call):
    has(refusal(call, "report", tmp_path), f"{tmp_path} holds no log.jsonl; give the folder of a run.")
    write_log(tmp_path)
    has(refusal(call, "report", tmp_path), str(tmp_path), "no step yet", "wait")
    assert len(refusals(call, "report", tmp_path, tmp_path / "none", "--out", "x.png")) == 3
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
    code, out, problems = run("report", tmp_path)
    assert (code, problems) == (0, [])
    head, first, second, *_ = out.splitlines()
    assert head.split() == ["step", "loss", "valid", "bits/byte", "code", "lr", "MaxVio", "tok/s"]
    assert first.split() == ["10", "9.9000", "1.5e-05", "0.46", "5000"]
    assert second.split() == ["20", "9.8000", "7.7778", "2.2222", "1.2500", "3e-05", "0.46", "5000"]
    assert "validation at step 20: 7.7778 nats per token, 2.2222 bits per byte\n" in out
    assert "validation on code at step 20: 1.2500 nats per token, 0.5000 bits per byte\n" in out
    assert "arc_acc at step 30: 0.8750\n" in out
    loss, _, _, tasks = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ["training", "held out", "held out on code"]
    assert [((*line.get_xdata(),), (*line.get_ydata(),)) for line in tasks.lines] == [((20, 30), (0.75, 0.875))]
