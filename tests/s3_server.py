"""moto's S3 on loopback, which counts what it is asked and can be made to fail."""

import os
import re
import socket
import threading
import time
from pathlib import Path

import boto3
import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def use(variables):
    """Have this rank, which may know an earlier server, use the one with these variables."""
    os.environ.update(variables)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class S3Server:
    """`fault` is called with the number of each GET of an object, from 0, and names what goes wrong with it."""

    def __init__(self):
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }
        self.restart()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def restart(self):
        """Forget what was asked for, and fail no more."""
        self.asked, self.fault = [], lambda number: None

    def upload(self, folder, bucket):
        client = boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        client.create_bucket(Bucket=bucket)
        for path in Path(folder).iterdir():
            client.upload_file(str(path), bucket, f"corpora/mine/{path.name}")
        return f"s3://{bucket}/corpora/mine"

    def close(self):
        self._server.shutdown()

    def _answer(self, environ, start_response):
        fault = None
        if environ["REQUEST_METHOD"] == "GET" and re.search(r"\.\w+$", environ["PATH_INFO"]):
            self.asked.append(Path(environ["PATH_INFO"]).name)
            fault = self.fault(len(self.asked) - 1)
        if fault == "slow":
            time.sleep(0.1)
        if fault == "gone":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if str(fault)[0].isdigit():
            start_response(fault, [("Content-Length", str(len(SLOW_DOWN)))])
            return [SLOW_DOWN]
        if fault in ("half", "other"):
            first, last = map(int, environ["HTTP_RANGE"].removeprefix("bytes=").split("-"))
            environ["HTTP_RANGE"] = (
                f"bytes={first}-{(first + last) // 2}" if fault == "half" else f"bytes={first + 1}-{last + 1}"
            )
        return self._moto(environ, start_response)
