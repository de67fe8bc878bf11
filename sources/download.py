"""Downloads a file. Tells apart a machine without a network, which has another way, from a server that refuses."""

import multiprocessing
import os
import ssl
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from configurator import UserError
from machine.terminal import progress

CONNECT_SECONDS = 5
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, ssl.SSLError, TimeoutError, multiprocessing.TimeoutError)


class Offline(UserError):
    """A download failed, most likely because there is no network."""


def download(url, path):
    """Downloads `url` to `path`, atomically. Raises Offline if the network fails, and UserError for an HTTP error."""
    from sources.texts import writing
    print(f"downloading {url}", flush=True)
    try:
        with ThreadPool(1) as pool:  # a DNS lookup has no timeout of its own
            stream = pool.apply_async(urlopen, (url, None, CONNECT_SECONDS)).get(CONNECT_SECONDS + 1)
        new, size = path.with_name(f"{path.name}.new"), getattr(stream, "length", None)
        with writing(path.parent):
            with stream, open(new, "wb") as file, progress(size, path.name, "B") as bar:
                while piece := stream.read(1 << 16):
                    bar.update(file.write(piece))
            if getattr(stream, "length", 0):  # the number of bytes that are still missing
                raise ConnectionError("the download broke off")
            os.replace(new, path)
    except HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}") from None
    except UserError:
        raise
    except (*NETWORK_ERRORS, ValueError) as error:  # ValueError: not a URL
        reason = str(getattr(error, "reason", error)) or f"no answer in {CONNECT_SECONDS} s"
        raise Offline(f"{url} can't be reached: {reason}") from None
