"""S3 through s3fs: retries and timeouts, credentials for other nodes, readable errors."""

import asyncio
import errno
import hashlib
import io
import os
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import aiohttp
import botocore.session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from palindrome.pipeline.base.errors import StoreError
from palindrome.pipeline.base.text import error_message, one_line, single_line

ATTEMPTS = 10  # of a request, including reading its body
ATTEMPTS_UNREACHED = 4  # of a request to an endpoint that has never answered: its name may be wrong
MAX_BACKOFF = 20.0  # seconds; the backoff is random, up to 1 s at first, and its maximum doubles each time
CONFIG: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 20, "max_pool_connections": 96}
MAX_BUFFERED = 256 << 20  # bytes of a body up to which it is read with its request, so that both are retried together
PART = 16 << 20  # bytes per part of a multipart upload

STATIC = ("env", "shared-credentials-file", "config-file")  # providers of credentials that are valid on every node
OWN_KEYS = ("key", "secret", "token", "username", "password", "anon", "session")  # s3fs options that are credentials

MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "404"}
MESSAGES = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied",
    "AllAccessDisabled": "access is denied",
    "Forbidden": "access is denied",
    "403": "access is denied",
    "PermanentRedirect": "the bucket is in another region",
    "301": "the bucket is in another region",
    "InvalidAccessKeyId": "the store does not know the access key id",
    "SignatureDoesNotMatch": "the secret access key is wrong",
    "ExpiredToken": "the session token has expired",
    "TokenRefreshRequired": "the session token has expired",
    "InvalidToken": "the session token is not valid",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "InvalidObjectState": "the object is archived",
    "SlowDown": "the store asks for fewer requests",
    "503": "the store asks for fewer requests",
    "InternalError": "the store fails",
    "500": "the store fails",
}
BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "TokenRefreshRequired"}
BAD_CREDENTIALS |= {"InvalidToken", "RequestTimeTooSkewed", "AuthFailure"}
RETRYABLE = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests"}
RETRYABLE |= {"InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict", "BadDigest"}
CONNECTION_ERRORS: tuple[type[BaseException], ...] = (
    HTTPClientError,
    BotoConnectionError,
    IncompleteReadError,
    FlexibleChecksumError,
)
CONNECTION_ERRORS += (
    ResponseParserError,
    CredentialRetrievalError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSOError, TokenRetrievalError)


