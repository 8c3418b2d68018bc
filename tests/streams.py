"""A device with streams, played by the CPU: what each operator reads, writes, allocates and frees is recorded on the
stream that it would run on; what another stream may do to the same memory at the same time is a race.

Order is that of vector clocks: of every stream, how many operators are known to have ended. The operators themselves
run at once, so that values are right whatever is found.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_BY_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Stream:
    """As `torch.cuda.Stream`. Each thread of the host is one, too, of what it reads and writes itself."""

    def __init__(self, device: Device, name: str):
        self.device, self.name = device, name
        self.clock: Counter[Stream] = Counter()  # what has ended before the next operator of this stream begins

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock

    wait_event = wait_stream

    def record_event(self) -> Event:
        event = Event(self.device, "an event")
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.device.host.wait_stream(self)


class Event(Stream):
    """As `torch.cuda.Event`: a stream as it was when recorded."""

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Counter((stream or self.device.current).clock)


@dataclass(frozen=True)
class Access:
    stream: Stream
    tick: int
    start: int  # bytes of the storage
    end: int
    writes: bool
    operator: str

    def __str__(self) -> str:
        return f"{self.operator} on {self.stream.name}"

    def has_ended(self, stream: Stream) -> bool:
        """Before the next operator of `stream`."""
        return stream.clock[self.stream] >= self.tick

    def conflicts(self, new: Access) -> bool:
        overlap = self.start < new.end and new.start < self.end
        return overlap and (self.writes or new.writes) and not self.has_ended(new.stream)

    def is_implied(self, new: Access) -> bool:
        """Whether what is ordered behind `new` is ordered behind this one."""
        return new.start <= self.start and self.end <= new.end and (new.writes or self.stream is new.stream)


@dataclass
class Memory:
    """Of a storage."""

    size: int
    owner: Stream | None  # to whose pool it returns; None for what was there before
    on_host: bool
    accesses: list[Access] = field(default_factory=list)
    recorded: set[Stream] = field(default_factory=set)  # whose operators it outlives


class Device:
    """Enter `recorded()`, then see `races`. What another thread does is recorded within `Recorder(device)`."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.default = Stream(self, "the default stream")
        self.collectives = Stream(self, "the stream of asynchronous collectives")
        self.streams = [self.default, self.collectives]
        self.waits_at_once = False  # whether torch waits now for the collective that it has just called
        self._local = threading.local()
        self._memory: dict[int, Memory] = {}
        self._freed: dict[Stream, list[Memory]] = {}

    @property
    def host(self) -> Stream:
        if not hasattr(self._local, "host"):
            self._local.host = Stream(self, f"the host's {threading.current_thread().name}")
        return self._local.host

    @property
    def current(self) -> Stream:
        return getattr(self._local, "current", self.default)

    def new_stream(self, *_: Any, **__: Any) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._local.current = stream or before
        try:
            yield
        finally:
            self._local.current = before

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    # --- memory -----------------------------------------------------------------------------------------------------

    def memory(self, tensor: Tensor, owner: Stream | None = None, on_host: bool = False) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            self._memory[key] = Memory(storage.nbytes(), owner, on_host)
            weakref.finalize(storage, self._free, key)
        return self._memory[key]

    def pin(self, tensor: Tensor) -> Tensor:
        """It moves to page-locked memory of the host, which waits for that."""
        self.host.wait_stream(self.current)
        self.memory(tensor).on_host = True
        return tensor

    def _free(self, key: int) -> None:
        memory = self._memory.pop(key)
        if memory.on_host:
            self._reuse(memory, self.host)
        elif memory.owner:
            self._freed.setdefault(memory.owner, []).append(memory)

    def _reuse(self, memory: Memory, stream: Stream) -> None:
        for one in memory.accesses:
            if one.stream not in memory.recorded and not one.has_ended(stream):
                self.races.append(f"{memory.size} bytes, reused on {stream.name} during {one}")

    def _access(self, stream: Stream, tensor: Tensor, writes: bool, operator: str) -> None:
        if not tensor.numel():
            return
        start = tensor.storage_offset()
        end = start + 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.itemsize
        new = Access(stream, stream.clock[stream], start * size, end * size, writes, operator)
        memory = self.memory(tensor)
        for one in memory.accesses:
            if one.conflicts(new):
                self.races.append(f"{memory.size} bytes: {new} during {one}")
        memory.accesses = [*(one for one in memory.accesses if not one.is_implied(new)), new]

    # --- operators --------------------------------------------------------------------------------------------------

    def run(
        self,
        operator: str,
        read: list[Tensor],
        written: list[Tensor],
        *,
        is_async: bool = False,
        non_blocking: bool = False,
        for_host: bool = False,
    ) -> None:
        """Record an operator; what is `written` and unknown so far is allocated for it."""
        new = {id(one) for one in written if one.untyped_storage()._cdata not in self._memory}
        on_host = [memory for one in (*read, *written) if id(one) not in new and (memory := self.memory(one)).on_host]
        is_of_host = bool(on_host) and len(on_host) + len(new) == len(read) + len(written)
        stream = self.host if is_of_host else self.collectives if is_async else self.current
        for before in (self.host, self.current) if is_async else (self.host,):
            stream.wait_stream(before)
        stream.clock[stream] += 1
        if new:
            for memory in self._freed.pop(stream, []):
                self._reuse(memory, stream)
        for one in written:
            self.memory(one, stream, is_of_host)
        for one in read:
            self._access(stream, one, False, operator)
        for one in written:
            self._access(stream, one, True, operator)
        for memory in on_host:  # torch keeps page-locked memory until its copies have ended
            memory.recorded.add(stream)
        if for_host or (on_host and not non_blocking):
            self.host.wait_stream(stream)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """This thread's operators are recorded, and the streams of DeepSpeed and torch are those of this device."""
        with ExitStack() as stack:
            for owner, names in _replaced(self).items():
                stack.enter_context(patch.multiple(owner, **names))
            stack.enter_context(Recorder(self))
            yield


