"""megamoe from Python: what the names of the package do, and the example of its tutorial."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from model_parts import model_of
from ranks import run_alone, run_ranks
from refusals import has, only, refusal, refusals
from toy import PRESET, SHIPPED, ds_config, train_here, write_inputs

import megamoe
from megamoe.checkpoint.opening import find_checkpoint, open_source
from megamoe.config import precision
from megamoe.config.precision import by_rates
from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.export import write_huggingface, write_safetensors, write_state_dict

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs/tutorials/from_python.md"
TEXT = "to be or not to be, that is the question. " * 4


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of a few steps with a tokenizer."""
    folder = tmp_path_factory.mktemp("library")
    inputs = write_inputs(folder, ds_config(2), {"vocab_size": 300})
    train_tokenizer([TEXT], 270).save(str(folder / "corpus" / "tokenizer.json"))
    run_ranks(1, train_here, {**inputs, "steps": 2, "run_dir": str(folder / "run")})
    return folder / "run"


def test_every_name_that_the_package_documents_is_there_and_no_other():
    documented = set(re.findall(r"^    (\w[\w, ]*?)  ", megamoe.__doc__, re.MULTILINE))
    names = {name for line in documented for name in line.split(", ")}
    assert names == set(megamoe.__all__) - {"__version__"} == set(dir(megamoe)) - {"__version__"}
    assert all(getattr(megamoe, name).__doc__ for name in names)
    with pytest.raises(AttributeError, match="load_model"):
        megamoe.load_modle  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, megamoe; megamoe.UserError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_preset_may_be_changed_and_is_checked_again():
    assert megamoe.load_preset("tiny", num_hidden_layers=2).num_hidden_layers == 2
    has(refusal(partial(megamoe.load_preset, "tiny", num_experts_per_tok=9)), "num_experts_per_tok is 9")


def test_a_model_is_loaded_from_every_form_that_it_has(run_dir, tmp_path):
    checkpoint = find_checkpoint(run_dir)
    source, config = open_source(checkpoint), megamoe.load_model(run_dir).config
    write_state_dict(source, tmp_path / "w.pt", torch.float32)
    write_safetensors(source, tmp_path / "w.safetensors", torch.float32, 10**9)
    write_huggingface(source, tmp_path / "hf", torch.float32, 10**9, config, run_dir / "tokenizer.json")
    ids = torch.arange(20).view(2, 10)
    expected = megamoe.load_model(run_dir)(ids)
    for form in (checkpoint, tmp_path / "hf"):
        assert torch.equal(megamoe.load_model(form)(ids), expected)
        assert megamoe.load_tokenizer(form).get_vocab() == megamoe.load_tokenizer(run_dir).get_vocab()
    for file in (tmp_path / "w.pt", tmp_path / "w.safetensors"):
        assert torch.equal(megamoe.load_model(file, config)(ids), expected)
        has(refusal(megamoe.load_tokenizer, file), str(tmp_path / "tokenizer.json"), "does not exist")
        has(refusal(megamoe.load_model, file), str(file), "does not say what model", "preset")
        other = config.model_copy(update={"vocab_size": 400})
        has(refusal(megamoe.load_model, file, other), "embed_tokens.weight has the shape (300, 32), not (400, 32)")
    assert megamoe.load_model(run_dir, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_the_tokenizer_of_a_model_is_that_of_its_folder_or_of_its_run_and_of_no_folder_above(run_dir, tmp_path):
    checkpoint = find_checkpoint(run_dir)
    for path in (run_dir, checkpoint, checkpoint.parent, run_dir / "tokenizer.json"):
        assert megamoe.load_tokenizer(path).get_vocab_size() == 270
    write_huggingface(
        open_source(checkpoint), tmp_path / "a" / "b", torch.float32, 10**9, megamoe.load_model(run_dir).config, None
    )
    shutil.copy(run_dir / "tokenizer.json", tmp_path)
    for path in (tmp_path / "a" / "b", tmp_path / "a"):
        has(refusal(megamoe.load_tokenizer, path), str(path / "tokenizer.json"), "does not exist")
    (tmp_path / "w.pt").write_bytes(b"not a tokenizer")
    assert megamoe.load_tokenizer(tmp_path / "w.pt").get_vocab_size() == 270


def test_every_token_of_a_text_is_predicted_once_behind_end_of_text():
    model = megamoe.build_model(model_of("plain_scores", vocab_size=300), seed=1)
    tokenizer = train_tokenizer([TEXT], 270)
    measured = megamoe.evaluate(model, tokenizer, TEXT, seq_len=7, batch_size=2)
    ids = tokenizer.encode(TEXT).ids
    stream, nats = torch.tensor([0, *ids]), 0.0
    for start in range(0, len(ids), 7):
        window = stream[start : start + 8]
        nats += F.cross_entropy(model(window[None, :-1])[0].double(), window[1:], reduction="sum").item()
    assert measured["tokens"] == len(ids)
    assert measured["loss"] == pytest.approx(nats / len(ids), rel=1e-6)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-6)
    has(refusal(megamoe.evaluate, model, tokenizer, ""), "no tokens")
    has(refusal(megamoe.evaluate, model, tokenizer, TEXT, -1), "seq_len is -1", "at least 1")
    has(refusal(megamoe.evaluate, model, tokenizer, TEXT, 7, 0), "batch_size is 0", "at least 1")


