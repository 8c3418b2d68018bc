"""What runs have done, as tables and pictures."""

import itertools
import json
import re

import pytest
from refusals import has, refusal, refusals

from megamoe.commands import report
from megamoe.monitoring.evaluations import results


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, in the place of files."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


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
    (folder / "run.json").write_text("{}")
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
    assert is_png(tmp_path / "report.png")
    assert "](report.png)" in (tmp_path / "report.md").read_text()
    assert "validation at step 300: 7.7778 nats per token, 2.2222 bits per byte" in out
    for place in ("checkpoints", "report.md", "report.png", "log.jsonl", "tensorboard", "run.json"):
        assert str(tmp_path / place) in out
    run("report", tmp_path, "--out", tmp_path / "a folder")
    run("report", tmp_path, "--out", tmp_path / "docs" / "an a.md")
    for picture in (tmp_path / "a folder" / "report.png", tmp_path / "docs" / "an a.png"):
        assert picture.read_bytes() == (tmp_path / "report.png").read_bytes()
    assert "](an%20a.png)" in (tmp_path / "docs" / "an a.md").read_text()
    _, out, _ = run("report", tmp_path, tmp_path, "--out", tmp_path / "docs")
    assert out.count(f"| {tmp_path} |") == 2


def test_a_folder_without_a_log_or_without_a_step_is_refused(tmp_path, call):
    has(refusal(call, "report", tmp_path), f"{tmp_path} holds no run; give a run folder, which has a run.json.")
    write_log(tmp_path)
    has(refusal(call, "report", tmp_path), str(tmp_path), "no logged step yet", "wait")
    assert len(refusals(call, "report", tmp_path, tmp_path / "none")) == 2
    assert not (tmp_path / "report.png").exists()
    write_log(tmp_path, train_row(10))
    has(refusal(call, "report", tmp_path, "--out", tmp_path / "log.jsonl" / "x.md"), "cannot be written", "--out")


def test_values_of_averaged_weights_are_called_so():
    row = {**valid_row(20), "code_loss": 3.0, "ema_loss": 6.0, "ema_bits_per_byte": 2.0, "ema_code_loss": 2.5}
    assert list(results([row])) == [
        "validation at step 20: 7.7778 nats per token, 2.2222 bits per byte",
        "validation on code at step 20: 3.0000 nats per token",
        "validation with averaged weights at step 20: 6.0000 nats per token, 2.0000 bits per byte",
        "validation on code with averaged weights at step 20: 2.5000 nats per token",
    ]


def test_further_sets_and_tasks_have_columns_curves_and_last_values(tmp_path, figures, run):
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
    loss, _, _, _, tasks = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ["training", "held out", "held out on code"]
    assert [((*line.get_xdata(),), (*line.get_ydata(),)) for line in tasks.lines] == [((20, 30), (0.75, 0.875))]


def write_run(folder, rows, events=(), **changes):
    folder.mkdir()
    write_log(folder, *rows)
    lines = [{"time": 0, "event": event, "step": step, "reason": "a|b"} for event, step in events]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"preset": "tiny", "parameters": 1234, "world_size": 2, "ep_size": 1, "versions": {"torch": "2.13"}}
    record |= {"command": ["rank", "--preset", "a b", "--local_rank=1"], "run": {"seed": 1, "run_dir": str(folder)}}
    (folder / "run.json").write_text(json.dumps({**record, "deepspeed": {"optimizer": {"lr": 0.5}}, **changes}))


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_page_of_a_run_has_its_restarts_its_last_samples_and_its_exact_command(tmp_path, run):
    texts = [{"prompt": "To be", "continuation": "\n```\nor | not"}]
    samples = [{"kind": "samples", "step": step, "samples": texts} for step in (10, 20)]
    events = [("start", 0), ("save", 10), ("resume", 10), ("death", 12)]
    write_run(tmp_path / "one", [train_row(10), samples[0], train_row(20), valid_row(20), samples[1]], events)
    run("report", tmp_path / "one")
    page = (tmp_path / "one" / "report.md").read_text()
    tables = [cells(line) for line in page.splitlines() if line.startswith("|") and "--" not in line]
    assert tables[1] == ["one", "1,234", "20", "", "9.8000", "7.7778", "2.2222", "0.46", "5,000"]
    assert [[*row[:2], row[3]] for row in tables[3:]] == [
        [*one, r"reason a\|b"] for one in (("resume", "10"), ("death", "12"))
    ]
    assert page.count("Samples after step") == 1
    assert "Samples after step 20:\n\n````\nTo be\n```\nor | not\n````\n" in page
    assert "\nmegamoe train --ranks 2 --preset 'a b'\n" in page
    assert "torch 2.13" in page


def test_several_runs_are_compared_over_their_tokens_by_what_differs(tmp_path, figures, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size, lr in (("a", 100, 0.5), ("b", 300, 0.25)):
        rows = [{**train_row(step), "total_tokens": step * size} for step in (10, 20)]
        deepspeed = {"optimizer": {"lr": lr, "eps": 1e-8}, "comet": {"api_key": f"of {name}"}}
        write_run(tmp_path / name, [*rows, valid_row(15)], deepspeed=deepspeed)
    _, out, _ = run("report", "a", "b")
    page = (tmp_path / "report.md").read_text()
    rows = {cells(line)[0]: cells(line)[1:] for line in page.splitlines() if line.startswith("|")}
    assert [rows["a"][2], rows["b"][2]] == ["2,000", "6,000"]
    assert [row for name, row in rows.items() if "." in name] == [["0.5", "0.25"]]
    assert all(line in page for line in out.splitlines()[:4])
    lines = [line for line in figures[0].axes[0].lines if line.get_label() in ("a", "b")]
    assert [(line.get_label(), (*line.get_xdata(),), (*line.get_ydata(),)) for line in lines] == [
        ("a", (1500,), (7.77777,)), ("b", (4500,), (7.77777,))
    ]  # fmt: skip


def test_the_balance_of_each_layer_and_the_restarts_are_drawn(tmp_path, figures, run):
    by_block = ({"1": 0.5, "2": 0.1}, {"1": 0.25, "2": 0.0})
    rows = [{**train_row(step), "running_max_vio_by_block": one} for step, one in zip((10, 20), by_block, strict=True)]
    write_run(tmp_path / "one", rows, [("rollback", 12)])
    run("report", tmp_path / "one")
    loss, layers, *_ = figures[0].axes
    assert layers.collections[0].get_array().tolist() == [[0.5, 0.25], [0.1, 0.0]]
    (mark,) = [one for one in loss.collections if one.get_label() == "rollback"]
    assert [segment[0][0] for segment in mark.get_segments()] == [12]
