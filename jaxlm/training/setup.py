"""Prepares a training: opens data, tokenizer, model and mesh of an Experiment, and finds mistakes before step 0."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxlm import nn
from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.disk import replaced_file, room_for
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import (
    describe_mesh,
    make_mesh,
    mesh_sizes,
    num_batch_shards,
    override_sharding,
    require_host_memory,
)
from jaxlm.core.tree import Params, Transform, count_params, flatten
from jaxlm.core.untrusted import read_sealed_json, seal
from jaxlm.data.batches.encoding import first_token_of
from jaxlm.data.batches.loader import Loader, make_loader
from jaxlm.data.contamination import find_contamination
from jaxlm.data.sources.spec import Split, open_source
from jaxlm.data.sources.types import Bitext, Mixture, Preferences, Source
from jaxlm.data.tokenizers.from_config import tokenizer_from_config
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.model import load, model_config, model_tokenizer
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.pipeline import Schedule
from jaxlm.training.config import DataConfig, Experiment
from jaxlm.training.lora import add_adapters, check_lora, freeze_base
from jaxlm.training.multihost.distributed import batch_shard
from jaxlm.training.objectives.reference_model import ReferenceModel, make_reference_model

__all__ = ["Setup", "prepare", "with_model"]

# Fields that may differ between the start of a run and its resumption; any other change makes it another training.
_MAY_CHANGE = (
    "mesh.", "model.microbatches", "eval.", "data.valid", "data.test", "data.prefetch", "data.cache",
    "data.contamination", "train.steps",
    "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_", "train.patience", "train.average",
    "train.on_nan", "train.spike_factor", "lora.merge",
)


@dataclass(frozen=True)
class Setup:
    """Everything a training needs. ``config.model`` has its vocabulary size and special tokens filled in."""

    config: Experiment
    tokenizer: Tokenizer
    source: Source
    loader: Loader
    valid_source: Source | None
    valid_loader: Loader | None
    mesh: Mesh
    batch_shards: int  # how many parts the processes cut a batch into
    graphdef: nnx.GraphDef
    like: Params  # the model's parameters, abstract
    initial: Params | Callable[[], Params]  # the parameters at step 0, or what makes them
    reference: ReferenceModel | None
    resuming: bool
    contamination: tuple[str, ...]  # sentences about validation and test data that are in the training data

    @property
    def report(self) -> str:
        """One line about data, model and mesh."""
        data = ", ".join(f"{value:,} {name}".replace("_", " ") if isinstance(value, int) else f"{name} {value:.0%}"
                         for name, value in self.loader.report().items())
        note = f" ({self.source.synthetic})" if self.source.synthetic else ""
        sources = self.source.sources if isinstance(self.source, Mixture) else (self.source,)
        if first := next(filter(None, (first_token_of(each, self.tokenizer) for each in sources)), ()):
            note += f", each window after {self.tokenizer.decode(first, skip_special=False)}"
        schedules = _schedules(self.graphdef, self.like, self.mesh)
        pipeline = "".join(
            f"; pipeline{side}: {each.microbatches} microbatches x {each.repeats}, bubble {each.bubble:.1%}"
            for side, each in schedules.items()
        )
        return (
            f"data: {data}{note}; model: {self.config.model.kind}, {count_params(self.like):,} parameters; "
            f"mesh: {describe_mesh(self.mesh.shape)} ({self.mesh.devices.flat[0].device_kind}){pipeline}"
        )

    def write(self, run: Path) -> None:
        """Writes experiment.json and, at the start of a run, the tokenizer.

        Raises:
            UserError: when the disk is full.
        """
        with room_for(str(run)):
            run.mkdir(parents=True, exist_ok=True)
            if not self.resuming:
                self.tokenizer.save(run)
            with replaced_file(run / "experiment.json") as new:
                new.write_text(json.dumps(seal(to_dict(self.config)), indent=2) + "\n")


def prepare(config: Experiment, run: Path) -> Setup:
    """Opens the data, makes or loads the tokenizer, and checks the experiment. Writes nothing.

    Where ``run`` holds a checkpoint it is resumed, with its own tokenizer; the experiment must be the same but for
    fields that change nothing in the training, such as those of the mesh.

    Raises:
        UserError: when the experiment has a mistake, or differs from that of the run.
    """
    check_lora(config)
    config = with_model(config)
    resuming = any(path.name.isdigit() for path in (run / "checkpoints").glob("*"))
    source = _open(config.data, "train")
    if isinstance(source, Preferences) != bool(config.dpo.beta):
        raise UserError(
            f"data.train {config.data.train!r} {'has' if isinstance(source, Preferences) else 'has no'} preferences "
            f"and dpo.beta is {config.dpo.beta}; use preference:PATH with a beta above 0, or neither"
        )
    tokenizer = Tokenizer.load(run) if resuming else _tokenizer(config, source)
    translates = isinstance(source, Bitext)
    config = dataclasses.replace(config, model=_with_vocabulary(config.model, tokenizer, translates))
    if resuming:
        _check_unchanged(config, run)
        _check_first_token(config, tokenizer, run)
    mesh = make_mesh(**mesh_sizes(config.mesh.preset, config.mesh.sizes, jax.device_count()))
    if config.mesh.compress_gradients != "none" and mesh.shape["data"] == 1:
        raise UserError("mesh.compress_gradients compresses the sum over the data axis; set mesh.data too")
    if config.model.offloads_activations:
        require_host_memory(mesh)
    graphdef, like = nn.abstract(config.model)
    microbatches = [each.microbatches for each in _schedules(graphdef, like, mesh).values()]
    ways = num_batch_shards(mesh) * math.lcm(*microbatches)
    part, parts = batch_shard(mesh, jax.process_index())
    place = dict(process_index=part, process_count=parts)
    rows = ways * config.train.accumulate
    loader = make_loader(config.data, source, tokenizer, train=True, row_multiple=rows, **place)
    _check_lengths(config, loader)
    valid_source = valid_loader = None
    if config.data.valid:
        valid_source = _open(config.data, "valid")
        valid_loader = make_loader(config.data, valid_source, tokenizer, train=False, row_multiple=ways, **place)
    contamination = () if resuming else _contamination(config.data, tokenizer, loader, valid_loader)
    initial = _initial(config, like, override_sharding(config.mesh.rules))
    like = jax.eval_shape(initial if callable(initial) else lambda: initial)
    reference = make_reference_model(config, graphdef, like, initial)
    return Setup(
        config, tokenizer, source, loader, valid_source, valid_loader, mesh, parts, graphdef, like, initial, reference,
        resuming, contamination,
    )


def with_model(config: Experiment) -> Experiment:
    """The experiment with a model configuration: its own, or that of ``init_from``.

    Raises:
        UserError: when it has neither.
    """
    if config.model is not None:
        return config
    if not config.init_from:
        raise UserError("the experiment has neither model nor init_from; set one of them")
    return dataclasses.replace(config, model=model_config(config.init_from))


def _tokenizer(config: Experiment, source: Source) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``, else that of ``init_from``, else one made from the data."""
    found = model_tokenizer(config.init_from) if config.init_from and not config.data.tokenizer else None
    return found or tokenizer_from_config(config.data, source)


