"""What the service and the worker must agree on when the environment says nothing."""

from pathlib import Path

DEFAULT_MODEL = "models/emoji_scenes"
DEFAULT_STORE_URL = f"file://{Path.cwd() / '.safelatent' / 'store'}"


def model_id(source: str) -> str:
    """The id of a checkpoint: a folder's own name, or the hub id as it is.

    `models/...` and paths that begin with `.`, `~` or `/` are folders even where they do not exist:
    the service need not have the checkpoint to know its name.
    """
    is_folder = source.startswith(("models/", ".", "~", "/")) or Path(source).is_dir()
    return Path(source).expanduser().resolve().name if is_folder else source
