"""Where images live: a folder, S3, GCS or Azure, through obstore. Writes are atomic."""

import re
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from safelatent import errors

KEY = re.compile(r"[A-Za-z0-9_-]{1,64}/[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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

    @staticmethod
    def _checked(key: str) -> str:
        if not KEY.fullmatch(key):
            raise errors.NotFound(f"{key!r} is no key of the store")
        return key