def test_a_tokenizer_larger_than_the_model_is_refused():
    model, tokenizer = megamoe.build_model(model_of("plain_scores")), train_tokenizer([TEXT], 270)
    for call in (partial(megamoe.evaluate, model, tokenizer, TEXT), partial(megamoe.generate, model, tokenizer, ["a"])):
        has(refusal(call), "token id 269", "101 entries", "give its own")


def losses_around_an_evaluation():
    """(losses of steps before and after the model is in evaluation, slots routed in the last step, what is refused)."""
    trainer = megamoe.build_trainer(megamoe.ModelConfig(**PRESET), ds_config(1, accumulation=2))
    torch.manual_seed(0)
    ids = torch.randint(96, (2, 17))
    batches = [megamoe.Batch(row[None, :-1], row[None, 1:]) for row in ids]
    losses = [megamoe.train_step(trainer, iter(batches)).loss for _ in range(10)]
    trainer.model.eval()
    after = megamoe.train_step(trainer, batches)
    refused = [refusal(megamoe.train_step, trainer, given) for given in (batches[:1], 3 * batches)]
    return [*losses, after.loss], after.balance.counts.sum().item(), refused


def test_steps_lower_the_loss_after_an_evaluation_too_and_take_as_many_micro_batches_as_are_accumulated():
    ((losses, routed, (few, many)),) = run_ranks(1, losses_around_an_evaluation)
    assert losses[-1] < losses[0] - 0.2
    assert routed == 2 * 2 * 16 * 2  # layers, micro-batches, positions, experts of each
    has(few, "1 micro-batches", "accumulates 2", "give 2")
    has(many, "6 micro-batches", "accumulates 2")


def dtype_of_a_trainer(rates):
    """Of the model that the shipped tiny.json trains where rank 0 measures `rates`, and what this rank says."""
    measured = by_rates(*rates) if torch.distributed.get_rank() == 0 else None  # which nobody asks
    ds = SHIPPED / "tiny.json"
    with mock.patch.object(precision, "precision_of", return_value=measured), redirect_stdout(StringIO()) as said:
        trainer = megamoe.build_trainer(megamoe.ModelConfig(**PRESET), ds)
    return trainer.model.embed_tokens.weight.dtype, said.getvalue()


def test_auto_trains_in_what_rank_0_is_the_faster_in_and_is_said_once():
    rates = (0.56e9, 46e9)
    (dtype, said), (other_dtype, other_said) = run_ranks(2, dtype_of_a_trainer, rates)
    assert dtype == other_dtype == torch.float32
    assert said.count(f"computes in fp32: {by_rates(*rates).reason}\n") == 1
    assert "computes in" not in other_said


def measured_for_a_trainer():
    with mock.patch.object(precision, "precision_of") as measure:
        megamoe.build_trainer(megamoe.ModelConfig(**PRESET), ds_config(2))
    return measure.called


def test_nothing_is_measured_for_a_json_in_fp32():
    assert run_ranks(1, measured_for_a_trainer) == [False]


def problems_of_trainers(path):
    def problems(ds, ep_size=1, **changes):
        config = megamoe.ModelConfig(**{**PRESET, **changes})
        return refusals(megamoe.build_trainer, config, ds, ep_size)

    return {
        "all at once": problems(ds_config(2, gradient_clipping=-1), 3, hidden_size=30),
        "of a file": problems(path),
        "DeepSpeed's own": problems(ds_config(2, flops_profiler={"enabled": "maybe"})),
    }


def test_what_a_trainer_cannot_be_built_from_is_said_in_sentences(tmp_path):
    config = megamoe.ModelConfig(**PRESET)
    has(refusal(megamoe.build_trainer, config, ds_config(2)), "init_distributed")
    (tmp_path / "mine.json").write_text(json.dumps(ds_config(2, zero_optimization={"stage": 3})))
    said, _ = run_ranks(2, problems_of_trainers, tmp_path / "mine.json")
    parts = ['"gradient_clipping" is -1', "the 2 ranks", "the 4 experts of the model", "hidden_size is 30"]
    for problem, part in zip(said["all at once"], parts, strict=True):
        assert part in problem
    has(only(said["of a file"]), f"{tmp_path / 'mine.json'}: zero_optimization: stage", "ZeRO-3")
    has(only(said["DeepSpeed's own"]), "the DeepSpeed JSON: DeepSpeed refuses")


def output_of(code):
    os.chdir(ROOT)
    with redirect_stdout(StringIO()) as output:
        exec(code, {})
    return output.getvalue()


def test_the_example_of_the_tutorial_runs(run_dir, tmp_path):
    example = TUTORIAL.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "short.txt").write_text(TEXT)
    # Its places, and shorter sequences.
    for theirs, ours in (("runs/glm", run_dir), ("README.md", tmp_path / "short.txt"), ("257", 17)):
        assert theirs in example
        example = example.replace(theirs, str(ours))
    lines = run_alone(output_of, example).splitlines()
    assert any("bits_per_byte" in line for line in lines)
    assert lines[-1].startswith("2 ")  # the last step
