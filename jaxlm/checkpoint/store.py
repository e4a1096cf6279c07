"""Training checkpoints over Orbax: written in the background, kept by recency and score, restored past damage.

    DIRECTORY/STEP/state/      every array of the state, by its path, so that structure types may change
    DIRECTORY/STEP/data/       JSON: where the data stood, whatever else the caller remembers, the score, a checksum of
                               each array, and one of this JSON itself
    DIRECTORY/STEP.damaged/    a checkpoint that could not be read, set aside
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxlm.checkpoint.checksums import array_checksums, first_mismatch
from jaxlm.core.disk import room_for
from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import seal, unseal

__all__ = ["Store"]

log = logging.getLogger(__name__)
_VERSION = 2  # of the JSON
_ORBAX_FILE = "_CHECKPOINT_METADATA"


class Store:
    """The checkpoints of one run.

    Keeps the newest ``keep_latest`` checkpoints, and the ``keep_best`` with the lowest (``metric_mode`` "min") or the
    highest score. All processes of a run must make the same calls. A ``read_only`` store does not disturb a run that
    writes.

    Raises:
        UserError: the disk is full. Earlier checkpoints are then untouched, and nothing is left of the unfinished one.
    """

    def __init__(
        self, directory: str | Path, *, keep_latest: int = 1, keep_best: int = 0,
        metric_mode: Literal["min", "max"] = "min", read_only: bool = False,
    ):
        self.directory = Path(directory).absolute()
        self.keep_latest, self.keep_best, self.metric_mode = keep_latest, keep_best, metric_mode
        self._leave_out_unreadable(read_only)
        with room_for(str(self.directory)):
            self._manager = _Manager(self.directory, options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(self._kept), read_only=read_only, cleanup_tmp_directories=not read_only
            ))
        self._scores = {step: score for step in self.steps() if (score := self._score_of(step)) is not None}

    def _leave_out_unreadable(self, read_only: bool) -> None:
        """Sets damaged checkpoints aside: while one of them is there, Orbax opens no checkpoint at all."""
        unreadable = [step for step in self.directory.glob("*") if step.name.isdigit() and not _orbax_opens(step)]
        if unreadable and read_only:
            raise UserError(f"{unreadable[0] / _ORBAX_FILE} is damaged; move {unreadable[0]} away")
        if jax.process_index() == 0:
            for step in unreadable:
                log.warning("checkpoint %s is damaged (%s)", step.name, _ORBAX_FILE)
                _move_aside(step)
        if not read_only and jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxlm.checkpoint.store.open")

    def save(self, step: int, state: Any, data_state: dict[str, Any], score: float | None = None) -> None:
        """Begins to write a checkpoint; returns as soon as the arrays are copied to the host.

        Args:
            step: the number of the checkpoint, larger than any before.
            state: any pytree of arrays, typed PRNG keys included.
            data_state: JSON-safe.
            score: what "best" compares; a checkpoint without a score is never among the best.
        """
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = float(score)
        arrays = _stored(state)
        data = seal({
            "version": _VERSION, "data_state": data_state, "score": self._scores.get(step),
            "checksums": array_checksums(arrays),
        })
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), data=ocp.args.JsonSave(data))
        with self._writing():
            self._manager.save(step, args=args, force=True)

    def score(self, step: int, score: float) -> None:
        """Gives a saved checkpoint a score, which this object remembers and the files do not."""
        self._scores[step] = float(score)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data_state) of a step, in the structure, types and shardings of ``abstract_state`` (arrays or
        ``ShapeDtypeStruct``s), whatever mesh it was saved from.

        Raises:
            UserError: the checkpoint cannot be read or does not fit.
        """
        try:
            return self._read(step, abstract_state)
        except Exception as error:
            raise UserError(f"checkpoint {self.directory / str(step)} cannot be read: {_brief(error)}") from error

    def restore_part(self, step: int, name: str, abstract: dict[str, Any]) -> dict[str, Any]:
        """The part of the state under ``NAME``, which was saved as a dict by path.

        Raises:
            UserError: the checkpoint cannot be read or does not fit.
        """
        try:
            return self._arrays(step, {name: abstract}, self._data(step), partial=True)[name]
        except Exception as error:
            raise UserError(f"checkpoint {self.directory / str(step)} cannot be read: {_brief(error)}") from error

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """(state, data_state, step) of the newest checkpoint that can be read; None if there is no checkpoint.

        Newer checkpoints that cannot be read are set aside, with a warning in the log.

        Raises:
            UserError: no checkpoint can be read. None is set aside then: the reason may be that the state has changed.
        """
        damaged: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                state, data_state = self._read(step, abstract_state)
            except Exception as error:
                damaged[step] = error
                continue
            for each, error in damaged.items():
                log.warning("checkpoint %d is damaged (%s): going back to %d", each, _brief(error), step)
            self._set_aside(list(damaged))
            return state, data_state, step
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} can be read ({_brief(next(iter(damaged.values())))}); "
                "train into another directory, or with the configuration that this one was made with"
            )
        return None

    def steps(self) -> list[int]:
        """The numbers of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def best_steps(self, n: int) -> list[int]:
        """The numbers of the ``n`` checkpoints with the best scores, best first; fewer if fewer have a score."""
        return self._best(self.steps())[:n]

    def wait(self) -> None:
        """Waits until everything is written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, and releases the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Removes an unfinished checkpoint where a save fails, this one or one in the background."""
        try:
            with room_for(f"a checkpoint in {self.directory}"):
                yield
        except Exception:
            if jax.process_index() == 0:
                for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            self._manager.reload()  # it has forgotten checkpoints that it meant to delete afterwards
            raise

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        data = self._data(step)
        return self._arrays(step, abstract_state, data, partial=False), data["data_state"]

    def _data(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint. Files from before version 2 have no checksum."""
        data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
        data = unseal(data, required="version" in data)
        if data.get("version", 1) not in (1, _VERSION):
            raise UserError(f"it is of version {data['version']}, this jaxlm reads {_VERSION}; update jaxlm")
        return data

    def _score_of(self, step: int) -> float | None:
        try:
            return self._data(step)["score"]
        except Exception as error:  # whoever wants to restore it will hear more
            log.warning("checkpoint %d is damaged (%s)", step, _brief(error))
            return None

    def _best(self, steps: list[int]) -> list[int]:
        scored = [step for step in steps if step in self._scores]
        return sorted(scored, key=self._scores.__getitem__, reverse=self.metric_mode == "max")

    def _kept(self, steps: list[int]) -> set[int]:
        return {*steps[max(len(steps) - self.keep_latest, 0) :], *self._best(steps)[: self.keep_best]}

    def _arrays(self, step: int, abstract: Any, data: dict[str, Any], *, partial: bool) -> Any:
        stored = _stored(abstract)
        sums = data.get("checksums", {})
        saved = {path: _as_saved(leaf, sums.get(path)) for path, leaf in stored.items()}
        args = ocp.args.PyTreeRestore(saved, jax.tree.map(_restore_args, saved), partial_restore=partial)
        found = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        compared = stored if "version" in data else stored.keys() & sums.keys()
        damaged = first_mismatch({path: found[path] for path in compared}, sums)
        if damaged is not None:
            raise UserError(f"{damaged} is damaged, its checksum is wrong")
        leaves, structure = jax.tree.flatten(abstract)
        values = (_cast(found[path], leaf.dtype) for path, leaf in stored.items())
        return structure.unflatten(_like(leaf, value) for leaf, value in zip(leaves, values, strict=True))

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                _move_aside(self.directory / str(step))
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxlm.checkpoint.store")
        self._manager.reload()


