"""The sources of samples that `--data` and `--valid_data` name."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from megamoe.data.object_store import RemoteFolder, RemoteShard
from megamoe.data.packing import PackedCorpus
from megamoe.data.source import NO_LABEL, DataSource, Sample
from megamoe.data.token_files import TokenCorpus, corpus_prefix
from megamoe.utils.errors import UserError, first_line

OWN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")  # MODULE:NAME


def open_corpus(
    path: str, split: str, seq_len: int, vocab_size: int, scan: bool, remote: RemoteFolder | None = None
) -> TokenCorpus:
    """A split of a prepared folder, or a .bin/.idx pair. Raises as `TokenCorpus`.

    Args:
        remote: the folder, where that is on an object store. Nothing is scanned there, for that would read all of it.
    """
    if remote:
        return TokenCorpus(remote.path / split, seq_len, vocab_size, False, partial(RemoteShard, folder=remote))
    return TokenCorpus(corpus_prefix(path, split), seq_len, vocab_size, scan)


def open_source(
    path: str, seq_len: int, vocab_size: int, scan: bool, packing: str = "cut", remote: RemoteFolder | None = None
) -> DataSource:
    """The training split of a prepared folder, a .bin/.idx pair, or a source of the user's own by MODULE:NAME. Raises
    UserError.

    Args:
        scan: as for `TokenCorpus`.
        packing: "cut", or "best_fit" as `PackedCorpus` does it.
        remote: as for `open_corpus`.
    """
    named = OWN.fullmatch(path)
    if not named:
        corpus = open_corpus(path, "train", seq_len, vocab_size, scan, remote)
        return PackedCorpus(corpus, writes=scan) if packing == "best_fit" else corpus
    if packing != "cut":
        raise UserError(f"packing is {packing}, but {path} makes its samples itself; leave --packing out.")
    return _CheckedSource(path, _own_source(path, named[1], named[2], seq_len), seq_len, vocab_size)


def _own_source(path: str, module: str, name: str, seq_len: int) -> Any:
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data {path} cannot be imported ({first_line(error)}); correct it, or set PYTHONPATH to its folder."
        ) from None
    return make(seq_len=seq_len)


class _CheckedSource:
    """A source of the user's own, whose samples are looked at before a model reads them."""

    def __init__(self, path: str, source: DataSource, seq_len: int, vocab_size: int):
        lacks = [name for name in ("seq_len", "num_samples", "fingerprint", "sample") if not hasattr(source, name)]
        if lacks or source.num_samples < 1 or source.seq_len != seq_len:
            why = f"lacks {', '.join(lacks)}" if lacks else f"needs a sample or more, and seq_len {seq_len}"
            raise UserError(f"data {path} {why}; make it a DataSource, see megamoe/data/source.py.")
        self.seq_len, self.num_samples, self.fingerprint = seq_len, source.num_samples, source.fingerprint
        self._path, self._source, self._vocab_size = path, source, vocab_size

    def sample(self, index: int, ahead: int = 0) -> Sample:
        """Raises UserError for a sample that no model can read."""
        ids, labels, starts = (np.asarray(part, np.int64) for part in self._source.sample(index, ahead))
        for name, values, least, most in (("ids", ids, 1, self.seq_len), ("labels", labels, 0, len(ids) + ahead)):
            known = np.append(values[values != NO_LABEL] if name == "labels" else values, 0)
            if not least <= len(values) <= most or known.min() < 0 or known.max() >= self._vocab_size:
                raise UserError(
                    f"data {self._path}: sample {index} has {len(values)} {name}, where {least} to {most} from 0 to "
                    f"{self._vocab_size - 1} are needed; correct its source."
                )
        if np.any(np.diff(starts, prepend=0, append=len(ids)) < 1):
            raise UserError(
                f"data {self._path}: sample {index} has starts {starts.tolist()}, which do not rise from 1 to "
                f"{len(ids) - 1}; correct its source."
            )
        return Sample(ids, labels, starts)