class Recorder(TorchDispatchMode):
    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pins = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if pins:
            self.device.memory(out).on_host = True
            return out
        arguments = func._schema.arguments
        given = {one.name: kwargs.get(one.name, one.default_value) for one in arguments}
        given |= {one.name: value for one, value in zip(arguments, args, strict=False)}
        read, made, written = _tensors(given), _tensors(out), []
        for one in arguments:
            if func.namespace == "c10d" or (one.alias_info and one.alias_info.is_write):
                written += _tensors(given[one.name])
        known = {one.untyped_storage()._cdata for one in read}
        made = [one for one in made if one.untyped_storage()._cdata not in known]
        is_async = func.namespace == "c10d" and given["async_op"]
        self.device.waits_at_once = func.namespace == "c10d" and not is_async
        if made or written or not _tensors(out):  # others give views
            self.device.run(
                str(func),
                read,
                [*written, *made],
                is_async=is_async,
                non_blocking=bool(given.get("non_blocking")),
                for_host=bool(READ_BY_HOST & set(func.tags)),
            )
        return out


def _replaced(device: Device) -> dict[Any, dict[str, Any]]:
    """By owner and name."""
    plain_to, plain_tolist, plain_wait = Tensor.to, Tensor.tolist, Work.wait

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if device.memory(tensor).on_host and isinstance(args[0], torch.device):
            return torch.empty_like(tensor).copy_(tensor, non_blocking=options.get("non_blocking", False))
        return plain_to(tensor, *args, **options)

    def tolist(tensor: Tensor) -> Any:
        device.run("tolist", [tensor], [], for_host=True)
        return plain_tolist(tensor)

    def wait(work: Work, *args: Any) -> Any:
        if not device.waits_at_once:
            device.current.wait_stream(device.collectives)
        device.waits_at_once = False
        return plain_wait(work, *args)

    return {
        type(get_accelerator()): {
            "is_synchronized_device": lambda _: False,
            "synchronize": lambda _, *args: device.synchronize(),
            "current_stream": lambda _, *args: device.current,
            "stream": lambda _, stream: device.stream(stream),
            "Stream": property(lambda _: device.new_stream),
            "Event": property(lambda _: lambda **options: Event(device, "an event")),
            "pin_memory": lambda _, tensor, **options: device.pin(tensor),
        },
        torch.cuda: {
            "current_stream": lambda *args: device.current,
            "stream": device.stream,
            "Stream": device.new_stream,
            "Event": lambda: Event(device, "an event"),
            "set_device": lambda _: None,
        },
        Tensor: {
            "record_stream": lambda tensor, stream: device.memory(tensor).recorded.add(stream),
            "is_pinned": lambda tensor: device.memory(tensor).on_host,
            "pin_memory": lambda tensor: device.pin(tensor.clone()),
            "to": to,
            "tolist": tolist,
        },
        Work: {"wait": wait},
    }


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]
