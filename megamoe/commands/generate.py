"""Continue prompts with a trained model, all of them in one batch; a .gguf by llama.cpp."""

from __future__ import annotations

from megamoe.commands.models import load
from megamoe.commands.options import Generate
from megamoe.data.tokenizer import decode_continuation, encode_prompts
from megamoe.model.generation import generate as continue_ids
from megamoe.utils.errors import UserError


def generate(options: Generate) -> None:
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_samples)]
    texts = (with_llama_cpp if options.model.suffix == ".gguf" else continued)(options, prompts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        print(f"[sample {number}] prompt: {prompt}\n{prompt}{text}\n{'-' * 40}")


def continued(options: Generate, prompts: list[str]) -> list[str]:
    model, tokenizer, sampling = load(options)
    ids = encode_prompts(tokenizer, prompts)
    continuations = continue_ids(model, ids, options.max_new_tokens, **sampling, seed=options.seed)
    return [decode_continuation(tokenizer, *one) for one in zip(ids, continuations, strict=True)]


def with_llama_cpp(options: Generate, prompts: list[str]) -> list[str]:
    """By the llama.cpp of the package xllamacpp, which has the tokenizer's end-of-text in the file."""
    if not options.model.is_file():
        raise UserError(f"{options.model} is no file; give a .gguf of megamoe convert.")
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise UserError("llama.cpp is in the package xllamacpp, which is missing; pip install xllamacpp.") from None
    params = xllamacpp.CommonParams()
    params.model.path, params.warmup, params.verbosity = str(options.model), False, 0
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"llama.cpp cannot read {options.model} ({error}); convert the model again.") from None
    given = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    given |= {name: value for name in ("top_k", "top_p") if (value := getattr(options, name)) is not None}
    texts = []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, **given})
        if "error" in answer:
            why = answer["error"].get("message", answer["error"])
            raise UserError(f"llama.cpp does not continue the prompt ({why}); give a shorter one, or fewer new tokens.")
        texts.append(answer["choices"][0]["text"])
    return texts
