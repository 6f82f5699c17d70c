"""Objects elsewhere: the one door to fsspec. How large they are and of which version, some of their bytes, what there is.

In: addresses, ``s3://BUCKET/KEY``, ``gs://``, ``https://``. Out: ``Described``, bytes, addresses; or an error that says what to do.
Every answer is compared with what was asked for: range, length, version. What fails for a while is asked for again, later and
later; what is refused is not. Neither credentials nor what follows the ``?`` of an address gets into a message.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from featcache.errors import MissingDependencyError, NoAccessError, RefusedImage, SourceError, UsageError
from featcache.system.addresses import shown
from featcache.system.display import quantity

T = TypeVar("T")
log = logging.getLogger("featcache")
CHANGED = "changed while it was read"
_CONNECT, _STALL = 10, 20  # seconds until there is a connection; without a byte on one
_REDIRECTS = 5
_LATER = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be others in a while
_NO_KEYS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}  # come as 400
_PATTERN = re.compile(r"[*?\[]")
_TELLING = re.compile(r"AWS_|GOOGLE_|SSL_|NETRC$|(HTTPS?|ALL|NO)_PROXY$", re.IGNORECASE)  # variables
_AGAIN = "what is finished is kept, and the same command goes on from there"
_S3_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a bucket that everybody may read FSSPEC_S3_ANON=true"
_KEYS = {"s3": _S3_KEYS, "gs": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS gives them"}


class Described(NamedTuple):
    """What is known of a location without reading it.

    Attributes:
        size: bytes. version: text that is another one when the bytes are: of an object its ETag or generation, of a file
            its modification time in ns.
        settled: whether the version will tell; not of something so recent that a later change could carry the same time.
    """

    size: int
    version: str
    settled: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a request is repeated, and how long each may take.

    Attributes:
        tries: of one request; ``first_tries`` while no server has said anything: it may not be there at all.
        first, longest: seconds before the second and before the last; doubled in between, of which a random part, so that
            many readers do not come back at once. A server that says when is believed, up to ``longest``.
        request: seconds that one answer may take, for at most ``readahead.MOST`` bytes.
    """

    tries: int = 9
    first_tries: int = 4
    first: float = 0.25
    longest: float = 30.0
    request: float = 300.0


PATIENT = Patience()


class _AnswerError(Exception):
    """A server said no: the HTTP status, the code of its error if it gives one, and after how many seconds it wants to be asked."""

    def __init__(self, status: int, code: str = "", after: str | None = None) -> None:
        code = re.sub(r"[^ -~]", "?", code)[:60]  # a server may write to nobody's terminal
        super().__init__(f"{status} {code}".strip())
        self.status, self.code = status, code
        self.after = float(after) if after and re.fullmatch(r"\d{1,9}", after) else 0.0


class _ShortError(Exception):
    """An answer is not what was asked for."""


def describe(address: str, patience: Patience = PATIENT) -> Described:
    """The size and version of the object at ``address``.

    Raises:
        RefusedImage: there is none. SourceError: no access, no bucket, no answer. MissingDependencyError.
    """
    store = store_of(address)
    found: Described = submit(
        store, _patiently(store, functools.partial(store.describe, address), address, patience)
    ).result()
    return found


def start_fetch(
    address: str, start: int, stop: int, described: Described, patience: Patience = Patience()
) -> concurrent.futures.Future[bytes]:
    """Begin to fetch the bytes ``start`` to ``stop`` of an object of the version ``described``. Errors as of ``describe``."""
    store = store_of(address)
    get = functools.partial(store.fetch, address, start, stop, described)
    return submit(store, _patiently(store, get, address, patience))


def find(pattern: str, most: int, patience: Patience = PATIENT) -> list[str]:
    """The addresses that match ``pattern``, in order; what ends in ``/`` means everything directly in there.

    Raises:
        UsageError: there are more than ``most``, or such a place has no listing. SourceError, MissingDependencyError: as ``describe``.
    """
    store = store_of(pattern)
    return sorted(submit(store, store.find(pattern, most, patience)).result())