class _Manager(ocp.CheckpointManager):
    """Orbax would ask JAX, while it saves and from its own thread, whether the step that it saves is the one to stop at
    for SIGTERM. JAX takes each such number for where the process is, so that processes would agree on a step long past
    and never stop; only who trains may ask."""

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclass(frozen=True)
class _Keep(checkpoint_managers.PreservationPolicy):
    """Orbax's own options will not do: ``max_to_keep`` with ``best_fn`` may delete the newest checkpoint, and its
    policies forget the scores when the program ends."""

    kept: Callable[[list[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.kept(sorted(info.step for info in checkpoints))
        return [info.step in kept for info in checkpoints]


def _move_aside(step: Path) -> None:
    aside = step.with_name(f"{step.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    step.rename(aside)


def _orbax_opens(step: Path) -> bool:
    """Whether Orbax, when it opens the directory, can read its own file about a checkpoint."""
    try:
        return bool(ocp.path.step.Metadata(int(step.name), step).commit_timestamp)
    except Exception:
        return False


def _stored(state: Any) -> dict[str, Any]:
    """Path -> array, with PRNG keys as their data."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _as_saved(leaf: Any, checksum: list[Any] | None) -> Any:
    """An abstract array of the type that it was saved with: that of its checksum."""
    if checksum is None or checksum[0] == str(leaf.dtype):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(checksum[0]), sharding=sharding)


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array if array.dtype == dtype else array.astype(dtype)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(key: Any) -> Any:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _like(abstract: Any, value: jax.Array) -> jax.Array:
    if not _is_key(abstract):
        return value
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), abstract)
    return jax.random.wrap_key_data(value, impl=impls[0])


def _restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
