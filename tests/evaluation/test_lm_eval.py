"""lm-evaluation-harness: what its own adapter finds on an export is what the adapter of the live model does."""

import pytest
import torch
from harness_tasks import ANSWER, CHOICE, FEW_SHOTS, QUESTIONS, ROLLING, WORDS, write_small_glm, write_task

from megamoe.evaluation.scoring import Share
from megamoe.evaluation.shared_model import SharedModel

TEXT = (
    "Wer wüßte je das Beste, das ihm blüht? — To be, or not to be, that is the question. " * 5
    + "And thus the native hue."
)
WINDOW = 32


def requests(kind, *of_each):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(of_each)]


@pytest.mark.parametrize("first", [None, "[begin]"])
def test_the_live_model_gives_the_harness_what_its_export_does(tmp_path, first):
    from lm_eval.models.huggingface import HFLM

    from megamoe.evaluation.lm_eval_model import HarnessModel

    decoder, tokenizer = write_small_glm(tmp_path, [TEXT], WINDOW, first)
    theirs = HFLM(str(tmp_path / "hf"), batch_size=3, device="cpu")
    ours = HarnessModel(SharedModel(decoder, Share(3), torch.device("cpu")), tokenizer, 0, WINDOW)

    def both(kind, *of_each):
        return [getattr(model, kind)(requests(kind, *of_each)) for model in (theirs, ours)]

    pairs = [(" ".join(WORDS[:n]), f" {WORDS[-n]} ,") for n in (1, 2, 5, 9)] + [
        ("", "to be"),
        ("be ", "or"),
        (TEXT, "x"),
    ]
    greedy = tokenizer.decode(decoder(torch.tensor([tokenizer.encode("to be").ids]))[:, -1].argmax(-1).tolist())
    hf, live = both("loglikelihood", *pairs, ("to be", greedy))
    assert [nats for nats, _ in live] == pytest.approx([nats for nats, _ in hf], rel=1e-5)
    assert [is_greedy for _, is_greedy in live] == [is_greedy for _, is_greedy in hf]
    hf, live = both("loglikelihood_rolling", (TEXT,), ("to be",), (TEXT[:200],))
    assert live == pytest.approx(hf, rel=1e-5)
    options = {"until": [" t", "e"], "max_gen_toks": 7}
    asked = [*((text, options) for text, _ in pairs if text), ("to be", {"max_gen_toks": 3, "until": "\n"})]
    hf, live = both("generate_until", *asked)
    assert live == hf
    assert any(live)


def test_tasks_of_every_kind_are_evaluated_again_and_again_with_one_result(tmp_path):
    from megamoe.evaluation.tasks import TaskEvaluator, load_tasks

    kinds = {"rolling": ROLLING, "choice": CHOICE, "answer": ANSWER, "few_shots": FEW_SHOTS}
    for name, kind in kinds.items():
        write_task(tmp_path, name, kind, [{"text": TEXT}] if kind == ROLLING else QUESTIONS)
    (decoder, tokenizer), places = write_small_glm(tmp_path, [TEXT], WINDOW), []
    tasks = load_tasks(list(kinds), str(tmp_path), tokenizer, WINDOW)
    evaluator = TaskEvaluator(tasks, lambda activity, alone=False: places.append((activity, alone)))
    found = [evaluator.run(decoder, Share(micro_batch), torch.device("cpu")) for micro_batch in (2, 5)]
    metrics = ["rolling_bits_per_byte", "choice_acc", "choice_acc_norm", "answer_exact_match", "few_shots_perplexity"]
    assert list(found[0]) == metrics
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    # What the stall detector is told: rank 0 is alone but for its calls, of which each of these tasks makes one.
    calls = [(f"evaluation of {name}", alone) for name in kinds for alone in (True, False, True)]
    assert places == [*calls, (f"evaluation of {name}", False)] * 2
