"""Alerts reach a command or a server, whatever that does, and the run does not wait for them."""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
from ranks import DEADLINE, run_ranks
from refusals import has, refusal
from toy import ds_config, train_here, write_inputs

from megamoe.config.alert_targets import without_secrets
from megamoe.config.run import RunConfig, parse_run
from megamoe.monitoring import alerts as module
from megamoe.monitoring.alerts import MOST, Alerts
from megamoe.utils.run_folder import RunFolder


class Server(ThreadingHTTPServer):
    """A server that keeps what is posted, and answers each request with the next of `codes`, or once it is told to."""

    def __init__(self, *codes):
        self.codes, self.posted, self.answers = list(codes), [], threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/secret"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, json.loads(body)))
        if self.server.codes:
            self.send_response(self.server.codes.pop(0))
            self.end_headers()
        else:
            self.server.answers.wait(DEADLINE)

    def log_message(self, *args):
        pass


def wait_for(condition):
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_run_ends_while_the_server_that_it_tells_of_its_start_still_hangs_and_its_record_keeps_no_secret(tmp_path):
    server = Server()
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "steps": 2, "save_interval": 1}
    run_ranks(1, train_here, {**run, "on_event": [server.url]})
    wait_for(lambda: len(server.posted) == 3)  # without one for each save, and none is answered
    assert {path for path, _ in server.posted} == {"/secret"}
    told = sorted((body for _, body in server.posted), key=lambda body: body["time"])
    assert [(one["event"], one["step"]) for one in told] == [("start", 0), ("first_step", 1), ("end", 2)]
    record = (tmp_path / "run" / "run.json").read_text()
    assert {one["run_id"] for one in told} == {json.loads(record)["run_id"]}
    has(record, server.url.replace("secret", "***"))
    assert "secret" not in record
    seen = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    posting = [" ".join(words) for words in seen if module.POST[-1] in words]
    assert len(posting) >= 3
    assert not any(server.url in words for words in posting)
    server.answers.set()


def test_a_server_that_fails_is_asked_again_and_one_that_refuses_is_not_but_is_named_once(tmp_path, capsys):
    failing, refusing = Server(500, 503, 200), Server(404, 200)
    alerts = Alerts([failing.url, refusing.url], tmp_path)
    alerts.log_event("rollback", 1200, {"reason": "the loss has climbed", "to_step": 1000, "norm": float("nan")})
    wait_for(lambda: not failing.codes)
    assert [one.wait(DEADLINE) for one in alerts._sending] == [0, 1]
    assert (len(failing.posted), len(refusing.posted)) == (3, 1)
    body = refusing.posted[0][1]
    assert (body["to_step"], body["norm"], body["run"]) == (1000, None, str(tmp_path))
    assert body["text"] == f"{tmp_path} on {body['host']}: rollback, step 1,200: the loss has climbed"
    failing.codes, refusing.codes = [200], [404]
    alerts.log_event("end", 1300, {})
    for one in alerts._sending:
        one.wait(DEADLINE)
    alerts.close()
    name = refusing.url.replace("secret", "***")
    said = f"warning: --on_event {name} did not take an event (exit code 1)"
    assert [line.split(";")[0] for line in capsys.readouterr().err.splitlines()] == [said]


def test_commands_that_sleep_or_fail_hold_nothing_and_at_most_a_handful_run_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "LAST_SECONDS", 0)
    RunFolder(tmp_path / "run").enter({"run_id": "r1"}, [])
    failing, alerts = Alerts(["false"], tmp_path / "run"), Alerts(["sleep 1000"], tmp_path / "run")
    failing.log_event("skip", 1, {"reason": "spike"})
    assert next(iter(failing._sending)).wait(DEADLINE) == 1
    for step in range(2 * MOST):
        alerts.log_event("skip", step, {"reason": "spike", "samples": [[0, step]] * 100_000})  # more than a pipe holds
    alerts.log_event("skip", 9, {"reason": "not finite, loss scale lowered"})
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {MOST} alerts are being sent still; skip is not sent"] * MOST
    alerts.log_event("end", 99, {})
    alerts.close()
    assert len(alerts._sending) == MOST + 1
    assert all(one.poll() is None and os.getsid(one.pid) == one.pid for one in alerts._sending)
    for one in alerts._sending:
        one.kill()


def test_a_target_is_taken_from_the_environment_and_what_is_none_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOK", "https://user:pass@hooks.example/services/T0/B0?token=1")
    assert RunConfig(on_event=["$HOOK", f"{sys.executable} -c pass"]).model_dump()["on_event"][0] == "$HOOK"
    assert Alerts(["$HOOK"], tmp_path)._targets == ["https://user:pass@hooks.example/services/T0/B0?token=1"]
    for none in ("no_such_program --now", "$NO_SUCH_HOOK", "https://hooks.example/***", "", "say 'it"):
        has(refusal(parse_run, [f"--on_event={none}"]), f"{none!r} is no program here and no whole URL")


@pytest.mark.parametrize(
    ("text", "kept"),
    [("--on_event=https://user:pw@h.example:8443/a/b?c=d", "--on_event=https://h.example:8443/***"),
     ("tee https://user:pw@h.example http://pw@g:80", "tee https://h.example http://g:80"),
     ("curl -d @- 'https://h/t' http://g", "curl -d @- 'https://h/***' http://g"), ("s3://bucket/a", "s3://bucket/a")],
)  # fmt: skip
def test_of_a_url_the_host_alone_is_kept(text, kept):
    assert without_secrets(text) == kept
