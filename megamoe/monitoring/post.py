"""POST what comes on standard input to the URL in its first line, and try again where the server fails. Run by its
path; imports nothing but the standard library, so that it starts in a moment."""

import sys
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TIMEOUT, WAITS = 10, (1, 4, 0)  # seconds: of a try, and after each


def main() -> int:
    """0 if the server took it, else 1."""
    url, _, body = sys.stdin.buffer.read().partition(b"\n")
    request = Request(url.decode(), body, {"Content-Type": "application/json", "User-Agent": "megamoe"})
    for wait in WAITS:
        try:
            urlopen(request, timeout=TIMEOUT).close()
            return 0
        except OSError as error:
            if isinstance(error, HTTPError) and error.code < 500 and error.code != 429:  # no other try can help
                return 1
            time.sleep(wait)
    return 1


if __name__ == "__main__":
    sys.exit(main())
