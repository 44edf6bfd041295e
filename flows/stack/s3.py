"""A test server that speaks S3, for incoming data: moto, with its objects kept on disk so that a restart finds them.

`python -m flows.stack.s3 DIRECTORY`, with S3_PORT and S3_BUCKET set. It checks no credentials and keeps no versions or
metadata, and a kill costs what came in the last seconds: it is there to try things out on one machine. Production has
an S3.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.files import digest_bytes, read_json, write_bytes, write_json
from flows.stack.settings import HOST

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_INTERVAL = 2.0  # seconds between two looks for what is new

Index = dict[str, dict[str, dict[str, str]]]  # bucket -> key -> the object's ETag, and the digest that names its file


def load(client: "S3Client", directory: Path) -> Index:
    """Put every object that is in `directory`."""
    index: Index = read_json(directory / "index.json") if (directory / "index.json").exists() else {}
    for bucket, objects in index.items():
        client.create_bucket(Bucket=bucket)
        for key, entry in objects.items():
            body = (directory / entry["file"]).read_bytes()
            entry["etag"] = client.put_object(Bucket=bucket, Key=key, Body=body)["ETag"]
    return index


def save(client: "S3Client", directory: Path, known: Index) -> Index:
    """Write what is not as it is `known`; returns what is on disk now."""
    index: Index = {}
    for bucket in (found["Name"] for found in client.list_buckets()["Buckets"]):
        index[bucket] = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", []):
                key, etag = found["Key"], found["ETag"]
                entry = known.get(bucket, {}).get(key)
                if entry is None or entry["etag"] != etag:
                    with suppress(client.exceptions.NoSuchKey):  # deleted meanwhile
                        body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
                        entry = {"etag": etag, "file": digest_bytes(body)}
                        write_bytes(directory / entry["file"], body)
                if entry is not None:
                    index[bucket][key] = entry
    if index != known:
        write_json(directory / "index.json", index)
        for file in _files(known) - _files(index):
            (directory / file).unlink(missing_ok=True)
    return index


def _files(index: Index) -> set[str]:
    return {entry["file"] for objects in index.values() for entry in objects.values()}


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT."""
    directory, port = Path(arguments[0]), int(os.environ["S3_PORT"])
    directory.mkdir(parents=True, exist_ok=True)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line for each request, those of `save` too
    # On a port that nobody knows: half of the objects would look like data from which the others were removed.
    with _serving(0) as client:
        known = load(client, directory)
        if os.environ["S3_BUCKET"] not in known:
            client.create_bucket(Bucket=os.environ["S3_BUCKET"])

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with _serving(port) as client:
        while not stopping.wait(_INTERVAL):
            known = save(client, directory, known)
        save(client, directory, known)
    return 0


@contextmanager
def _serving(port: int) -> "Iterator[S3Client]":
    """A server, and a client for it; all servers of a process have the same objects."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=HOST, port=port, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        # In another region a new bucket would have to be told where it is.
        yield boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
