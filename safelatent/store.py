"""Where images live: a folder, S3, GCS or Azure, through obstore. Writes are atomic."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from safelatent import errors

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
KEY = re.compile(r"[A-Za-z0-9_-]{1,64}/[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def image_key(id: str, index: int, sha256: str, image_format: str) -> str:
    """Where an image is stored. Its content is in its name: when a generation is made twice, after
    a crash, neither can ever overwrite what the other has reported."""
    return f"{id}/{index}-{sha256[:32]}.{image_format}"


class Store:
    """Bytes by key; a key is `<generation id>/<name>`.

    `url` is file:///folder (made when missing), s3://bucket/prefix, gs://, az:// or memory://;
    credentials come from the environment, as obstore reads it. Raises StoreUnavailable.
    """

    def __init__(self, url: str):
        if url.startswith("file://"):
            folder = Path(url.removeprefix("file://"))
            folder.mkdir(parents=True, exist_ok=True)
            self._store: ObjectStore = LocalStore(folder, automatic_cleanup=True)
        else:
            try:
                self._store = from_url(url)
            except BaseError as error:
                raise ValueError(f"{url!r} is no store: {str(error).splitlines()[0]}") from error

    def put(self, key: str, content: bytes) -> None:
        """Write all of it or nothing: a reader never sees a part."""
        try:
            self._store.put(self._checked(key), content)
        except (BaseError, OSError) as error:
            raise errors.StoreUnavailable(f"cannot write {key}: {error}") from error

    def get(self, key: str) -> bytes:
        """Read a key; NotFound when there is none."""
        try:
            return bytes(self._store.get(self._checked(key)).bytes())
        except FileNotFoundError as error:
            raise errors.NotFound(f"there is no {key}, or it has expired") from error
        except (BaseError, OSError) as error:
            raise errors.StoreUnavailable(f"cannot read {key}: {error}") from error

    def delete(self, id: str) -> None:
        """Remove all that a generation has left here."""
        try:
            for metas in self._store.list(f"{self._checked(f'{id}/all').split('/')[0]}/"):
                self._store.delete([meta["path"] for meta in metas])
        except FileNotFoundError:
            pass  # someone else was faster
        except (BaseError, OSError) as error:
            raise errors.StoreUnavailable(f"cannot delete {id}: {error}") from error

    def older_than(self, seconds: float) -> Iterator[str]:
        """Ids of the generations whose newest file is older, by the store's clock and ours.

        A folder whose name is no generation's id is somebody else's.
        """
        latest = datetime.now(UTC) - timedelta(seconds=seconds)
        try:
            for folder in self._store.list_with_delimiter()["common_prefixes"]:
                if not ID.fullmatch(folder.rstrip("/")):
                    continue
                metas = [meta for page in self._store.list(f"{folder}/") for meta in page]
                if all(meta["last_modified"] < latest for meta in metas):
                    yield folder.rstrip("/")
        except (BaseError, OSError) as error:
            raise errors.StoreUnavailable(f"cannot list: {error}") from error

    @staticmethod
    def _checked(key: str) -> str:
        if not KEY.fullmatch(key):
            raise errors.NotFound(f"{key!r} is no key of the store")
        return key