def _schedules(graphdef: nnx.GraphDef, like: Params, mesh: Mesh) -> dict[str, Schedule]:
    """The pipeline schedule of each stack, where the mesh has stages."""
    if mesh.shape["stage"] == 1:
        return {}
    model = nnx.merge(graphdef, like)
    stacks = {f" of the {side}": getattr(model, side) for side in model.config.sides}
    if not stacks:
        raise UserError("mesh.stage splits Transformers only; set mesh.stage=1")
    return {side: stack.schedule(mesh.shape["stage"]) for side, stack in stacks.items()}


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer, translates: bool) -> ModelConfig:
    """The model's config with vocabulary size and special tokens from the tokenizer."""
    if translates != (model.kind == "seq2seq"):
        needs = "plain text or tokens" if translates else "parallel text (bitext:SRC,TGT or builtin:phrasebook)"
        raise UserError(f"a {model.kind} model trains on {needs}; change data.train or the model")
    vocab_size = model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "leave it 0 to take the tokenizer's"
        )
    specials = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    specials = {name: value for name, value in specials.items() if value is not None}
    return dataclasses.replace(model, vocab_size=vocab_size, **specials)


def _check_first_token(config: Experiment, tokenizer: Tokenizer, run: Path) -> None:
    """Checks that a run that is older than ``data.first_token`` goes on without first tokens, as it began."""
    known = "first_token" in read_sealed_json(run / "experiment.json").get("data", {})
    if tokenizer.first_token and not known and config.data.first_token == "auto" and config.model.kind != "seq2seq":
        raise UserError(
            f"{run} was trained before windows began with a first token; resume with --data.first_token never"
        )


