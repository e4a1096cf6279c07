"""What the user sees while training: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Reporter"]


class Reporter:
    """Shows lines and progress on standard output; shows nothing where ``enabled`` is False (all but process 0)."""

    def __init__(self, steps: int, step: int, enabled: bool = True):
        self._enabled = enabled
        self._steps = steps
        self._bar = None
        console = Console(file=sys.stdout, highlight=False)
        if enabled and console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                TextColumn("eta"), TimeRemainingColumn(), console=console, transient=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def line(self, text: str) -> None:
        """Shows a line that stays: about data, validation, checkpoints, or a warning."""
        if self._bar:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        elif self._enabled:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar; plain output shows only the rows of ``train``."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def train(self, row: dict[str, Any]) -> None:
        """Shows a training row of ``metrics.jsonl``."""
        loss = "(no update)" if row["loss"] is None else f"{row['loss']:.4f}"
        text = f"loss {loss}  lr {row['lr']:.2e}"
        if row["step_ms"]:
            text += f"  {row['tokens_per_second']:,.0f} tokens/s  {row['step_ms']:.1f} ms/step"
        if self._bar:
            self._bar.update(self._task, description=text)
        elif self._enabled:
            left = _duration((self._steps - row["step"]) * row["step_ms"] / 1e3) if row["step_ms"] else "unknown"
            print(f"step {row['step']}/{self._steps}  {text}  eta {left}", flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
