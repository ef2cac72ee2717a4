# SPDX-License-Identifier: Apache-2.0
"""A model becomes what a checkpoint holds: the checkpoint knows the architecture."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from anomalib_uniass.arguments import parse_image_size
from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.layers.tiling import make_tiling
from anomalib_uniass.logs import warn
from anomalib_uniass.training.checkpoint_io import WholeCheckpointIO

OF_THE_RUN = ("pre_trained", "weights", "max_epochs")
"""Constructor arguments that a run keeps as they are: a checkpoint brings weights, and a trainer knows its epochs."""

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only


class FromCheckpointMixin(Base):
    """A model that takes its architecture from the checkpoint it loads, so that the checkpoint is all it takes.

    Commands and ``Engine`` load a checkpoint into a model that exists already. Constructor arguments at their defaults
    give way to the checkpoint's, the network is built anew if they differ, and a line says so. An argument of the
    architecture that was set to something else than the checkpoint's is refused. Nothing is downloaded: the backbone
    fetches its weights when they are first needed (:class:`~anomalib_uniass.layers.backbone.FeaturePyramid`).
    """

    architecture: ClassVar[tuple[str, ...]]
    """Constructor arguments that a checkpoint must agree with."""
    optimization: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that a training which goes on does not take from its checkpoint."""
    built: ClassVar[tuple[str, ...]] = ("model",)
    """Attributes that the constructor makes of its arguments."""

    def fetch_weights(self) -> None:
        """Fetch the backbone's weights, if they are needed and not here yet.

        Raises:
            RuntimeError: If they cannot be fetched.
        """
        for module in self.modules():
            if isinstance(module, FeaturePyramid):
                module.fetch_weights()

    def on_fit_start(self) -> None:
        """Fetch the backbone's weights before anything is made of them."""
        super().on_fit_start()
        self.fetch_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep plain types alone, which is what a checkpoint may hold to be loaded safely."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {name: _plain(value) for name, value in checkpoint["hyper_parameters"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the architecture from a checkpoint.

        Raises:
            ValueError: If an argument of the architecture was set to something else, or the checkpoint is another
                model's; the message says what differs.
        """
        names = _constructor(type(self))
        own = normal_forms({name: value for name, value in self.hparams.items() if name in names})
        saved = {name: value for name, value in normal_forms(checkpoint["hyper_parameters"]).items() if name in own}
        default = normal_forms({name: names[name].default for name in own})
        given = [name for name in own if own[name] != default[name]]
        if refused := differences(saved, own, (name for name in self.architecture if name in given)):
            msg = (
                f"{self._checkpoint()} was trained with another configuration ({'; '.join(refused)}). Set the same, or "
                "leave these arguments out: the checkpoint knows them."
            )
            raise ValueError(msg)
        trainer = self._trainer
        is_fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        kept = {*given, *OF_THE_RUN, *(self.optimization if is_fitting else ())}
        taken = {name: value for name, value in saved.items() if name not in kept and value != own[name]}
        if taken:
            if is_fitting:
                self._check_that_nothing_holds_the_network(taken)
            self._build_anew(own | taken)
            said = ", ".join(f"{name} {value}" for name, value in taken.items())
            rank_zero_info(f"{type(self).__name__} is built as the checkpoint has it: {said}.")
        if example := _another_models(checkpoint["state_dict"], self.model):
            msg = f"{self._checkpoint()} is no {type(self).__name__}: {example}. Name the model that was trained."
            raise ValueError(msg)
        self._leave_out_the_pre_processor(checkpoint)
        super().on_load_checkpoint(checkpoint)
        if (datamodule := getattr(trainer, "datamodule", None)) is not None:
            datamodule._update_augmentations()  # was set up before, for the pre-processor of another size

    def _checkpoint(self) -> str:
        """Name the checkpoint that is being loaded, as far as it is known."""
        path = None if self._trainer is None else self._trainer.ckpt_path
        return "The checkpoint" if path is None else f"The checkpoint {path}"

    def _build_anew(self, arguments: dict[str, Any]) -> None:
        """Replace what was built by what other arguments make."""
        fresh = _build(type(self), arguments)
        for name in self.built:
            setattr(self, name, getattr(fresh, name))
        self.model.to(self.device).train(self.training)
        self.save_hyperparameters(arguments)

    def _check_that_nothing_holds_the_network(self, taken: Mapping[str, Any]) -> None:
        """Refuse to replace a network that others hold already.

        Raises:
            ValueError: If an optimizer of the command line does, or Lightning's ``WeightAveraging``.
        """
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        holders = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
        holders += ["--optimizer"] if "configure_optimizers" in vars(self) else []
        if holders:
            named = ", ".join(f"{name}: {value}" for name, value in taken.items())
            msg = (
                f"{self._checkpoint()} was trained with another configuration, and {' and '.join(holders)} has taken "
                f"the parameters of this one before the checkpoint was read. Set the checkpoint's arguments ({named})."
            )
            raise ValueError(msg)

    def _leave_out_the_pre_processor(self, checkpoint: Mapping[str, Any]) -> None:
        """Let a pre-processor do nothing where the checkpoint's model has none: the trainer calls it in any case."""
        enabled = checkpoint.get("anomalib_components_enabled") or {}
        if not enabled.get("pre_processor", True) and isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.transform = self.pre_processor.export_transform = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> AnomalibModule:
        """Load a model from a checkpoint; the checkpoint holds the backbone, so nothing is downloaded.

        Arguments as for :meth:`anomalib.models.AnomalibModule.load_from_checkpoint`. A `tile_size` other than the
        checkpoint's is taken with a warning, since the weights fit.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is broken, no checkpoint or another model's, or an argument of the architecture
                differs from the checkpoint's; the message names the file.
        """
        reader = WholeCheckpointIO(cls.checkpoint_safe_globals())
        saved = reader.load_checkpoint(checkpoint_path, "meta", weights_only)["hyper_parameters"]
        if hparams_file is None:
            cls._check_given(saved, kwargs, checkpoint_path)
        kwargs.setdefault("pre_trained", False)
        kwargs.setdefault("weights", None)
        try:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )
        except ValueError as error:
            msg = f"{checkpoint_path}: {error}"
            raise ValueError(msg) from error

    @classmethod
    def _check_given(cls, saved: Mapping[str, Any], given: dict[str, Any], path: str | Path) -> None:
        """Refuse arguments of the architecture that differ from the checkpoint's; say which tiles differ."""
        known = normal_forms(saved)
        if "tile_size" in given and "stride" not in given:  # the checkpoint's is for its own tiles
            same = normal_forms(given)["tile_size"] == known.get("tile_size")
            given["stride"] = known.get("stride") if same else None
        asked = normal_forms({**saved, **given})
        names = [name for name in cls.architecture if name in given]
        if refused := differences(known, asked, (name for name in names if name != "tile_size")):
            msg = (
                f"{path} was trained with another configuration ({'; '.join(refused)}). Leave these arguments out: the "
                "checkpoint knows them."
            )
            raise ValueError(msg)
        if tiles := differences(known, asked, (name for name in names if name == "tile_size")):
            warn(
                f"{path} was trained on other tiles ({tiles[0]}). The weights fit, but statistics and thresholds "
                "are of those. Train or calibrate anew, or leave tile_size out."
            )


