"""Exports of decoders with random weights, and how transformers loads them."""

import torch
from engines import plain_state

from megamoe.formats.export import write_huggingface
from megamoe.formats.source import WeightsAlone
from megamoe.model.decoder import Decoder
from megamoe.model.names import is_buffer


@torch.no_grad()
def random_decoder(config, std=0.2):
    """All weights random, norms, biases and balancing biases too, so that each tells."""
    decoder = Decoder(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in decoder.named_parameters():
        weight.normal_(1 if "norm" in name else 0, std, generator=generator)
    for router in decoder.routers():
        if router.selection_bias is not None:
            router.selection_bias.normal_(0, 0.1, generator=generator)
    return decoder


class Weights(WeightsAlone):
    """A decoder's weights as a source."""

    def __init__(self, decoder):
        self.tensors = {name: tensor.clone() for name, tensor in plain_state(decoder).items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items() if not is_buffer(name)}
        self.buffers = {name: tensor for name, tensor in self.tensors.items() if is_buffer(name)}

    def read(self, name, kind, start, count):
        return self.tensors[name].flatten()[start : start + count]


def random_source(config):
    return Weights(random_decoder(config))


def export(decoder, folder, tokenizer=None, dtype=torch.float32, **options):
    """`folder`, with the decoder as a Hugging Face directory that brings its own code."""
    write_huggingface(Weights(decoder), folder, dtype, 10**9, decoder.config, tokenizer, **options)
    return folder


def load(folder, **options):
    from transformers import AutoModelForCausalLM  # takes a second

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def cache_of(outputs):
    """The cache in a model's outputs, under the name of this release of transformers."""
    return outputs.get("cache", outputs.get("past_key_values"))
