"""Reads datasets that tensorflow-datasets has prepared, without TensorFlow (``pip install jaxlm[tfds]``).

    tfds:wmt14_translate/de-en:train           translations in the direction of the dataset: German to English
    tfds:wmt14_translate/de-en:train:en-de     the other direction
    tfds:lm1b:train                            the text feature, if there is one
    tfds:lm1b:train:text                       the text feature of this name

Datasets are looked for where tensorflow-datasets puts them (``TFDS_DATA_DIR``, or ~/tensorflow_datasets). They must be
array_record files, the only format that can be read without TensorFlow. The split may be left out, and may have a slice
in the notation of tensorflow-datasets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from jaxlm.core.errors import UserError

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class TextFeature:
    """One text feature of a split, read record by record, as often as needed."""

    def __init__(self, records: Any, name: str):
        self._records, self._name = records, name

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        for record in self._records:
            yield record[self._name].decode("utf-8")

    def __getitem__(self, rows: slice) -> list[str]:
        return [self._records[i][self._name].decode("utf-8") for i in range(*rows.indices(len(self)))]


def read(body: str, split: str) -> tuple[TextFeature, ...]:
    """The texts of ``NAME[/CONFIG][:SPLIT[:FEATURE]]``: one feature, or source and target of a translation.

    Args:
        body: what follows ``tfds:``; FEATURE is a text feature, or a direction such as en-de.
        split: "train", "valid" or "test", if the body names no split.

    Raises:
        UserError: when the library or the dataset is missing, when the dataset has no such split or feature, or when
            its files hold another number of records than it says.
    """
    name, _, rest = body.partition(":")
    named_split, _, feature = rest.partition(":")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("tfds: data needs tensorflow-datasets; pip install jaxlm[tfds]") from None
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except Exception as error:  # code of the dataset may raise anything
        raise UserError(f"tensorflow-datasets has no {name!r}: {str(error).splitlines()[0]}") from None
    if not builder.is_prepared() or builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{name} is not in {builder.data_dir} as array_record files; prepare it: tfds.builder({name!r}, "
            'file_format="array_record").download_and_prepare()'
        )
    named_split = named_split or _SPLITS[split]
    try:
        records = builder.as_data_source(split=named_split)
    except (ValueError, KeyError):
        raise UserError(f"{name} has no split {named_split!r}; choose from {', '.join(builder.info.splits)}") from None
    for split_name in set(re.findall(r"\w+", named_split)) & set(builder.info.splits):
        _check_count(name, builder.info.splits[split_name])
    return tuple(TextFeature(records, key) for key in _features(tfds, builder, name, feature))


def _check_count(name: str, split: Any) -> None:
    """Raises UserError when the files hold another number of records than the dataset says, which the library does not
    check."""
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


def _features(tfds: Any, builder: Any, name: str, named: str) -> tuple[str, ...]:
    """The keys of one text feature, or of the source and the target; ``named`` is what the SPEC names."""
    features = builder.info.features
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if isinstance(features, tfds.features.Translation):
        direction = tuple(named.split("-")) if named else builder.info.supervised_keys or tuple(texts[:2])
        if len(direction) != 2 or len(set(direction)) != 2 or not set(direction) <= set(texts):
            raise UserError(f"{name} has no direction {named!r}; choose two of {', '.join(texts)}, such as "
                            f"{texts[0]}-{texts[1]}")
        return direction
    usual = [key for key in ("text",) if key in texts] or texts
    if named and named not in texts or not named and len(usual) != 1:
        missing = f"no text {named!r}" if named else "not exactly one text"
        raise UserError(
            f"{name} has {missing}; name a feature after its split: {', '.join(texts)}" if texts else
            f"{name} has no text; choose another dataset"
        )
    return (named or usual[0],)