class S3(S3FileSystem):
    """s3fs with a single retry loop. Those of s3fs and botocore are nested, with up to 125 attempts and short backoff.

    `config_kwargs` are those of botocore's Config; of `retries`, only the number applies. Raises FileNotFoundError,
    FileExistsError, or a StoreError that names the object. Creates neither buckets nor folders, which S3 does not need.
    """

    def __init__(self, *args: Any, config_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        config = {**CONFIG, **(config_kwargs or {})}
        retries = config.get("retries") or {}
        self.attempts = int(retries.get("total_max_attempts") or retries.get("max_attempts", ATTEMPTS - 1) + 1)
        config["retries"] = {"mode": "legacy", "total_max_attempts": 1}
        kwargs = {"default_block_size": PART, "fixed_upload_size": True, "use_listings_cache": False, **kwargs}
        super().__init__(*args, config_kwargs=config, **kwargs)
        self.answered = False

    async def _call_s3(self, method: str, *given: Mapping[str, Any], **kwargs: Any) -> Any:
        parts = (kwargs.get("Bucket"), (kwargs.get("Key") or kwargs.get("Prefix") or "").rstrip("/"))
        uri = "s3://" + "/".join(filter(None, parts))
        attempts = 0
        while True:
            attempts += 1
            try:
                return await self._try_s3(method, *given, **kwargs)
            except (ClientError, BotoCoreError, aiohttp.ClientError, TimeoutError, ConnectionError) as e:
                error = await self._error_of_head(e, **kwargs) if method.startswith("head_") else e
            if attempts > 1 and _code(error) == "NoSuchUpload" and await self._is_complete(**kwargs):
                return {}
            if _code(error) == "NotImplemented" and kwargs.pop("IfNoneMatch", None):
                continue  # the store has no conditional puts; an existing object has the same content
            refused = isinstance(getattr(error, "kwargs", {}).get("error"), aiohttp.ClientConnectorError)
            most = self.attempts if self.answered or not refused else min(ATTEMPTS_UNREACHED, self.attempts)
            if not _is_retryable(error) or attempts >= most:
                raise _translated(error, uri, self._endpoint(), "IfNoneMatch" in kwargs, attempts) from error
            await asyncio.sleep(random.random() * min(2.0 ** (attempts - 1), MAX_BACKOFF))

    call_s3 = sync_wrapper(_call_s3)

    async def _try_s3(self, method: str, *given: Mapping[str, Any], **kwargs: Any) -> Any:
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        try:
            answer = await call(**self._get_s3_method_kwargs(call, *given, **kwargs))
        except ClientError:
            self.answered = True
            raise
        self.answered = True
        if method == "get_object" and answer.get("ContentLength", 0) <= MAX_BUFFERED:
            body = answer["Body"]
            try:
                answer["Body"] = _Body(await body.read())
            finally:
                body.close()
        return answer

    async def _is_complete(self, **kwargs: Any) -> bool:
        """Whether the object is this upload: an earlier attempt completed it, and the response was lost."""
        try:
            parts = [bytes.fromhex(part["ETag"].strip('"')) for part in kwargs["MultipartUpload"]["Parts"]]
            found = await self._try_s3("head_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"])
        except (ClientError, BotoCoreError, KeyError, ValueError):
            return False
        return bool(found["ETag"].strip('"') == f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}")

    async def _error_of_head(self, error: Exception, **kwargs: Any) -> Exception:
        """The response to HEAD has no body with the reason, so this gets it from a GET of the same object."""
        if _status(error) not in (400, 403):
            return error
        found = {k: kwargs[k] for k in ("Bucket", "Key", "VersionId") if k in kwargs}
        try:
            if "Key" in found:
                await self._try_s3("get_object", Range="bytes=0-0", **found)
            else:
                await self._try_s3("list_objects_v2", MaxKeys=1, **found)
        except ClientError as e:
            return e
        except Exception:  # the error of the HEAD is raised
            pass
        return error

    async def _cat_file(self, path: str, *args: Any, max_concurrency: int | None = None, **kwargs: Any) -> bytes:
        """One GET; s3fs would request the size first."""
        return bytes(await super()._cat_file(path, *args, max_concurrency=max_concurrency or 1, **kwargs))

    def _open(self, path: str, *args: Any, size: int | None = None, **kwargs: Any) -> Any:
        """With `size`, in bytes, no request asks for it, neither now nor, as in s3fs, at the first read."""
        file = super()._open(path, *args, size=size, **kwargs)
        if size is not None:
            file.details = {"name": path, "size": size, "type": "file"}
        return file

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing. s3fs would try to create a bucket that it can't list."""

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing, as _mkdir."""

    mkdir, makedirs = sync_wrapper(_mkdir), sync_wrapper(_makedirs)

    async def _abort_uploads(self, path: str) -> None:
        """Aborts unfinished multipart uploads below a path: listings don't show them, but they are billed."""
        bucket, key, _ = self.split_path(path)
        found = await self._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
        for upload in found.get("Uploads", []):
            with suppress(FileNotFoundError):
                await self._abort_mpu(bucket, upload["Key"], upload["UploadId"])

    abort_uploads = sync_wrapper(_abort_uploads)

    def _endpoint(self) -> str:
        return str(getattr(getattr(self._s3, "meta", None), "endpoint_url", None) or self.endpoint_url or "S3")


class _Body(io.BytesIO):
    """A body that has been read."""

    async def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        return super().read(size)


def _code(error: BaseException) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _status(error: BaseException) -> int:
    found = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
    return int(found.get("HTTPStatusCode", 0))


def _is_retryable(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        status = _status(error)
        return _code(error) in RETRYABLE or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, CONNECTION_ERRORS) and not isinstance(error, NO_CREDENTIALS)


def concerns_store(error: BaseException) -> bool:
    """Whether botocore's error concerns the store as a whole, not the requested object."""
    return _is_retryable(error) or isinstance(error, NO_CREDENTIALS) or _code(error) in BAD_CREDENTIALS


