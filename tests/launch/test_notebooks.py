"""Every notebook runs from its first cell to its last, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxlm import nn
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import write_model

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "launch/notebooks").glob("*.ipynb"))
TEXT = "It was a truth that the lady of the house had a dog, and that the dog had a house of its own.\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "install" in code[0].metadata["tags"] and "import jaxlm" in code[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += f"\nMODEL, TEXT = {str(_model(tmp_path))!r}, {str(tmp_path / 'text.txt')!r}"
            cell.source += "\nSAMPLES, STEPS, CONTEXT = 4, 6, 32"
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
                if "image/png" in output.get("data", {})]
    assert pictures or path.stem.startswith("5")


def _model(directory: Path) -> Path:
    """A model with random weights, with a text beside it, in place of the ones that the notebooks download."""
    (directory / "text.txt").write_text(TEXT * 200)
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    config = nn.DecoderConfig(vocab_size=tokenizer.vocab_size, width=64, heads=2, kv_heads=2, ffn=128, layers=2,
                              max_positions=64)
    return write_model(directory / "model", config, nn.build(config, jax.random.key(0))[1], tokenizer)