def is_pattern(address: str) -> bool:
    """Whether an address means several, and not one whose name holds a ``?``."""
    return address.endswith("/") or bool(re.search(r"\*" if address.startswith("http") else _PATTERN, address))


def has_listing(address: str) -> bool:
    """Whether such a place can say what it has."""
    return not address.startswith("http")


def submit(store: "_Store", work: Any) -> concurrent.futures.Future[Any]:
    """Let a coroutine run beside what this thread does, on fsspec's own loop."""
    return asyncio.run_coroutine_threadsafe(work, store.fs.loop)


# ----------------------------------------------------------------------------------------------------------- patience


async def _patiently(store: "_Store", attempt: Callable[[], Awaitable[T]], address: str, patience: Patience) -> T:
    """What ``attempt`` gives, if need be after several. Raises as ``describe``."""
    started = time.monotonic()
    for number in range(1, patience.tries + 1):
        try:
            async with asyncio.timeout(patience.request):
                result = await attempt()
            store.answered = True
            return result
        except Exception as error:
            store.answered |= _answer(error) is not None
            reason, after = _transient(error, address)
        if number >= (patience.tries if store.answered else patience.first_tries):
            break
        log.log(logging.WARNING if number == 4 else logging.DEBUG, "%s: %s; asking again", shown(address), reason)
        wait = min(patience.longest, patience.first * 2 ** (number - 1)) * random.uniform(0.5, 1)
        await asyncio.sleep(min(patience.longest, max(after, wait)))
    advice = _AGAIN if store.answered else "is the address right, and is there a network?"
    seconds = time.monotonic() - started
    raise SourceError(f"{shown(address)}: {reason}, {quantity(number, 'time')} in {seconds:.0f} s; {advice}")


def _transient(error: Exception, address: str) -> tuple[str, float]:
    """In words, what may pass, and after how many seconds it is to be tried again. Raises what is final."""
    if isinstance(error, RefusedImage | SourceError | UsageError):
        raise error
    kinds = {kind.__name__ for each in (error, error.__cause__, error.__context__) for kind in type(each).__mro__}
    if (answer := _answer(error)) is not None:
        if answer.status not in _LATER and answer.code not in {"SlowDown", "RequestTimeout", "InternalError"}:
            _refuse(answer, address)
        return f"the server answers {answer}", answer.after
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}:
        raise NoAccessError(f"{shown(address)} needs credentials, and there are none; {_keys(address)}") from error
    if kinds & {"ProfileNotFound", "SSOError", "DefaultCredentialsError", "RefreshError"}:
        raise SourceError(f"{shown(address)}: {_words(error)}; {_keys(address)}") from error
    if kinds & {"ClientConnectorCertificateError", "ClientSSLError", "SSLError", "SSLCertVerificationError"}:
        reason = "its certificate is not trusted on this machine; SSL_CERT_FILE or AWS_CA_BUNDLE names one that is"
        raise SourceError(f"{shown(address)}: {reason}") from error
    if kinds & {"TimeoutError", "ReadTimeoutError", "ConnectTimeoutError"}:
        return "no answer in time", 0
    if kinds & {"_ShortError", "IncompleteRead", "IncompleteReadError", "ClientPayloadError", "ResponseStreamingError"}:
        return "the answer was cut off", 0
    if (
        kinds & {"ClientError", "HTTPClientError", "ConnectionError", "ResponseParserError"}
        and "InvalidURL" not in kinds
    ):
        return f"no connection ({type(error).__name__})", 0
    raise SourceError(f"{shown(address)}: {_words(error)}") from error


