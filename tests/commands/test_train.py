"""megamoe train: the words that its ranks get, and from a text to samples. Its signals and exit codes are in
tests/launch/test_local.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import DEADLINE
from refusals import has
from toy import PRESET, ds_config

from megamoe import __main__ as program
from megamoe.commands import train as command
from megamoe.commands.train import Train, prepare_text
from megamoe.monitoring.log_files import read_events

TEXT = "The quick brown fox jumps over the lazy dog, and it sleeps on. " * 600


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps(ds_config(2)))
    Path("preset.json").write_text(json.dumps({**PRESET, "vocab_size": 300, "max_position_embeddings": 256}))
    Path("my text.txt").write_text(TEXT)
    return tmp_path


def test_a_text_becomes_samples_of_a_model_and_its_losses(folder):
    words = ["--text", "my text.txt", "--preset", "preset.json", "--ds_config", "ds.json", "--steps=4", "--ranks=1"]
    root = Path(program.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", "train", *words], capture_output=True, text=True, timeout=DEADLINE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("my_text-2")
    has(done.stdout, "[sample 5] prompt:", "validation at step 4:", f"checkpoints: {run}/checkpoints")
    assert "DeepSpeed" not in done.stdout + done.stderr
    assert "accelerator" not in done.stdout + done.stderr
    assert 'data/my_text-300"' in (run / "run.json").read_text()


def test_a_dry_run_of_a_text_keeps_its_tokens_alone_and_prints_no_samples(folder, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(command, "run_ranks", lambda words, ranks: given.append(words) or 0)
    words = ["--preset", "preset.json", "--ds_config=ds.json", "--dry-run", "--text", "my text.txt"]
    monkeypatch.setattr(sys, "argv", ["megamoe", "train", *words])
    with pytest.raises(SystemExit, match="0"):
        program.main()
    assert "--dry-run" in given[0]
    has(capsys.readouterr().out, "data/my_text-300 stays", "without --dry_run")
    assert {path.name for path in folder.iterdir()} == {"ds.json", "preset.json", "my text.txt", "data"}


def test_a_text_is_prepared_once_and_in_another_folder_when_it_or_its_place_has_changed(folder):
    def prepared(text):
        return prepare_text(text, "preset.json")

    text, other = Path("my text.txt"), Path("other/my text.txt")
    first = prepared(text)
    assert first == Path("data/my_text-300")
    made = (first / "corpus.json").stat().st_mtime_ns
    assert prepared(text) == first
    assert (first / "corpus.json").stat().st_mtime_ns == made
    text.write_text(TEXT * 2)
    other.parent.mkdir()
    other.write_text(TEXT * 2)
    tokens = [(one / "train-00000.bin").stat().st_size for one in (first, prepared(text), prepared(other))]
    assert tokens[0] < tokens[1] == tokens[2]
    assert len(list(Path("data").iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "of_ranks", "number"),
    [
        ("--ranks 3 --data a --verbose", "--data a --verbose", 3),
        ("--steps=5 --ranks=1 --data a b=2 --time_limit 1:00:00", "--steps=5 --data a b=2 --time_limit 1:00:00", 1),
        (
            "--text my.txt --steps 5 --ranks 2",
            "--steps 5 --preset tiny-plus --data data/my --run_dir runs/my-now --eval_interval 100 "
            "--sample_interval 100 --auto_resume",
            2,
        ),
        (
            "--ranks 2 --run_dir r --text=my.txt --preset tiny --eval_interval 0",
            "--run_dir r --preset tiny --eval_interval 0 --data data/my --sample_interval 0 --auto_resume",
            2,
        ),
    ],
)
def test_ranks_get_the_words_but_for_those_of_train_alone_and_with_what_a_text_implies(
    words, of_ranks, number, monkeypatch, capsys
):
    given = []
    monkeypatch.setattr(command, "run_ranks", lambda *call: given.append(call) or 75)
    monkeypatch.setattr(command, "prepare_text", lambda text, preset: f"data/{text.stem}")
    monkeypatch.setattr("time.strftime", lambda form: "now")
    monkeypatch.setattr(sys, "argv", ["megamoe", "train", *words.split()])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 75
    (((rank, *rest), ranks, _),) = given
    assert (Path(rank).name, rest, ranks) == ("pretrain.py", of_ranks.split(), number)
    own = " --run_dir runs/my-now" if "runs/my-now" in of_ranks else ""
    assert capsys.readouterr().err == (f"to continue: megamoe train {words}{own}\n" if "--text" in words else "")


KILLED = """
import os, sys, time
from pathlib import Path
from megamoe.monitoring.log_files import write_event
if os.environ["RANK"] == "0":
    write_event(Path(sys.argv[1]), "start", 3, {})
os.kill(os.getpid(), 9)
"""


def test_the_death_of_all_ranks_at_once_is_recorded_and_sent_by_the_process_that_has_started_them(tmp_path):
    run, alert = tmp_path / "run", tmp_path / "alert"
    run.mkdir()
    options = Train(on_event=[f"tee '{alert}'"])
    assert command.run(["-c", KILLED, str(run)], 2, options, run) == 137
    assert [one["event"] for one in read_events(run)] == ["start", "death"]
    death = read_events(run)[-1]
    assert (death["step"], death["code"], death["reason"]) == (3, 137, "the ranks exited with code 137")
    sent = json.loads(alert.read_text())
    assert {**sent, **death, "time": sent["time"]} == sent
    assert sent["text"].startswith(f"{run} on {sent['host']}: death, step 3: the ranks exited")


def test_without_text_or_data_train_says_how_to_give_them(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megamoe", "train", "--preset", "tiny"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    has(capsys.readouterr().err, "error: there is nothing to train on;", "--text", "--data")
