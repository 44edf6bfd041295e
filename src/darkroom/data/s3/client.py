"""How the project talks to S3: the usual AWS environment, bounded waiting, and errors that say what to do."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from darkroom.errors import InputError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECT_SECONDS, _READ_SECONDS = 5, 30
_LONGEST_PAUSE = 20.0  # seconds between two attempts


def parse_uri(uri: str, setting: str) -> tuple[str, str]:
    """Bucket and prefix, the latter without slashes at its ends.

    Raises InputError for what is no such URI; `setting` says where it came from.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    parts = prefix.split("/") if prefix else []
    is_bucket = uri.startswith("s3://") and re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket)
    if not is_bucket or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{setting} = {uri!r}: expected s3://bucket/prefix")
    return bucket, prefix


@contextmanager
def connected(
    uri: str, bucket: str, needs: str, *, at_once: int = 10, attempts: int = 3, client: "S3Client | None" = None
) -> Iterator["S3Client"]:
    """A client, `client` if it is given, whose errors arrive as InputErrors that name the URI.

    `needs` are the actions that its credentials must allow, `at_once` the number of requests in parallel. What the
    server is to blame for (5xx, throttling, connections that break) is asked again up to `attempts` times in all, after
    pauses that grow.
    """
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from botocore.config import Config
    from botocore.parsers import ResponseParserError

    endpoint = "S3"
    try:
        if client is None:
            client = boto3.Session().client(
                "s3",
                config=Config(
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=_READ_SECONDS,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    max_pool_connections=at_once,
                ),
            )
            _repeat_429(client, attempts)
        endpoint = _host(client.meta.endpoint_url)
        yield client
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise InputError(
            f"{uri}: no AWS credentials ({_one_line(error)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None
    except exceptions.ClientError as error:
        raise InputError(f"{uri}: {_refusal(error, bucket, endpoint, needs)}") from None
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
        # Its own text repeats the URL with all that is in it.
        reason = type(error).__name__
        raise InputError(f"{uri}: cannot reach {endpoint} ({reason}); AWS_ENDPOINT_URL sets the endpoint") from None
    except ResponseParserError:  # its own text repeats the answer
        raise InputError(f"{uri}: {_no_s3(endpoint)}") from None
    except (exceptions.BotoCoreError, Boto3Error, ValueError) as error:
        raise InputError(f"{uri}: {_one_line(error)}") from None


def _repeat_429(client: "S3Client", most: int) -> None:
    """botocore knows throttling by S3's 503 and by names of errors; other servers say 429 and what they like."""

    def pause(response: tuple[Any, Any] | None, attempts: int, **_: object) -> Any:
        if response is None or response[0].status_code != 429 or attempts >= most:
            return None
        return random.uniform(0.5, 1) * min(2 ** (attempts - 1), _LONGEST_PAUSE)

    client.meta.events.register_last("needs-retry.s3", pause)


def _refusal(error: Any, bucket: str, endpoint: str, needs: str) -> str:
    """What the server said, in the reader's words."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return f"no bucket {bucket!r} at {endpoint}"
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return f"{endpoint} refuses these credentials ({code}); they need {needs} on {bucket!r}"
    # botocore makes a 500 without S3's own word for it of any answer that it cannot read.
    if error.operation_name.startswith("List") and (status in (404, 405) or code == "500"):
        return _no_s3(endpoint)
    if status == 429 or status >= 500:
        return f"{endpoint} is overloaded or out of order ({code}), as often as it was asked; try again later"
    if code in ("PreconditionFailed", "412", "NoSuchKey", "404"):
        return "an object was changed or deleted while it was fetched; run the stage again"
    return _one_line(error)


def _no_s3(endpoint: str) -> str:
    return f"{endpoint} does not answer as S3 does; AWS_ENDPOINT_URL sets the endpoint"


def _host(url: str) -> str:
    """The endpoint without what a URL may carry beside it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
