"""Events of a run, sent to commands and URLs of the user's: --on_event. The run waits for none of them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamoe.config.alert_targets import parse_target, without_secrets
from megamoe.monitoring.log_files import ENDS, finite
from megamoe.monitoring.sink import Sink
from megamoe.utils.run_folder import beginning

MOST = 8  # that are being sent at once; those of an end are sent in any case
LAST_SECONDS = 2.0
POST = [sys.executable, "-I", str(Path(__file__).with_name("post.py"))]


class Alerts(Sink):
    """Starts a process for each event and target, which outlives this one: a command has the event as JSON on its
    standard input, a URL has it in a POST."""

    def __init__(self, targets: Sequence[str], run_dir: Path):
        self._targets = [parse_target(target) for target in targets]
        self._names = [without_secrets(target) for target in targets]
        self._run_dir = run_dir
        self._sending: dict[subprocess.Popen[bytes], str] = {}  # with the name of the target
        self._failed: set[str] = set()

    def log_event(self, event: str, step: int, values: dict[str, Any]) -> None:
        if event == "save" or "loss scale" in str(values.get("reason")):  # as often happens in a run that is well
            return
        self._drop_ended()
        content = self._content(event, step, values) if self._targets else b""
        for target, name in zip(self._targets, self._names, strict=True):
            if len(self._sending) >= MOST and event not in ENDS:
                print(f"warning: {MOST} alerts are being sent still; {event} is not sent", file=sys.stderr, flush=True)
                return
            self._sending[self._start(target, content)] = name

    def close(self) -> None:
        """Give what is being sent some seconds: a container or a job step takes all of its processes with it."""
        deadline = time.monotonic() + LAST_SECONDS
        for one in self._sending:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(max(deadline - time.monotonic(), 0))
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Name each target once that did not take an event."""
        for one in [one for one in self._sending if one.poll() is not None]:
            name = self._sending.pop(one)
            if one.returncode and name not in self._failed:
                self._failed.add(name)
                what = f"warning: --on_event {name} did not take an event (exit code {one.returncode})"
                print(f"{what}; see whether it is there and takes JSON.", file=sys.stderr, flush=True)

    def _start(self, target: str | list[str], content: bytes) -> subprocess.Popen[bytes]:
        is_url = isinstance(target, str)
        with tempfile.TemporaryFile() as file:  # unlike a pipe it takes all at once; a URL must not stand in `ps`
            file.write(target.encode() + b"\n" + content if isinstance(target, str) else content)
            file.seek(0)
            return subprocess.Popen(
                POST if is_url else target, stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def _content(self, event: str, step: int, values: dict[str, Any]) -> bytes:
        run, host = str(self._run_dir.absolute()), socket.gethostname()
        why = f": {values['reason']}" if values.get("reason") else ""
        told = {
            "text": f"{self._run_dir} on {host}: {event.replace('_', ' ')}, step {step:,}{why}",
            "event": event, "time": time.time(), "step": step, "run": run,
            "run_id": (beginning(self._run_dir) or {}).get("run_id"), "host": host, **values,
        }  # fmt: skip
        return json.dumps(finite(told)).encode()