def normal_forms(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return constructor arguments in the one form that the constructors give to each: 64 as a tile is (64, 64).

    Args:
        arguments: Some arguments of a model, as a user, a YAML file or a checkpoint has them.

    Raises:
        ValueError: If an image size or tile is none.
    """
    normal = {name: _plain(value) for name, value in arguments.items()}
    if "image_size" in normal:
        normal["image_size"] = parse_image_size(normal["image_size"])
    if "tile_size" in normal:
        tiling = make_tiling(normal["tile_size"], normal.get("stride"))
        normal["tile_size"] = None if tiling is None else tiling.tile_size
        if "stride" in normal:
            normal["stride"] = None if tiling is None else tiling.stride
    return normal


def differences(saved: Mapping[str, Any], own: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return which arguments of a checkpoint differ from the model's, with both values.

    Args:
        saved: Arguments of the checkpoint, in normal forms.
        own: Those of the model, likewise.
        names: Names of the arguments to compare; those that the checkpoint lacks are left out.
    """
    return [
        f"{name}: checkpoint {saved[name]}, model {own[name]}"
        for name in names
        if name in saved and saved[name] != own[name]
    ]


def _plain(value: Any) -> Any:
    """Return a value of a plain type: a checkpoint holds no other, and YAML gives a list where we make a tuple."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(map(_plain, value))
    return value


def _constructor(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls).parameters


def _build(cls: type[FromCheckpointMixin], arguments: Mapping[str, Any]) -> FromCheckpointMixin:
    """Build a model with random weights and without the parts that the trainer calls, whose models keep their own."""
    without = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
    arguments = {**arguments, **without, "pre_trained": False, "weights": None}
    with seeded(0):  # these weights will be replaced
        return cls(**{name: value for name, value in arguments.items() if name in _constructor(cls)})


def _another_models(saved: Mapping[str, Any], model: nn.Module) -> str | None:
    """Return examples of what tells that weights are another model's, which has few of the names behind the backbone.

    A few other names are a matter of versions, which the modules translate as they load.
    """
    needed = {f"model.{name}" for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    missing = sorted(needed - saved.keys())
    if 2 * len(missing) <= len(needed):
        return None
    unknown = sorted(name for name in saved if name.startswith("model.") and name not in needed)
    return f"it has {', '.join(unknown[-3:])} and lacks {', '.join(missing[:3])}"
