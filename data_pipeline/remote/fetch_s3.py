"""Objects in s3:// and gs:// buckets. boto3 finds credentials, region and endpoint and signs a URL for each request; the bytes
come over data_pipeline.remote.fetch_http, so that every fault is handled in one place.

gs:// uses Google's S3-compatible endpoint with the HMAC key in GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY; without one the bucket
is read as a public one over plain HTTPS.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import ConfigError
from data_pipeline.remote.fetch_http import HttpFetcher

GOOGLE = "https://storage.googleapis.com"
EXPIRES_S = 6 * 3600  # a signature is made for each request; only one body must come within this


def s3_fetcher(root: str, config: RemoteConfig) -> HttpFetcher:
    """Objects below s3://bucket/prefix. Without any credentials the bucket is read as a public one."""
    _check_bucket(root)
    endpoint = config.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _signed(root, config, endpoint)


def gs_fetcher(root: str, config: RemoteConfig) -> HttpFetcher:
    """Objects below gs://bucket/prefix."""
    _check_bucket(root)
    endpoint = config.endpoint or GOOGLE
    key, secret = (os.environ.get(name) for name in ("GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY"))
    if key and secret:
        return _signed(root, config, endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name="auto")
    return HttpFetcher(root, config, sign=lambda url: f"{endpoint.rstrip('/')}/{quote('/'.join(_bucket_and_key(url)))}")


def _signed(root: str, config: RemoteConfig, endpoint: str | None, **session: Any) -> HttpFetcher:
    client = _client(endpoint, **session)

    def sign(url: str) -> str:
        bucket, key = _bucket_and_key(url)
        return client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=EXPIRES_S)

    return HttpFetcher(root, config, sign)


def _client(endpoint: str | None, **session: Any) -> Any:
    try:
        import boto3
        import botocore
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ConfigError(
            "data.root is an s3:// or gs:// address, which needs boto3; it is not installed; pip install 'slotstream[s3]'"
        ) from None
    try:
        maker = boto3.Session(**session)
        # Other services than AWS seldom answer to bucket names as host names.
        style = {"addressing_style": "path"} if endpoint else {}
        version = "s3v4" if maker.get_credentials() else botocore.UNSIGNED
        return maker.client("s3", endpoint_url=endpoint, config=Config(signature_version=version, s3=style))
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"{error}; boto3 must find its settings; check AWS_* and data.remote.endpoint") from None


def _check_bucket(root: str) -> None:
    if not urlsplit(root).netloc or "@" in urlsplit(root).netloc:
        scheme = urlsplit(root).scheme
        raise ConfigError(f"data.root: no bucket in a {scheme}:// address; write {scheme}://BUCKET/PREFIX")


def _bucket_and_key(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.netloc, unquote(parts.path.lstrip("/"))


__all__ = ["gs_fetcher", "s3_fetcher"]