def _answer(error: Exception) -> _AnswerError | None:
    """What the server said, if that is what is wrong."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(each, _AnswerError):
            return each
        if isinstance(response, dict) and (meta := response.get("ResponseMetadata")):  # botocore
            code = str(response.get("Error", {}).get("Code", ""))
            return _AnswerError(
                int(meta.get("HTTPStatusCode", 0)), code, meta.get("HTTPHeaders", {}).get("retry-after")
            )
        if type(each).__name__ == "HttpError":  # gcsfs
            return _AnswerError(int(getattr(each, "code", 0) or 0))
    if isinstance(error, FileNotFoundError | PermissionError):
        return _AnswerError(404 if isinstance(error, FileNotFoundError) else 403)
    return _AnswerError(403) if str(error).startswith("Forbidden") else None  # gcsfs


def _refuse(answer: _AnswerError, address: str) -> NoReturn:
    name = shown(address)
    if answer.code == "NoSuchBucket":
        raise SourceError(f"{name}: there is no bucket of this name; look for it with `aws s3 ls`")
    if answer.status == 404 or answer.code in {"NoSuchKey", "404"}:
        raise RefusedImage("cannot be read: there is no such object")
    if answer.status == 412:
        raise RefusedImage(CHANGED)
    if answer.code == "InvalidObjectState":
        raise RefusedImage("cannot be read: it is archived (Glacier); restore it first")
    if answer.status in (401, 403, 407) or answer.code in _NO_KEYS:
        place = "proxy" if answer.status == 407 else "server"
        raise NoAccessError(f"{name}: the {place} refuses access ({answer}); {_keys(address)}")
    raise SourceError(f"{name}: the server answers {answer}; expected the object")


def _keys(address: str) -> str:
    """What to set, in words."""
    other = "credentials for this host go into ~/.netrc, a signed address may have expired"
    return _KEYS.get(address.partition("://")[0], other)


def _words(error: Exception) -> str:
    """An error of a library in words, on one line, without what may be credentials."""
    text = re.sub(r"(?<=//)[^/@\s]*@|\?\S*", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# ------------------------------------------------------------------------------------------------------------- stores


class _Store:
    """A place that fsspec knows, as gs://: nothing but what every one of its file systems has."""

    def __init__(self, scheme: str) -> None:
        self.fs = _file_system(scheme, **self.settings())
        self.answered = False  # whether there is anybody

    def settings(self) -> dict[str, Any]:
        """For the file system."""
        return {}

    async def describe(self, address: str) -> Described:
        """Size and version."""
        info = await self.fs._info(address)
        self.fs.invalidate_cache()
        version = next((str(info[key]) for key in ("generation", "etag", "ETag", "md5Hash") if info.get(key)), "")
        if info.get("type") != "file":
            raise FileNotFoundError
        return _described(int(info["size"]), version, address)

    async def fetch(self, address: str, start: int, stop: int, described: Described) -> bytes:
        """Some bytes. The version is looked at afterwards: it was the same before."""
        data = bytes(await self.fs._cat_file(address, start=start, end=stop))
        if await self.describe(address) != described:
            raise RefusedImage(CHANGED)
        return _whole(data, stop - start)

    async def find(self, pattern: str, most: int, patience: Patience) -> list[str]:
        """The addresses that match."""
        glob = f"{pattern}*" if pattern.endswith("/") else pattern
        found = await _patiently(self, lambda: self.fs._glob(glob, detail=True), pattern, patience)
        names = [name for name, info in found.items() if info.get("type") == "file"]
        _check_number(len(names), most, pattern)
        return [f"{pattern.partition('://')[0]}://{name}" for name in names]