def _check_unchanged(config: Experiment, run: Path) -> None:
    stored = read_sealed_json(run / "experiment.json")
    try:
        # Fields that are newer than the run get their defaults.
        stored = json.loads(json.dumps(to_dict(from_dict(Experiment, stored, stored=True))))
    except UserError:
        pass  # fields that exist no more: the comparison names them
    before, now = _by_path(stored), _by_path(json.loads(json.dumps(to_dict(config))))
    for key in sorted({**before, **now}):
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"{run} was trained with {key} = {before.get(key)!r}, not {now.get(key)!r}; "
                "resume with the same experiment or choose another --out"
            )


def _by_path(tree: dict, prefix: str = "") -> dict:
    """A nested dict as dotted path -> value."""
    flat = {}
    for key, value in tree.items():
        flat |= _by_path(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_lengths(config: Experiment, loader: Loader) -> None:
    if config.model.position_limit is None:
        return
    longest = max(length for _, length in loader.shapes)
    rows = config.model.max_positions - config.model.position_offset
    if longest > rows:
        raise UserError(
            f"sequences of {longest} tokens do not fit {rows} learned positions; raise model.max_positions or lower "
            f"data.{'buckets' if config.model.kind == 'seq2seq' else 'seq_len'}"
        )


def _open(data: DataConfig, split: Split) -> Source:
    return open_source(
        getattr(data, split), split, data.bad_rows, special_tokens=data.special_tokens,
        prompt_special_tokens=data.prompt_special_tokens, first_token=data.first_token,
    )


def _contamination(
    data: DataConfig, tokenizer: Tokenizer, loader: Loader, valid_loader: Loader | None
) -> tuple[str, ...]:
    """Sentences about held-out data that are in the training data. Raises UserError where there are any and
    ``data.contamination`` is "fail"."""
    if data.contamination == "off":
        return ()
    held = {"valid": valid_loader}
    if data.test:
        test = _open(data, "test")
        held["test"] = make_loader(data, test, tokenizer, train=False)
    found = {
        name: find_contamination(loader.documents(), other.documents(), tokenizer)
        for name, other in held.items() if other
    }
    for name, contamination in found.items():
        if data.contamination == "fail" and contamination.exact + contamination.near:
            raise UserError(f"data.{name}: {contamination}; remove them, or set data.contamination=report")
    return tuple(f"data.{name}: {contamination}" for name, contamination in found.items())


def _initial(config: Experiment, like: Params, with_sharding: Transform) -> Params | Callable[[], Params]:
    """Fresh parameters, or those of ``init_from``, which must fit the model."""
    if not config.init_from:
        if config.lora.rank:
            raise UserError("lora.rank needs an existing model; name it in init_from")
        init = nn.initializer(config.model)[1]
        return lambda: with_sharding(init(jax.random.key(config.train.seed)))
    lora = config.lora
    if not lora.rank:
        return with_sharding(_fitting(config, like, load(config.init_from).params))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # uncompressed it may not fit a device
        dtype = lora.base if lora.base == "bfloat16" else "float32"
        params = _fitting(config, like, load(config.init_from, expand=False, dtype=dtype).params)
        params = freeze_base(lora.base, params, jax.default_backend())
        return with_sharding(add_adapters(lora, params, jax.random.key(config.train.seed)))


def _fitting(config: Experiment, like: Params, params: Params) -> Params:
    wanted, found = ({path: leaf.shape for path, leaf in flatten(tree).items()} for tree in (like, params))
    for path in sorted({**wanted, **found}):
        if wanted.get(path) != found.get(path):
            raise UserError(
                f"init_from {config.init_from}: {path} is {found.get(path, 'absent')}, the model wants "
                f"{wanted.get(path, 'none')}; use the model configuration that it was trained with"
            )
    return params
