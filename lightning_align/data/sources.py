"""What a data path means: a file, a folder, a saved dataset, a hub id or the playground; and the splits it has."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_align.data.files import Row, accepted, format_of, read_rows
from lightning_align.data.records import Kind
from lightning_align.errors import UserError, nearest
from lightning_align.models.sources import HUB_ID, RUN_FILE, hub_reachable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PLAYGROUND = "playground"
# our name of a split, and what it is called elsewhere
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "eval"),
    "test": ("test",),
}
SPLIT_NAME = re.compile(rf"({'|'.join(name for names in SPLITS.values() for name in names)})(?![A-Za-z])", re.I)
# descriptions that lie beside the data of a dataset
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SAVED = ("state.json", "dataset_dict.json")
HUB_NAME = re.compile(rf"({HUB_ID.pattern})(?::([\w.-]+))?")


class Source(NamedTuple):
    """Rows that are yet to be read, the number of files they lie in, and the files beside them that are not read."""

    rows: Iterable[Row]
    files: int = 0
    ignored: Sequence[str] = ()


def open_source(path: str, kind: Kind, split: str, playground: Mapping[str, Any] | None) -> Source:
    """The rows of a data path; see ``readers.load_records`` for the arguments."""
    split = check_split(split)
    what = _what(path)
    if what == "playground":
        return Source(_playground_rows(kind, split, playground or {}))
    if playground:
        raise UserError(f"playground options ({', '.join(playground)}) have no meaning for {path}")
    file = Path(path).expanduser()
    if what == "file":
        if format_of(file) == ".txt" and kind != "text":
            raise UserError(f"{path} holds plain text: it can be read as records of kind text only, not {kind}")
        return Source(read_rows(file, file.name), 1)
    if what == "folder":
        return _folder(file, kind, split)
    dataset = _saved(file) if what == "saved" else _hub(path)
    return Source(_dataset_rows(_part(dataset, split, path)))


def available_splits(path: str, kind: Kind) -> tuple[str, ...]:
    """Which of ``train``, ``val`` and ``test`` a source itself tells apart; none if it is all one."""
    what = _what(path)
    if what == "playground":
        return tuple(SPLITS)
    if what == "file":
        return ()
    file = Path(path).expanduser()
    if what == "folder":
        found = {_split_of_file(file, name) for name in _data_files(file, kind)[0]}
        return () if None in found else tuple(split for split in SPLITS if split in found)
    dataset = _saved(file) if what == "saved" else _hub(path)
    names = {split_of(name) for name in dataset} if isinstance(dataset, dict) else set()
    return tuple(split for split in SPLITS if split in names)


def check_split(split: str) -> str:
    """``train``, ``val`` or ``test``, for any of their names."""
    known = {name: ours for ours, names in SPLITS.items() for name in names}
    if split not in known:
        raise UserError(f"unknown split {split!r}{nearest(split, known)} (there are {', '.join(SPLITS)})")
    return known[split]


def split_of(name: str) -> str | None:
    """The split that a name begins with: ``validation-00000-of-00001.parquet`` is ``val``."""
    match = SPLIT_NAME.match(name)
    return check_split(match.group(1).lower()) if match else None


def _what(path: str) -> Literal["playground", "file", "folder", "saved", "hub"]:
    if not path:
        raise UserError("the path of the data is empty")
    if path == PLAYGROUND:
        return "playground"
    file = Path(path).expanduser()
    if file.is_file():
        return "file"
    if file.is_dir():
        return "saved" if any((file / name).is_file() for name in SAVED) else "folder"
    if format_of(file) is None and HUB_NAME.fullmatch(path):
        return "hub"
    raise UserError(f"{path}: there is no such file or folder{_neighbour(path)}")


def _neighbour(path: str) -> str:
    """What the name may be a misspelling of."""
    file = Path(path).expanduser()
    names = [other.name for other in file.parent.glob("[!.]*")]
    return nearest(file.name, [*names, PLAYGROUND])


# ---------------------------------------------------------------------------------------------------- playground
def _playground_rows(kind: Kind, split: str, options: Mapping[str, Any]) -> Iterator[Row]:
    from lightning_align.playground import records

    known = [name for name in inspect.signature(records).parameters if name not in ("kind", "split")]
    for name in options:
        if name not in known:
            raise UserError(f"the playground has no option {name!r}{nearest(name, known)} (it has {', '.join(known)})")
    try:
        made = records(kind, split=split, **options)
    except TypeError as error:
        raise UserError(f"playground: an option has a value of the wrong type: {error}") from error
    return (Row(f"playground record {number}", record) for number, record in enumerate(made, 1))


# -------------------------------------------------------------------------------------------------------- folders
def _folder(folder: Path, kind: Kind, split: str) -> Source:
    files, ignored = _data_files(folder, kind)
    splits = {name: _split_of_file(folder, name) for name in files}
    if None not in splits.values():
        files = [name for name in files if splits[name] == split]
        if not files:
            there = ", ".join(sorted({str(found) for found in splits.values()}))
            raise UserError(f"{folder} has no files of the split {split}: by their names there is {there}")
        ignored = [*ignored, *(name for name in splits if splits[name] != split)]
    rows = (row for name in files for row in read_rows(folder / name, name))
    return Source(rows, len(files), ignored)


def _data_files(folder: Path, kind: Kind) -> tuple[list[str], list[str]]:
    """Names of the files that hold records, sorted, and of those that do not."""
    if (folder / RUN_FILE).is_file():
        raise UserError(f"{folder} is a run directory: give the file of records in it")
    paths = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    files = [name for name in names if _holds_records(Path(name), kind)]
    if not files:
        raise UserError(f"{folder} has no file of {kind} records in it: accepted are {accepted()}")
    return files, [name for name in names if name not in files]


def _holds_records(file: Path, kind: Kind) -> bool:
    suffix = format_of(file)
    return suffix is not None and file.name not in DESCRIPTIONS and (suffix != ".txt" or kind == "text")


def _split_of_file(folder: Path, name: str) -> str | None:
    """A file is of the split that its name or its folder's begins with."""
    parts = Path(name).parts
    return split_of(parts[-1]) or split_of(parts[0])