class _S3(_Store):
    """Amazon's, and what speaks its language (``AWS_ENDPOINT_URL``)."""

    def __init__(self, scheme: str) -> None:
        super().__init__(scheme)
        self.fs.retries = 1  # repeating is _patiently's

    def settings(self) -> dict[str, Any]:
        retries = {"total_max_attempts": 1, "mode": "standard"}
        config = {"connect_timeout": _CONNECT, "read_timeout": _STALL, "retries": retries, "max_pool_connections": 32}
        return {"config_kwargs": config}

    async def describe(self, address: str) -> Described:
        # By a read, not by HEAD, whose answers cannot say whether it is the bucket that is missing, or the right.
        try:
            head, _ = await self._get(address, "bytes=0-0")
        except Exception as error:
            if (answer := _answer(error)) is None or answer.status != 416:
                raise
            return _described(0, '"d41d8cd98f00b204e9800998ecf8427e"', address)  # there is no first byte
        return _described(_total(head.get("ContentRange")), str(head.get("ETag") or ""), address)

    async def fetch(self, address: str, start: int, stop: int, described: Described) -> bytes:
        head, data = await self._get(address, f"bytes={start}-{stop - 1}")
        _check_version(str(head.get("ETag") or ""), _total(head.get("ContentRange")), described)
        return _whole(data, stop - start)

    async def _get(self, address: str, wanted: str) -> tuple[Mapping[str, Any], bytes]:
        bucket, key = _bucket_key(address)
        head = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted)
        async with head["Body"] as body:
            _check_range(head.get("ContentRange"), head.get("ContentLength"), wanted)
            return head, await body.read()

    async def find(self, pattern: str, most: int, patience: Patience) -> list[str]:
        bucket, key = _bucket_key(f"{pattern}*" if pattern.endswith("/") else pattern)
        prefix = _PATTERN.split(key)[0]
        fits = re.compile(fnmatch.translate(key).replace(".*", "[^/]*"), re.DOTALL)
        found: list[str] = []
        async for name in self._keys(bucket, prefix, pattern, patience):
            if fits.match(name) and not name.endswith("/"):
                found.append(f"s3://{bucket}/{name}")
                _check_number(len(found), most, pattern)
        return found

    async def _keys(self, bucket: str, prefix: str, pattern: str, patience: Patience) -> AsyncIterator[str]:
        more: dict[str, str] = {}
        while True:
            words = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **more}
            page = await _patiently(
                self, functools.partial(self.fs._call_s3, "list_objects_v2", **words), pattern, patience
            )
            for entry in page.get("Contents", ()):
                yield str(entry["Key"])
            if not page.get("IsTruncated") or not (token := page.get("NextContinuationToken")):
                return
            more = {"ContinuationToken": token}


class _Web(_Store):
    """A web server: what it says about range, length and version is all there is."""

    def settings(self) -> dict[str, Any]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_STALL)
        # The bytes as they lie there; proxies and passwords as the environment and ~/.netrc say.
        return {"client_kwargs": {"trust_env": True, "auto_decompress": False, "timeout": timeout}}

    async def describe(self, address: str) -> Described:
        async with self._get(address, "bytes=0-0") as answer:
            if answer.status == 200:
                reason = "the server gives it only whole, not in pieces"
                raise SourceError(f"{shown(address)}: {reason}; save it first: `curl -LO {shown(address)}`")
            size, version = _total(answer.headers.get("Content-Range")), _web_version(answer.headers)
            return _described(size, version, address)._replace(settled="ETag" in answer.headers)

    async def fetch(self, address: str, start: int, stop: int, described: Described) -> bytes:
        async with self._get(address, wanted := f"bytes={start}-{stop - 1}") as answer:
            said = answer.headers.get("Content-Range")
            if answer.status == 206:
                _check_version(_web_version(answer.headers), _total(said), described)
            _check_range(said, answer.headers.get("Content-Length"), wanted)
            return _whole(await answer.read(), stop - start)

    async def find(self, pattern: str, most: int, patience: Patience) -> list[str]:
        advice = "name each file, as train-{000..009}.tar"
        raise UsageError(f"{shown(pattern)}: a web server has no listing of its files; {advice}")

    @contextlib.asynccontextmanager
    async def _get(self, address: str, wanted: str) -> AsyncIterator[Any]:
        """The answer, after redirects: never from an encrypted connection to one that is not."""
        import yarl

        session, headers = await self.fs.set_session(), {"Range": wanted, "Accept-Encoding": "identity"}
        first = url = yarl.URL(address, encoded=address.isascii() and " " not in address)
        for _ in range(_REDIRECTS + 1):
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status in (301, 302, 303, 307, 308) and (place := answer.headers.get("Location")):
                    url = answer.url.join(yarl.URL(place))
                    if url.scheme not in ("https", first.scheme) or url.scheme not in ("http", "https"):
                        raise SourceError(
                            f"{shown(address)}: the server sends on to {shown(str(url))}, which is no encrypted place"
                        )
                    if url.origin() == first.origin() and first.user:
                        url = url.with_user(first.user).with_password(first.password)
                    continue
                if answer.status == 416 and answer.headers.get("Content-Range", "").endswith("*/0"):
                    raise RefusedImage("cannot be read: it is empty")
                if answer.status not in (200, 206):
                    raise _AnswerError(answer.status, answer.reason or "", answer.headers.get("Retry-After"))
                yield answer
                return
        raise SourceError(f"{shown(address)}: the server sends on more than {_REDIRECTS} times")


