"""Data sets that tensorflow-datasets' own writer has made, read without TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext, Documents

tfds = pytest.importorskip("tensorflow_datasets")


def builder(name: str, features, rows: dict[str, list[dict]], keys=None):
    """A data set of some rows, of a class that tensorflow-datasets finds by its name."""
    class Data(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in rows}

        def _generate_examples(self, split):
            yield from enumerate(rows[split])

    return type(name.title().replace("_", ""), (Data,), {})


PAIRS = [{"de": f"Satz {i}\u2028über", "en": f"sentence {i}\nof two lines"} for i in range(7)]
TEXTS = [{"text": f"text {i} ä", "title": f"title {i}", "label": i % 2} for i in range(5)]


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    where = tmp_path_factory.mktemp("tfds")
    text, label = tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
    sets = [
        ("tiny_pairs", tfds.features.Translation(languages=("de", "en")), {"train": PAIRS, "validation": PAIRS[:2]},
         ("de", "en")),
        ("tiny_texts", tfds.features.FeaturesDict({"text": text, "title": text, "label": label}), {"train": TEXTS},
         None),
        ("tiny_titles", tfds.features.FeaturesDict({"a": text, "b": text}), {"train": [{"a": "1", "b": "2"}]}, None),
        ("tiny_labels", tfds.features.FeaturesDict({"label": label}), {"train": [{"label": 1}]}, None),
    ]
    for name, features, rows, keys in sets:
        builder(name, features, rows, keys)(data_dir=where, file_format="array_record").download_and_prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(where))
        yield where


def test_translations_in_both_directions():
    source = open_source("tfds:tiny_pairs", "train")
    assert isinstance(source, Bitext)
    assert sorted(zip(source.src, source.tgt, strict=True)) == [(row["de"], row["en"]) for row in PAIRS]
    other = open_source("tfds:tiny_pairs:train:en-de")
    assert (other.src, other.tgt) == (source.tgt, source.src)
    assert len(open_source("tfds:tiny_pairs", "valid").src) == 2
    assert open_source("tfds:tiny_pairs:train[:2]").src == source.src[:2]


def test_text_and_features_by_name():
    source = open_source("tfds:tiny_texts:train")
    assert isinstance(source, Documents) and source.append_eos
    assert sorted(source.texts) == sorted(source.texts) == [row["text"] for row in TEXTS]
    assert sorted(open_source("tfds:tiny_texts:train:title").texts) == [row["title"] for row in TEXTS]
    assert list(open_source("tfds:tiny_titles:train:b").texts) == ["2"]
    assert list(open_source("tfds:tiny_texts:train[1:3]").texts) == list(source.texts)[1:3]


@pytest.mark.parametrize("spec, named", [
    ("tfds:no_such_set", "'no_such_set'.*Dataset no_such_set not found"),
    ("tfds:tiny_pairs:dev", "tiny_pairs .*'dev'.* train, validation$"),
    ("tfds:tiny_pairs:train:fr-de", "tiny_pairs .*'fr-de'.* de, en, .*de-en$"),
    ("tfds:tiny_titles:train", "tiny_titles .* a, b$"),
    ("tfds:tiny_texts:train:body", "tiny_texts .*'body'.* text, title$"),
    ("tfds:tiny_labels:train", "tiny_labels .*no text"),
])
def test_mistakes(spec, named):
    with pytest.raises(UserError, match=named):
        open_source(spec)


def test_records_are_counted(prepared):
    info = Path(prepared, "tiny_pairs", "1.0.0", "dataset_info.json")
    whole = info.read_text()
    content = json.loads(whole)
    content["splits"][0]["shardLengths"] = ["9"]
    info.write_text(json.dumps(content))
    try:
        with pytest.raises(UserError, match="tiny_pairs:train has 7 records and should have 9; prepare it again"):
            open_source("tfds:tiny_pairs:train")
    finally:
        info.write_text(whole)


def test_what_is_not_prepared_is_said():
    with pytest.raises(UserError, match="lm1b is not in .* as array_record files; prepare it: tfds.builder"):
        open_source("tfds:lm1b:train")


def test_neither_tensorflow_nor_the_library_is_loaded_for_others():
    script = (
        "import sys\nfrom jaxlm.data.sources.spec import open_source\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "list(open_source('tfds:tiny_texts:train').texts)\nassert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": path})
