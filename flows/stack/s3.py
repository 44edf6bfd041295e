"""A test server that speaks S3, for incoming data: moto, with its objects kept on disk so that a restart finds them.

`python -m flows.stack.s3 DIRECTORY`, with S3_PORT, S3_BUCKET and AWS_ACCESS_KEY_ID set. It checks no signatures and
keeps no versions or metadata, and a kill costs what came in the last seconds: it is there to try things out on one
machine. Production has an S3.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from darkroom.files import digest_bytes, read_json, write_bytes, write_json
from flows.stack.guard import refusal
from flows.stack.settings import HOST

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from mypy_boto3_s3 import S3Client

HEALTH = "/_health"  # no bucket can be called so
_NOT_S3 = ("/moto-api", "/latest/")
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
    os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"  # moto's default lets every page read
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
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    guarded = guard(DomainDispatcherApplication(create_backend_app), os.environ["AWS_ACCESS_KEY_ID"])
    server = make_server(HOST, port, guarded, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        # In another region a new bucket would have to be told where it is.
        yield boto3.client("s3", endpoint_url=f"http://{HOST}:{server.port}", region_name="us-east-1")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def guard(application: "WSGIApplication", key: str) -> "WSGIApplication":
    """`application` for programs that sign with the access key `key`: for no page, and nothing but S3.

    Signatures are not checked. What moto offers beside S3, such as a reset of everything, is closed.
    """

    def answer(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        headers = {n[5:].lower().replace("_", "-"): str(v) for n, v in environ.items() if n.startswith("HTTP_")}
        reason = refusal(environ["REQUEST_METHOD"], headers)
        if reason is None and environ["PATH_INFO"] == HEALTH:
            start("200 OK", [("Content-Type", "text/plain")])
            return [b"well\n"]
        if reason is None and not _signed(headers.get("authorization"), environ.get("QUERY_STRING", ""), key):
            reason = "not signed with this server's access key"
        if reason is None and environ["PATH_INFO"].startswith(_NOT_S3):
            reason = "not S3"
        if reason is None:
            return application(environ, start)
        start("403 Forbidden", [("Content-Type", "text/plain")])
        return [f"Refused: {reason}\n".encode()]

    return answer


def _signed(authorization: str | None, query: str, key: str) -> bool:
    """Whether a header or a presigned URL names the key, as AWS's signature of version 4 for S3 does."""
    if authorization is None:
        (credential,) = parse_qs(query).get("X-Amz-Credential", [""])[:1]
    else:
        found = re.match(r"AWS4-HMAC-SHA256 Credential=([^,\s]+)", authorization)
        credential = found[1] if found else ""
    name, *scope = credential.rsplit("/", 4)
    return name == key and len(scope) == 4 and scope[2:] == ["s3", "aws4_request"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
