"""Runs compared with each other, and with a curve."""

import json

import compare_runs


def write_run(folder, samples, *steps):
    folder.mkdir()
    record = {"parameters": 1000 * samples, "seq_len": 32, "samples_per_step": samples}
    (folder / "run.json").write_text(json.dumps(record))
    rows = [{"kind": "train", "step": step, "loss": 10 - step / 100, "running_max_vio": 0.5, "tokens_per_second": 100.0}
            for step in steps]  # fmt: skip
    rows += [{"kind": "valid", "step": steps[-1], "loss": 7.5, "bits_per_byte": 2.25}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_have_a_line_each_and_losses_over_tokens(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    folders = write_run(tmp_path / "small", 4, 10, 20, 30), write_run(tmp_path / "large", 16, 10)
    runs = [compare_runs.read_sized_run(folder) for folder in folders]
    lines = [line.split()[1:] for line in compare_runs.comparison_table(runs).splitlines()[1:]]
    assert lines == [
        ["4,000", "3,840", "7.5000", "2.2500", "0.50", "100"],
        ["16,000", "5,120", "7.5000", "2.2500", "0.50", "100"],
    ]
    compare_runs.draw_comparison(runs, tmp_path / "out.png")
    drawn = [[(*line.get_xdata(),) for line in axes.lines] for axes in figures[0].axes]
    small, large = (1280, 2560, 3840), (5120,)
    assert drawn == [[small, (3840,), large, (5120,)], [small, large]]


def test_tokens_of_a_run_with_batch_size_warmup_are_those_of_its_stages_as_last_resumed(tmp_path):
    folder = write_run(tmp_path / "run", 4, 10, 20, 30)
    record = json.loads((folder / "run.json").read_text())
    stages = [{"samples": 1, "last_step": 12}, {"samples": 2, "last_step": 20}]
    (folder / "resumes.jsonl").write_text(json.dumps({**record, "run": {"batch_ramp": stages}}) + "\n")
    run = compare_runs.read_sized_run(folder)
    assert run.tokens(run.log["train"]) == [10 * 32, (12 + 8 * 2) * 32, (12 + 8 * 2 + 10 * 4) * 32]


def test_a_run_is_compared_with_a_curve_at_the_steps_that_both_have(tmp_path):
    curve = tmp_path / "curve.tsv"
    curve.write_text("step\tavg_loss\tlr\n10\t9.95\t1e-5\n20\t9.7\t2e-5\n30\t9.8\t3e-5\n\n1000\t1.0\t4e-5\n\n")
    train = [{"step": step, "loss": 10 - step / 100} for step in (10, 20, 30)]
    said = compare_runs.against_reference(train, compare_runs.read_reference(curve))
    assert said == "training loss below the reference at 2 of the 3 steps that both have, not at 20"
