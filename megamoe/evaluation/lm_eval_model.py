"""lm-evaluation-harness on a live model: its adapter, and its tasks. Imported only where tasks are asked for."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from tokenizers import Tokenizer

from megamoe.data.source import NO_LABEL
from megamoe.data.tokenizer import encode, encode_prompts, end_of_text_id, start_id
from megamoe.evaluation.scoring import Window
from megamoe.evaluation.shared_model import SharedModel
from megamoe.utils.errors import Problems, UserError, first_line, shown

FEWSHOT_SEED = 1234  # the harness's own
NEW_TOKENS = 256  # of an answer whose task does not say how many; the harness's own


class HarnessModel(TemplateLM):
    """The harness's view of a model. It is one rank to the harness: `SharedModel` splits the rows over the ranks."""

    def __init__(self, shared: SharedModel, tokenizer: Tokenizer, end_of_text: int, max_length: int):
        super().__init__()
        self._shared = shared
        self._tokenizer = tokenizer
        self._end_of_text = end_of_text
        self._max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return self._end_of_text

    @property
    def prefix_token_id(self) -> int:
        return start_id(self._tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return (encode if add_special_tokens is False else encode_prompts)(self._tokenizer, [string])[0]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        windows = [
            self._window((context + continuation)[:-1], continuation, number)
            for number, (_, context, continuation) in enumerate(requests)
        ]
        return [(-nats, wrong == 0) for nats, _, wrong in self._sums(windows, len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        windows = [
            self._window(ids, following, number)
            for number, request in enumerate(requests)
            for ids, following in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._max_length, context_len=1
            )
        ]
        return [-nats for nats, _, _ in self._sums(windows, len(requests))]

    def _window(self, ids: list[int], following: list[int], owner: int) -> Window:
        """The last ids that the model can read, scored on what follows the last of them."""
        labels = [NO_LABEL] * (len(ids) - len(following)) + following
        return Window(np.array(ids[-self._max_length :]), np.array(labels[-self._max_length :]), owner)

    def _sums(self, windows: list[Window], owners: int) -> list[list[float]]:
        return self._shared.score(sorted(windows, key=lambda window: -len(window.ids)), owners)  # little to fill up

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        alike: dict[str, list[int]] = {}  # requests by their options
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for options, numbers in alike.items():
            prompts = [self.tok_encode(requests[number].args[0]) or [self._end_of_text] for number in numbers]
            for number, text in zip(numbers, self._continuations(prompts, json.loads(options)), strict=True):
                texts[number] = text
        return texts

    def _continuations(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(options, NEW_TOKENS)
        new_tokens = min(given["max_gen_toks"], self._max_length - 1)
        drawn: dict[str, Any] = {"temperature": 0.0}
        if given["do_sample"]:
            limits = {key: given.get(key) or None for key in ("top_k", "top_p")}  # 0 is none
            drawn = {"temperature": given.get("temperature", 1.0), **limits}
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        rows = self._shared.generate(
            [prompts[number][-(self._max_length - new_tokens) :] for number in order],
            new_tokens,
            {"end_of_text": self._end_of_text, **drawn},
        )
        texts = dict(zip(order, map(self._tokenizer.decode, rows), strict=True))
        return [postprocess_generated_text(texts[number], given["until"], None) for number in range(len(prompts))]


class HarnessTasks:
    """Tasks with their data, ready to be evaluated any number of times; `tasks.load_tasks` says the arguments."""

    def __init__(self, names: list[str], folder: Path | None, tokenizer: Tokenizer, max_length: int):
        self._tokenizer = tokenizer
        self._end_of_text = end_of_text_id(tokenizer)
        self._max_length = max_length
        logging.getLogger("lm_eval").setLevel(logging.WARNING)  # it tells of every task at INFO
        manager = _manager(names, folder)
        problems = Problems(_unknown(name, manager) for name in names if name not in manager.task_index)
        problems.refuse()
        self._loaded = {name: problems.attempt(_load, manager, name) for name in names}
        problems.refuse()

    def evaluate(self, shared: SharedModel) -> dict[str, float]:
        """TASK_METRIC by name; of a group of tasks, its own values and those of its tasks."""
        model = HarnessModel(shared, self._tokenizer, self._end_of_text, self._max_length)
        values: dict[str, float] = {}
        for name, loaded in self._loaded.items():
            shared.work_on(f"evaluation of {name}")
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            values.update(_values(evaluate(model, task_dict=loaded, bootstrap_iters=0, log_samples=False)))
        return values


def _manager(names: list[str], folder: Path | None) -> TaskManager:
    """With the harness's own tasks, whose thousands of files take seconds to read, only where they are needed."""
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of tasks; give one with a YAML file for each.")
    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if all(name in own.task_index for name in names) else TaskManager(include_path=str(folder))


def _unknown(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "`lm-eval ls tasks` lists them."
    return f"lm-evaluation-harness knows no task {shown(name)}; {hint}"


def _load(manager: TaskManager, name: str) -> Any:
    try:
        loaded = manager.load([name])
    except Exception as error:  # of a data set, the network, or the task's own code
        raise UserError(
            f"task {name} of lm-evaluation-harness cannot be loaded ({first_line(error)}); see that its data set is in "
            "the cache or can be reached."
        ) from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"task {name} of lm-evaluation-harness runs code that the model writes, or shows it images; leave it "
                "out, or evaluate an export with the harness itself."
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _values(found: Any) -> Iterator[tuple[str, float]]:
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, rule = key.partition(",")
            is_number = isinstance(value, (int, float, np.number)) and not metric.endswith("_stderr")
            if comma and is_number:
                yield f"{task}_{metric}" + (f"_{rule}" if rule != "none" else ""), float(value)
