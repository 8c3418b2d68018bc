"""The sources of samples that `--data` and `--valid_data` name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megamoe.data.cache import Cache
from megamoe.data.corpus_record import ShardRecord
from megamoe.data.object_store import RemoteFolder, RemoteShard
from megamoe.data.packing import PackedCorpus
from megamoe.data.source import NO_LABEL, DataSource, Sample, is_remote
from megamoe.data.token_files import Shard, TokenCorpus, corpus_prefix
from megamoe.utils.errors import UserError, first_line

OWN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")  # MODULE:NAME


class Location(NamedTuple):
    """Where a corpus lies."""

    path: Path  # as it was named; of an object store, the folder of the cache with what has been read of it
    open_shard: Callable[[Path, ShardRecord], Shard] = Shard


def locate(path: str, cache: Cache) -> Location:
    """The location of what `--data` or `--valid_data` name. Raises as `RemoteFolder`."""
    if not is_remote(path):
        return Location(Path(path))
    folder = RemoteFolder(path, cache)
    return Location(folder.path, partial(RemoteShard, folder=folder))


def open_corpus(location: Location, split: str, seq_len: int, vocab_size: int, scan: bool) -> TokenCorpus:
    """A split of a prepared folder, or a .bin/.idx pair. Raises as `TokenCorpus`.

    Args:
        scan: as for `TokenCorpus`; never done on object stores, for it would read all of them.
    """
    path, open_shard = location
    return TokenCorpus(corpus_prefix(str(path), split), seq_len, vocab_size, scan and open_shard is Shard, open_shard)


def open_source(location: Location, seq_len: int, vocab_size: int, scan: bool, packing: str = "cut") -> DataSource:
    """The training split of a prepared folder, a .bin/.idx pair, or a source of the user's own by MODULE:NAME. Raises
    UserError.

    Args:
        scan: as for `TokenCorpus`.
        packing: "cut", or "best_fit" as `PackedCorpus` does it.
    """
    path = str(location.path)
    named = OWN.fullmatch(path)
    if not named:
        corpus = open_corpus(location, "train", seq_len, vocab_size, scan)
        return PackedCorpus(corpus, writes=scan) if packing == "best_fit" else corpus
    if packing != "cut":
        raise UserError(f"packing is {packing}, but {path} makes its samples itself; leave --packing out.")
    try:
        make = getattr(import_module(named[1]), named[2])
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data {path} cannot be imported ({first_line(error)}); correct it, or set PYTHONPATH to its folder."
        ) from None
    return _CheckedSource(path, make(seq_len=seq_len), seq_len, vocab_size)


class _CheckedSource:
    """A source of the user's own, whose samples are looked at before a model reads them."""

    def __init__(self, path: str, source: Any, seq_len: int, vocab_size: int):
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