# ------------------------------------------------------------------------------------------------------- datasets
def _saved(folder: Path) -> "Dataset | DatasetDict":
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a whole saved dataset: {error}") from error


def _hub(path: str) -> "Dataset | DatasetDict":
    """A dataset of the hub, or of the cache while the hub cannot be reached."""
    import datasets

    match = HUB_NAME.fullmatch(path)
    assert match is not None
    name, config = match.group(1), match.groups()[-1]
    online = hub_reachable()
    if not online and not _is_cached(name):
        raise UserError(
            f"{path}: there is no such file or folder, and the dataset hub cannot be reached to look for it: "
            f"check the spelling, or the network{_neighbour(path)}"
        )
    try:
        with _offline(not online):
            return datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = f" (write {name}:CONFIG)" if "onfig" in str(error) else ""
        raise UserError(f"{path}: {str(error).splitlines()[0]}{hint}") from error


def _is_cached(name: str) -> bool:
    import datasets

    *owner, last = name.split("/")
    folder = "___".join([*owner, datasets.naming.camelcase_to_snakecase(last)])
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Spare the half minute of retries before the library looks into its cache."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _part(dataset: "Dataset | DatasetDict", split: str, path: str) -> "Dataset":
    """The split of a dataset; the whole of one that has none."""
    if not isinstance(dataset, dict):
        return dataset
    found = [name for name in dataset if name.lower() in SPLITS[split]] or [
        name for name in dataset if split_of(name) == split
    ]
    if len(found) == 1:
        return dataset[found[0]]
    several = f"several splits for {split}" if found else f"no split {split}"
    raise UserError(f"{path} has {several}: there is {', '.join(map(str, dataset))}; write the one you want to a file")


def _dataset_rows(dataset: "Dataset") -> Iterator[Row]:
    return (Row(f"dataset row {number}", fields) for number, fields in enumerate(dataset, 1))
