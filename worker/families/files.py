"""The files of a checkpoint: where they are, whether they are whole, and their revision."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from worker.families import UnusableModel

PARTS = (
    "tokenizer",
    "text_encoder",
    "unet",
    "vae",
    "scheduler",
    "safety_checker",
    "feature_extractor",
)
FILES = [f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt", "safetensors")]
SUMS = "SHA256SUMS"
CARD = "README.md"


def find(source: str, revision: str | None = None) -> tuple[Path, str]:
    """The folder of a checkpoint and its revision: the hub's commit, or sha256 of the content.

    With a `revision`, the hub is asked for that commit, tag or branch, and a folder must have that
    content. Weights must be whole, and files must be as the folder's own SHA256SUMS has them.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith(".") or source.count("/") != 1:
            raise UnusableModel(f"there is no folder {source}, and it is no hub id (owner/name)")
        folder = _download(source, revision)
        _refuse_damaged(folder)
        return folder, folder.name
    try:
        sums = checksums(folder)
        _refuse_changed(folder, sums)
    except OSError as error:
        raise UnusableModel(f"cannot read {error.filename}: {error.strerror}") from error
    _refuse_damaged(folder)
    found = content_hash(sums)
    if revision not in (None, found):
        raise UnusableModel(
            f"the files of {folder} have revision {found}, and SAFELATENT_MODEL_REVISION asks for "
            f"{revision}: get that revision, or change the setting"
        )
    return folder, found


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of each file that makes the model, by its name in the folder, sorted."""
    sums = {}
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums[path.relative_to(folder).as_posix()] = digest
    return sums


def content_hash(sums: dict[str, str]) -> str:
    """The revision of a folder: sha256 over the names and the sums of its files."""
    digest = hashlib.sha256()
    for name, file_sum in sums.items():
        digest.update(name.encode() + bytes.fromhex(file_sum))
    return digest.hexdigest()


def licence(folder: Path) -> str | None:
    """`license` of the front matter of the model card; `license_name` where that is "other"."""
    try:
        card = (folder / CARD).read_text(errors="replace")
    except OSError:
        return None
    head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    said = dict(re.findall(r"^(license|license_name):[ \t]*(\S+)", head[1] if head else "", re.M))
    found = said.get("license")
    return said.get("license_name", found) if found == "other" else found


def _download(source: str, revision: str | None) -> Path:
    try:
        got = snapshot_download(
            source, revision=revision, allow_patterns=[*FILES, CARD], ignore_patterns=["*.fp16.*"]
        )
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise UnusableModel(f"there is no folder {source}, and the hub says: {said}") from error
    return Path(got)


def _refuse_changed(folder: Path, sums: dict[str, str]) -> None:
    """Compare with SHA256SUMS, as `sha256sum` writes it, where there is one."""
    listed = folder / SUMS
    if not listed.is_file():
        return
    for line in listed.read_text().splitlines():
        expected, _, name = line.partition(" ")
        name = name.lstrip(" *").removeprefix("./")
        if name in sums and sums[name] != expected.lower():
            raise UnusableModel(
                f"{folder / name} is not the file that {SUMS} beside it names: it was changed or "
                "did not arrive whole; get it again"
            )


def _refuse_damaged(folder: Path) -> None:
    """Read the header of each file of weights, which says how long the file must be."""
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name not in PARTS:
            continue
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise UnusableModel(
                f"{path} is damaged or did not arrive whole ({said}): get it again"
            ) from error
