"""lm-evaluation-harness on exported models: its bits per byte are those of `megamoe.evaluate`."""

import json
from pathlib import Path

import pytest
import torch
from exported import Weights, export, random_decoder
from model_parts import model_of

import megamoe
from megamoe.checkpoint.native_export import native_class, write_native
from megamoe.data.tokenizer import train_tokenizer

TEXT = (
    "Wer wüßte je das Beste, das ihm blüht? — To be, or not to be, that is the question. " * 5
    + "And thus the native hue."
)
WINDOW = 32
SHRUNK = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": WINDOW,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def export_native(decoder, folder, tokenizer):
    """`folder`, with the decoder as the class of transformers that holds it."""
    source = Weights(decoder)
    architecture, _ = native_class(source, decoder.config)
    write_native(source, folder, torch.float32, 10**9, decoder.config, architecture, tokenizer)


def harness(directory: Path, texts: dict[str, str], folder: Path, **options) -> dict[str, float]:
    """Bits per byte of each text, a task of its own in `folder`, as lm-evaluation-harness computes them."""
    import lm_eval  # takes seconds
    from lm_eval.tasks import TaskManager

    for name, text in texts.items():
        data = folder / f"{name}.jsonl"
        data.write_text(json.dumps({"text": text}) + "\n")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, cache=folder / "cache"))
    found = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(directory), **options},
        tasks=list(texts),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    return {name: found["results"][name]["bits_per_byte,none"] for name in texts}


@pytest.mark.parametrize("own_code", [False, True], ids=["class of transformers", "own code"])
def test_the_harness_finds_the_bits_per_byte_that_evaluate_does(own_code, tmp_path, module_cache):
    tokenizer = train_tokenizer([TEXT], 290)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = model_of("latent_tokens", **SHRUNK) if own_code else megamoe.load_preset("tiny-glm", **SHRUNK)
    decoder = random_decoder(config)
    write = export if own_code else export_native
    write(decoder, tmp_path / "exported", tmp_path / "tokenizer.json")
    ids = tokenizer.encode(TEXT).ids
    texts = {"whole_windows": tokenizer.decode(ids[: 7 * WINDOW]), "a_shorter_last_window": TEXT}
    theirs = harness(tmp_path / "exported", texts, tmp_path, trust_remote_code=own_code)
    ours = {name: megamoe.evaluate(decoder, tokenizer, text) for name, text in texts.items()}
    assert ours["whole_windows"]["tokens"] == 7 * WINDOW
    assert 7 * WINDOW < ours["a_shorter_last_window"]["tokens"] < 8 * WINDOW
    assert theirs["whole_windows"] == pytest.approx(ours["whole_windows"]["bits_per_byte"], rel=1e-5)
    # The harness fills the context of a shorter last window from the window before.
    shorter = ours["a_shorter_last_window"]["bits_per_byte"]
    assert theirs["a_shorter_last_window"] == pytest.approx(shorter, rel=0.01)
