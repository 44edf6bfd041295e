"""Buckets that fail: the good folder below a prefix, behind a server with a fault."""

import os
from collections.abc import Callable
from itertools import count

import boto3

from tests.corpus.cases import Case, Project
from tests.s3 import Fault, Request, first

BUCKET = "corpus"
BAD = "ant/0.png"


def prefix(project: Project) -> None:
    """The folder as a prefix; the bucket is there, empty."""
    client = boto3.client("s3")
    for file in sorted(project.images.rglob("*.png")):
        client.upload_file(str(file), BUCKET, f"raw/{file.relative_to(project.images)}")
    project.change("data", source=f"s3://{BUCKET}/raw")


def no_credentials(project: Project) -> None:
    prefix(project)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.pop(name)  # which the fixture gives back


def no_bucket(project: Project) -> None:
    project.change("data", source="s3://no-such-bucket/raw")


def no_server(project: Project) -> None:
    prefix(project)
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"


def empty(project: Project) -> None:
    project.change("data", source=f"s3://{BUCKET}/nothing")


def escaping_key(project: Project) -> None:
    prefix(project)
    boto3.client("s3").put_object(Bucket=BUCKET, Key="raw/ant/../../../evil.png", Body=b"x")


def when_read(act: Callable[[], object]) -> Callable[[Request], Fault | None]:
    """Do something to the bucket when the object is asked for first."""
    asked = count()

    def fault(request: Request) -> Fault | None:
        if request.method == "GET" and request.path.split("?")[0].endswith(BAD) and next(asked) == 0:
            act()
        return None

    return fault


def overwrite() -> None:
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"raw/{BAD}", Body=b"another")


def delete() -> None:
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=f"raw/{BAD}")


CUT, NOTHING, FLIPPED = Fault(keep=20), Fault(keep=0), Fault(flip=30)
SLOW, BROKEN = Fault(503, "SlowDown"), Fault(500, "InternalError")
CASES = [
    Case(
        "S3: object changes while read",
        "refused",
        rf"{BAD}: changed while it was fetched",
        prefix,
        when_read(overwrite),
    ),
    Case("S3: object vanishes while read", "refused", rf"{BAD}: deleted while", prefix, when_read(delete)),
    Case("S3: download cut short once", "accepted", BAD, prefix, first(1, CUT, name=BAD)),
    Case("S3: download always cut short", "refused", rf"{BAD}: .* broke off", prefix, first(99, NOTHING, name=BAD)),
    Case("S3: wrong checksum once", "accepted", BAD, prefix, first(1, FLIPPED, name=BAD)),
    Case("S3: wrong checksum twice", "refused", rf"{BAD}: damaged .* twice", prefix, first(2, FLIPPED, name=BAD)),
    Case("S3: error 500 twice", "accepted", BAD, prefix, first(2, BROKEN, name=BAD)),
    Case("S3: error 500 for ever", "refused", r"s3://corpus/raw: .*InternalError", prefix, first(99, BROKEN, name=BAD)),
    Case("S3: throttled, then served", "accepted", BAD, prefix, first(4, SLOW)),
    Case("S3: throttled for ever", "refused", r"s3://corpus/raw: .*SlowDown", prefix, first(999, SLOW)),
    Case("S3: no credentials", "refused", r"no AWS credentials", no_credentials),
    Case("S3: no bucket", "refused", r"no bucket 'no-such-bucket'", no_bucket),
    Case("S3: no server", "refused", r"cannot reach http://127\.0\.0\.1:9", no_server),
    Case("S3: nothing below the prefix", "refused", r"s3://corpus/nothing: no ", empty),
    Case("S3: key that reaches outside", "refused", r"evil\.png' cannot be a file below the folder", escaping_key),
]
