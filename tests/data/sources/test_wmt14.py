"""WMT14 from archives of its own layout, a few sentences each: read, and prepared for training as configs/ does."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from jaxlm.core.config import load_config, override
from jaxlm.core.errors import UserError
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext

EUROPARL = [("Resumption of it\u2028now", "Wiederaufnahme davon\u2028nun"), ("", "Leer"), ("Two", "Zwei")]
CRAWL = [("Three &amp; more", "Drei &amp; mehr"), ("Four", "   ")]
NEWS = [("Five", "Fünf")]
DEV = [("Six", "Sechs"), ("", "Sieben")]
TEST = [("Eight & nine", "Acht & neun"), ("Ten < eleven", "Zehn < elf")]


def archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sgm(sentences: list[str], kind: str) -> str:
    body = "".join(
        f'<seg id="{i}">{" " * i}{text.replace("&", "&amp;").replace("<", "&lt;")} </seg>\n'
        for i, text in enumerate(sentences, 1)
    )
    return f'<{kind} setid="newstest2014" srclang="any">\n<doc docid="a">\n<p>\n{body}</p>\n</doc>\n</{kind}>\n'


def lines(pairs: list[tuple[str, str]], side: int, end: str = "\n") -> str:
    return "".join(pair[side] + end for pair in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The five archives, with files of other languages among theirs, as the real ones have."""
    folder = tmp_path_factory.mktemp("wmt14")
    for name, stem, pairs in (
        ("europarl-v7", "training/europarl-v7", EUROPARL), ("commoncrawl", "commoncrawl", CRAWL),
        ("nc-v9", "training/news-commentary-v9", NEWS),
    ):
        archive(folder / f"training-parallel-{name}.tgz", {
            f"{stem}.cs-en.cs": "x\n", f"{stem}.cs-en.en": "x\n",
            f"{stem}.de-en.de": lines(pairs, 1), f"{stem}.de-en.en": lines(pairs, 0),
        })
    archive(folder / "dev.tgz", {
        "dev/newstest2013.en": lines(DEV, 0), "dev/newstest2013.de": lines(DEV, 1, "\r\n"), "dev/newstest2012.de": "x\n"
    })
    sides = {side: [pair[i] for pair in TEST] for i, side in enumerate(("en", "de"))}
    archive(folder / "test-full.tgz", {
        f"test-full/newstest2014-deen-{kind[:3]}.{language}.sgm": sgm(sides[language], kind)
        for kind in ("srcset", "refset") for language in ("en", "de")
    })
    return folder


def test_each_part_in_both_directions(folder):
    train = open_source(f"wmt14:{folder}/en-de", "train")
    kept = [EUROPARL[0], EUROPARL[2], CRAWL[0], NEWS[0]]
    assert isinstance(train, Bitext) and list(zip(train.src, train.tgt, strict=True)) == kept
    backwards = open_source(f"wmt14:{folder}/de-en:train")
    assert (backwards.src, backwards.tgt) == (train.tgt, train.src)
    valid = open_source(f"wmt14:{folder}/en-de:valid", "test")
    assert list(zip(valid.src, valid.tgt, strict=True)) == DEV
    test = open_source(f"wmt14:{folder}/en-de:test[:1]")
    assert list(zip(test.src, test.tgt, strict=True)) == TEST[:1]


def test_what_is_missing_or_damaged(folder, tmp_path):
    def bad(spec: str) -> str:
        with pytest.raises(UserError) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "write wmt14:FOLDER/en-de:train" in bad(f"wmt14:{folder}/en-fr:train")
    assert "write wmt14:FOLDER/en-de:train" in bad(f"wmt14:{folder}/en-de:dev")
    where = f"wmt14:{tmp_path}/en-de:valid"
    assert bad(where) == f"{tmp_path}/dev.tgz does not exist; get it from statmt.org/wmt14/translation-task.html"
    whole = (folder / "dev.tgz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"plain text"):
        (tmp_path / "dev.tgz").write_bytes(damaged)
        assert bad(where).startswith(f"{tmp_path}/dev.tgz is damaged")
    archive(tmp_path / "dev.tgz", {"dev/newstest2013.en": "a\n"})
    assert bad(where) == f"{tmp_path}/dev.tgz holds no newstest2013.de; fetch it again"
    archive(tmp_path / "dev.tgz", {"dev/newstest2013.en": "a\n", "dev/newstest2013.de": "a\nb\n"})
    assert "newstest2013.en has 1 sentences and newstest2013.de 2; fetch it again" in bad(where)


def test_the_experiments_train_on_them(folder, tmp_path):
    """All of the configuration except its size, on the stand-in archives. The big one differs in size and rate only."""
    from jaxlm.training.setup import prepare

    parts = {f"data.{part}": f"wmt14:{folder}/en-de:{part}" for part in ("train", "valid", "test")}
    for name, width, lr in (("wmt14_en_de_big", 1024, 5e-4), ("wmt14_en_de", 512, 7e-4)):
        config = load_config(Path(__file__).parents[3] / "configs" / f"{name}.py")
        assert config.model.width == width and config.optim.lr == lr and config.optim.schedule == "inverse_sqrt"
        assert config.train.label_smoothing == 0.1 and config.train.average > 1 and config.data.vocab_size == 37000
        assert (config.eval.beam, config.eval.length_penalty) == (4, 0.6)
        assert parts == {key: getattr(config.data, key[5:]).replace("data/wmt14", str(folder)) for key in parts}
    small = {"model.width": 16, "model.heads": 2, "model.ffn": 16, "model.encoder_layers": 1,
             "model.decoder_layers": 1, "data.vocab_size": 270, "data.batch_tokens": 64}
    setup = prepare(override(config, small | parts), tmp_path / "run")
    assert setup.loader.report()["pairs"] == 4 and setup.valid_loader.report()["pairs"] == 2
    assert setup.loader.batch(0)["src"].shape in setup.loader.shapes