def store_of(address: str) -> _Store:
    """The place that an address is in, reached as the environment says now. Raises MissingDependencyError."""
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if _TELLING.match(name)))
    return _store(address.partition("://")[0], environment)


@functools.lru_cache(maxsize=8)
def _store(scheme: str, _: tuple[tuple[str, str], ...]) -> _Store:
    kinds: dict[str, type[_Store]] = {"s3": _S3, "http": _Web, "https": _Web}
    try:
        return kinds.get(scheme, _Store)(scheme)
    except ImportError as error:
        packages = "'featcache[remote]'" + (" gcsfs" if scheme in ("gs", "gcs") else "")
        raise MissingDependencyError(f"{scheme}:// needs fsspec: pip install {packages}") from error


def _file_system(scheme: str, **settings: Any) -> Any:
    import fsspec

    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **settings)


def _bucket_key(address: str) -> tuple[str, str]:
    bucket, _, key = address.partition("://")[2].partition("/")
    if not re.fullmatch(r"[\w.:-]+", bucket):  # a user and password, for one
        raise SourceError(f"{shown(address)}: no name of a bucket; expected s3://BUCKET/KEY; {_S3_KEYS}")
    return bucket, key


# ------------------------------------------------------------------------------------------------- what an answer says


def _described(size: int, version: str, address: str) -> Described:
    if not version:
        reason = "the server gives neither ETag nor time of change, so that a change would go unnoticed"
        raise SourceError(f"{shown(address)}: {reason}; save it as a file first")
    return Described(size, version)


def _check_version(version: str, size: int, described: Described) -> None:
    if (size, version) != described[:2]:
        raise RefusedImage(CHANGED)


def _total(content_range: str | None) -> int:
    """The size of the whole, of ``bytes 0-9/SIZE``."""
    found = re.fullmatch(r"bytes \d+-\d+/(\d{1,18})", content_range or "")
    if not found:
        raise _ShortError
    return int(found[1])


def _check_range(content_range: str | None, length: object, wanted: str) -> None:
    """Raise _ShortError unless an answer holds the ``wanted`` bytes, before they are read."""
    start, stop = map(int, wanted.removeprefix("bytes=").split("-"))
    if not (content_range or "").startswith(f"bytes {start}-{stop}/") or str(length) != str(stop - start + 1):
        raise _ShortError


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise _ShortError
    return data


def _web_version(headers: Mapping[str, str]) -> str:
    return " ".join(filter(None, (headers.get("ETag"), headers.get("Last-Modified"))))


def _check_number(found: int, most: int, pattern: str) -> None:
    if found > most:
        raise UsageError(f"{shown(pattern)} means more than {most:,} files; give a narrower one")
