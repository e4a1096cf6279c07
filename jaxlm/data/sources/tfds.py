"""Datasets that tensorflow-datasets has prepared, read without TensorFlow (``pip install jaxlm[tfds]``).

    tfds:wmt14_translate/de-en:train           translations, in the direction of the data set: German to English
    tfds:wmt14_translate/de-en:train:en-de     the other way
    tfds:lm1b:train                            the text feature, where there is one; or name it: tfds:lm1b:train:text

They are looked for where tensorflow-datasets puts them (``TFDS_DATA_DIR``, or ~/tensorflow_datasets), as array_record
files, the only ones that can be read without TensorFlow. The split may be left out, and have its own slice of
tensorflow-datasets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from jaxlm.core.errors import UserError

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class Feature:
    """One text feature of a split, read as often as asked, a record at a time."""

    def __init__(self, records: Any, name: str):
        self._records, self._name = records, name

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        for record in self._records:
            yield record[self._name].decode("utf-8")

    def __getitem__(self, rows: slice) -> list[str]:
        return [self._records[i][self._name].decode("utf-8") for i in range(*rows.indices(len(self)))]


def read(body: str, split: str) -> tuple[Feature, ...]:
    """The texts of ``NAME[/CONFIG][:SPLIT[:WHAT]]``: one feature, or source and target of a translation.

    Args:
        body: what follows ``tfds:``; WHAT is a text feature, or a direction such as en-de.
        split: "train", "valid" or "test", where the body names none.

    UserError where the library or the data set is not there, has other features, or fewer records than it says.
    """
    name, _, rest = body.partition(":")
    chosen, _, what = rest.partition(":")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("tfds: data needs tensorflow-datasets; pip install jaxlm[tfds]") from None
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except Exception as error:  # a data set's own code, and a library that raises of every kind
        raise UserError(f"tensorflow-datasets has no {name!r}: {str(error).splitlines()[0]}") from None
    if not builder.is_prepared() or builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{name} is not in {builder.data_dir} as array_record files; prepare it: tfds.builder({name!r}, "
            'file_format="array_record").download_and_prepare()'
        )
    chosen = chosen or _SPLITS[split]
    try:
        records = builder.as_data_source(split=chosen)
    except (ValueError, KeyError):
        raise UserError(f"{name} has no split {chosen!r}; choose from {', '.join(builder.info.splits)}") from None
    for split_name in set(re.findall(r"\w+", chosen)) & set(builder.info.splits):
        _check_count(name, builder.info.splits[split_name])
    return tuple(Feature(records, feature) for feature in _features(tfds, builder, name, what))


def _check_count(name: str, split: Any) -> None:
    """UserError where files hold another number of records than the data set says, which the library believes."""
    from array_record.python.array_record_module import ArrayRecordReader

    found = 0
    for path in split.filepaths:
        reader = ArrayRecordReader(str(path))
        found += reader.num_records()
        reader.close()
    if found != split.num_examples:
        raise UserError(
            f"{name}:{split.name} has {found:,} records and should have {split.num_examples:,}; prepare it again"
        )


def _features(tfds: Any, builder: Any, name: str, what: str) -> tuple[str, ...]:
    features = builder.info.features
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if isinstance(features, tfds.features.Translation):
        direction = tuple(what.split("-")) if what else builder.info.supervised_keys or tuple(texts[:2])
        if len(direction) != 2 or len(set(direction)) != 2 or not set(direction) <= set(texts):
            raise UserError(f"{name} has no direction {what!r}; choose two of {', '.join(texts)}, such as "
                            f"{texts[0]}-{texts[1]}")
        return direction
    usual = [key for key in ("text",) if key in texts] or texts
    if what and what not in texts or not what and len(usual) != 1:
        missing = f"no text {what!r}" if what else "not one text"
        raise UserError(
            f"{name} has {missing}; name a feature after its split: {', '.join(texts)}" if texts else
            f"{name} has no text; choose another data set"
        )
    return (what or usual[0],)
