"""The real llama.cpp, from the wheel xllamacpp, on one CPU thread and without lower precision than the file's."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import xllamacpp
except ImportError as error:
    raise ImportError("the tests of GGUF files run llama.cpp: pip install xllamacpp (in the extra dev)") from error

NEXT = 40  # a token that the server shows as text: it gives no probabilities of half a character


class LlamaCpp:
    """A GGUF file in llama.cpp's server, on a port of its own."""

    def __init__(self, path: Path, context: int = 128):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.cache_ram_mib = params.verbosity = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)
        # The server's thread hangs for ever if it is told to end before its loop has begun, as it has after an answer.
        self.greedy([NEXT], 1)

    def _post(self, route: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return json.loads(opener.open(request, timeout=60).read())

    def tokenize(self, text: str) -> list[int]:
        return self._post("/tokenize", content=text, add_special=True)["tokens"]

    def greedy(self, prompt: str | list[int], count: int) -> list[int]:
        """The likeliest continuation of a text or of tokens."""
        done = self._post("/completion", prompt=prompt, n_predict=count, temperature=-1, return_tokens=True)
        return done["tokens"]

    def log_probs(self, ids: list[int], vocab_size: int) -> Tensor:
        """Of each token to follow `ids`, (vocab_size,)."""
        done = self._post(
            "/completion", prompt=ids, n_predict=1, temperature=-1, n_probs=vocab_size, logit_bias=[[NEXT, 1e3]]
        )
        found = torch.full((vocab_size,), torch.nan)
        for token in done["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        assert not found.isnan().any()
        return found
