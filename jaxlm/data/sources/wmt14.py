"""Reads WMT14 English and German from the archives of the task (statmt.org/wmt14), which lie in one folder.

    train    training-parallel-europarl-v7.tgz, training-parallel-commoncrawl.tgz, training-parallel-nc-v9.tgz
    valid    dev.tgz (newstest2013)
    test     test-full.tgz (newstest2014)

Training leaves out the pairs with an empty side; 4.5 million pairs remain.
"""

from __future__ import annotations

import html
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.core.errors import UserError
from jaxlm.data.sources.compressed import DecompressedFile
from jaxlm.data.sources.text_files import decode, split_lines

_SPLITS: Mapping[str, Sequence[tuple[str, str]]] = {  # (archive, file of a language in it)
    "train": (
        ("training-parallel-europarl-v7.tgz", "europarl-v7.de-en.{language}"),
        ("training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{language}"),
        ("training-parallel-nc-v9.tgz", "news-commentary-v9.de-en.{language}"),
    ),
    "valid": (("dev.tgz", "newstest2013.{language}"),),
    "test": (("test-full.tgz", "newstest2014-deen-{side}.{language}.sgm"),),
}
_SEGMENT = re.compile(r"<seg\b[^<>]*>")


def read(body: str, split: str) -> tuple[list[str], list[str]]:
    """Source and target sentences of ``FOLDER/en-de[:SPLIT]`` or ``FOLDER/de-en[:SPLIT]``.

    Args:
        body: what follows ``wmt14:``.
        split: "train", "valid" or "test", if the body names no split.

    Raises:
        UserError: when an archive is missing or damaged, or when its two languages have different numbers of sentences.
    """
    path, _, named = body.partition(":")
    folder, pair = Path(path).expanduser().parent, Path(path).name
    split = named or split
    if pair not in ("en-de", "de-en") or split not in _SPLITS:
        raise UserError(f"wmt14:{body} is not WMT14; write wmt14:FOLDER/en-de:train, or de-en, or valid or test")
    src, tgt = [], []
    for archive, member in _SPLITS[split]:
        names = [member.format(language=language, side=side)
                 for language, side in zip(pair.split("-"), ("src", "ref"), strict=True)]
        found = _members(folder / archive, names)
        if len(found[0]) != len(found[1]):
            raise UserError(
                f"{folder / archive}: {names[0]} has {len(found[0]):,} sentences and {names[1]} {len(found[1]):,}; "
                "fetch it again"
            )
        for source, target in zip(*found, strict=True):
            if split != "train" or (source.strip() and target.strip()):
                src.append(source)
                tgt.append(target)
    return src, tgt


def _members(archive: Path, names: list[str]) -> list[list[str]]:
    """The sentences of some files of an archive, in whatever folder they lie."""
    found: dict[str, list[str]] = {}
    try:
        with DecompressedFile(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in names and name not in found:
                    text = decode(tar.extractfile(member).read(), f"{archive}: {name}")
                    found[name] = _segments(text) if name.endswith(".sgm") else split_lines(text)
                if len(found) == len(names):
                    break
    except FileNotFoundError:
        raise UserError(f"{archive} does not exist; get it from statmt.org/wmt14/translation-task.html") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{archive} is damaged or not an archive ({error}); fetch it again") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{archive} holds no {' and no '.join(missing)}; fetch it again")
    return [found[name] for name in names]


def _segments(text: str) -> list[str]:
    """The sentences of an SGML file (it is not XML)."""
    # Cut first: an expression for both ends would search to the end of the file for each that is missing.
    begins = ((part, _SEGMENT.search(part)) for part in text.split("</seg>")[:-1])
    return [html.unescape(" ".join(part[begin.end() :].split())) for part, begin in begins if begin]