def _translated(error: Exception, uri: str, endpoint: str, exclusive: bool, attempts: int) -> Exception:
    """The error to raise: FileNotFoundError, FileExistsError, a StoreError, or one that s3fs itself handles."""
    outage = concerns_store(error)
    if not isinstance(error, ClientError):
        message = _message(error, endpoint) + (f", {attempts} times" if attempts > 1 else "")
        number = errno.EACCES if isinstance(error, NO_CREDENTIALS) else errno.EIO
        number = errno.EINVAL if isinstance(error, ParamValidationError) else number
        return StoreError(number, message, uri, outage)
    code, answer = _code(error), str(error.response.get("Error", {}).get("Message") or "")
    if exclusive and (code == "PreconditionFailed" or _status(error) == 412):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), uri)
    if code in MISSING and "/" in uri.removeprefix("s3://"):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    if code == "404":
        code = "NoSuchBucket"
    known = translate_boto_error(error, set_cause=False)
    number = getattr(known, "errno", None) or (errno.EACCES if isinstance(known, PermissionError) else errno.EIO)
    if code in ("PreconditionFailed", "412", "InvalidRange", "416"):  # s3fs handles these errors itself
        return known
    bucket = "/".join(uri.split("/")[:3])
    message = f"{MESSAGES.get(code) or single_line(answer) or 'the store refuses'} ({code or _status(error)})"
    message += f", {attempts} times" if attempts > 1 else ""
    return StoreError(number, message, bucket if code == "NoSuchBucket" else uri, outage)


def _message(error: Exception, endpoint: str) -> str:
    if isinstance(error, NO_CREDENTIALS):
        return f"no credentials: {error_message(error)}"
    if isinstance(error, ParamValidationError):
        return "no valid name of a bucket or an object"
    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(error, SSLError):
        return error_message(error)
    if isinstance(error, ConnectTimeoutError) or isinstance(cause, aiohttp.ClientConnectorError):
        reason = getattr(cause, "strerror", None)
        return f"{endpoint} can't be reached" + (f": {reason}" if reason else "")
    if isinstance(error, ReadTimeoutError | TimeoutError):
        return f"{endpoint} does not answer in time"
    if isinstance(error, EndpointConnectionError | HTTPClientError | aiohttp.ClientError | ConnectionError):
        return f"{endpoint} closes the connection"
    return one_line(error)


def for_other_nodes(given: Mapping[str, Any]) -> dict[str, Any]:
    """S3's options, completed from this machine's environment and profiles for use on other nodes: endpoint, region,
    and static credentials. Those of instance roles, SSO and assumed roles expire, so each node gets its own."""
    session = botocore.session.Session(profile=given.get("profile"))
    client, config = dict(given.get("client_kwargs", {})), dict(given.get("config_kwargs", {}))
    found: dict[str, Any] = {}
    if not any(given.get(k) for k in OWN_KEYS) and "aws_access_key_id" not in client:
        found = _static_credentials(session)
    if "endpoint_url" not in given and "endpoint_url" not in client and (url := _configured_endpoint(session)):
        found["endpoint_url"] = url
    if region := session.get_config_variable("region") or os.environ.get("AWS_REGION"):
        client.setdefault("region_name", region)
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        if value := session.get_config_variable(name):
            config.setdefault(name, value)
    if tries := session.get_config_variable("max_attempts"):
        config.setdefault("retries", {"total_max_attempts": int(tries)})
    merged = {**found, **given, "client_kwargs": client, "config_kwargs": config}
    if "key" in found:
        merged.pop("profile", None)  # other nodes may not have it
    return {k: v for k, v in merged.items() if v != {}}


def _static_credentials(session: botocore.session.Session) -> dict[str, Any]:
    """The static credentials of this machine; {} if it has none, or uses credentials that expire."""
    for provider in session.get_component("credential_provider").providers:
        if provider.METHOD in STATIC:
            if (loaded := provider.load()) is not None:
                keys = loaded.get_frozen_credentials()
                named = {"key": keys.access_key, "secret": keys.secret_key, "token": keys.token}
                return {k: v for k, v in named.items() if v}
        elif provider.METHOD == "custom-process":  # loading it would run the process
            if session.get_scoped_config().get("credential_process"):
                return {}
        elif provider.METHOD in ("iam-role", "container-role") or provider.load() is not None:
            return {}
    return {}


def _configured_endpoint(session: botocore.session.Session) -> str | None:
    """The endpoint by botocore's rules: the environment before the profile, S3's own before that of all services."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    profile = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    for_s3, for_all = services.get("s3", {}).get("endpoint_url"), profile.get("endpoint_url")
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or for_s3 or for_all
