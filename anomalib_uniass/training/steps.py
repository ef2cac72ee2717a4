# SPDX-License-Identifier: Apache-2.0
"""What the reconstruction models of this package share as anomalib models."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, Literal, cast, get_args

import pandas as pd
import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import AnomalibMetric, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_uniass.acceleration.constants import Folded
from anomalib_uniass.arguments import check_choice, check_flag, check_number, check_seed, check_text, check_whole
from anomalib_uniass.categories import row_categories
from anomalib_uniass.data.defect_sizes import check_sizes, say_what_gets_lost
from anomalib_uniass.deploy.export import ExportMixin
from anomalib_uniass.deploy.pre_processor import AntialiasedPreProcessor
from anomalib_uniass.distribution import keep_constants_local
from anomalib_uniass.layers.seeding import random_states, seeded, set_random_states
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.prediction import PredictionMixin
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from anomalib_uniass.training.callback_checks import check_callbacks
from anomalib_uniass.training.checkpoint_size import say_large_checkpoints
from anomalib_uniass.training.divergence import LossWatch, check_finite, diverged
from anomalib_uniass.training.from_checkpoint import FromCheckpointMixin, differences
from anomalib_uniass.training.last_weights import CompleteRunMixin
from anomalib_uniass.training.progress import ProgressLines
from anomalib_uniass.training.tiled import TiledMixin

logger = logging.getLogger(__name__)

GRADIENT_CLIP = 0.1

TILES_OF_IMAGE = 8
"""Tiles of a training image that statistics are taken of."""

SCORED_IMAGES = 60
"""Training images of a category whose scores tell how those of good images spread, at most."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""What the trainer may compute in: anomalib's batches hold float32 images, whatever the weights are."""

LRSchedule = Literal["step", "onecycle"]


class ReconstructionMixin(FromCheckpointMixin, CompleteRunMixin, PredictionMixin, TiledMixin, ExportMixin):
    """Training, checkpoints and export of a frozen backbone with a trainable reconstruction network.

    Expects of the class it is mixed into: ``self.model``, a :class:`~anomalib_uniass.layers.tiling.TiledModel` with
    ``backbone``, ``reconstruct`` and ``detect``; ``self.loss`` of what ``reconstruct`` returns;
    and the constructor arguments ``learning_rate``, ``weight_decay``, ``lr_schedule``, ``lr_step_epochs``,
    ``max_epochs``, ``pre_trained``, ``weights``, ``tile_size`` and ``stride``.

    A run that goes on from a checkpoint of the end of an epoch draws the random numbers that it would have drawn, on
    one device, so that it ends as if it had never stopped. From a checkpoint within an epoch (``val_check_interval``,
    ``every_n_train_steps``) it does not: Lightning keeps the number of batches that were seen, not their order.
    """

    model: Any
    built = ("model", "loss")
    optimization = ("lr_schedule", "lr_step_epochs", "learning_rate", "weight_decay")
    """Constructor arguments that a run which goes on takes from the checkpoint, in its optimizer and its schedule."""
    _resumed: dict[str, Any] | None = None
    """What a training goes on from: None outside of a training, empty in one that starts anew."""

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> AntialiasedPreProcessor:
        """Return resize and normalisation.

        Args:
            image_size: Height and width to resize to, 224 x 224 by default.
            mean: Normalisation mean, RGB in [0, 1]; ImageNet's by default.
            std: Normalisation standard deviation, likewise.
        """
        resize = Resize(image_size or (224, 224), antialias=True)
        return AntialiasedPreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    def configure_callbacks(self) -> Sequence[Callback]:
        """Put the per-category metrics before anomalib's callbacks: they need maps that are not normalised yet."""
        return [CategoryMetricsCallback(), ProgressLines(), *super().configure_callbacks()]

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return anomalib's metrics, which leave out images without a decision: there may be no thresholds."""
        evaluator = AnomalibModule.configure_evaluator()
        for metric in evaluator.test_metrics:
            cast("AnomalibMetric", metric).strict = False
        return evaluator

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the chosen schedule.

        Raises:
            ValueError: If ``onecycle`` has no length, or a checkpoint to go on from was made for another optimization.
        """
        self._go_on_with_random_numbers()  # before the first batch is drawn
        self._check_optimization_of_checkpoint()
        optimizer = torch.optim.AdamW(
            self._trainable(), lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"]
        )
        if self.hparams["lr_schedule"] == "step":
            step = StepLR(optimizer, step_size=self.hparams["lr_step_epochs"], gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": "epoch"}}
        one_cycle = OneCycleLR(
            optimizer, max_lr=self.hparams["learning_rate"], total_steps=self._one_cycle_steps(), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _check_optimization_of_checkpoint(self) -> None:
        """Refuse what the checkpoint's optimizer would override without a word."""
        if not self._resumed:
            return
        if changed := differences(self._resumed["hyper_parameters"], self.hparams, self.optimization):
            msg = (
                f"A run that goes on takes optimizer and schedule from its checkpoint ({'; '.join(changed)}). Set "
                f"the same. {self._advice_to_start_anew()}"
            )
            raise ValueError(msg)

    def _one_cycle_steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
        if not math.isfinite(steps):
            msg = f"lr_schedule='onecycle' needs the length of the run, got max_epochs={epochs}. Set it."
            raise ValueError(msg)
        saved = self._resumed["total_steps"] if self._resumed else steps
        if saved != steps:
            msg = (
                f"The onecycle schedule of the checkpoint has {saved} steps, this run wants {int(steps)} "
                f"({epochs} epochs of {self.trainer.num_training_batches} batches). Set max_epochs, "
                f"max_steps, batch size and data as at first. {self._advice_to_start_anew()}"
            )
            raise ValueError(msg)
        return int(steps)

    def _advice_to_start_anew(self) -> str:
        name = type(self).__name__
        return (
            "To train longer or otherwise start a new training from the weights: "
            f"Engine.fit({name}.load_from_checkpoint(PATH, lr_schedule=...)) without a ckpt_path."
        )

    def setup(self, stage: str) -> None:
        """Refuse precisions that have weights of another type than the images; spare a distributed run the constants.

        Raises:
            ValueError: If the trainer's precision is not one of `PRECISIONS`, or it has a callback that cannot work.
        """
        super().setup(stage)
        self.follow_tiler()
        if (precision := str(self.trainer.precision)) not in PRECISIONS:
            msg = (
                f"{type(self).__name__} takes the trainer's precision {', '.join(PRECISIONS)}, got {precision}: its "
                "images are float32, so the weights must be. Mixed precision has the speed of the half one: "
                "--trainer.precision bf16-mixed (precision of Engine)."
            )
            raise ValueError(msg)
        if stage == "fit":
            check_callbacks(
                self.trainer.callbacks,  # type: ignore[attr-defined]
                accelerated=any(isinstance(module, Folded) for module in self.model.modules()),
                has_statistics=self.has_statistics(),
            )
        self._resumed = {} if stage == "fit" else None  # not what an earlier training went on from
        self._losses = LossWatch()
        self._keep_constants_local()

    def _keep_constants_local(self) -> None:
        """Spare a distributed run the constants of the network."""
        if self._trainer is not None and self._trainer.world_size > 1:
            keep_constants_local(self, frozen=self.frozen_parts())

    def on_fit_start(self) -> None:
        """Ask whether tiles fit into the images, and say what gets lost."""
        super().on_fit_start()
        frames = self._check_sizes()
        if self.trainer.is_global_zero:
            say_large_checkpoints(self.model)
        if self.trainer.is_global_zero and frames:
            say_what_gets_lost(frames[-1], self.model.image_size, tile_size=self.hparams["tile_size"])

    def on_test_start(self) -> None:
        """Ask whether tiles fit into the images."""
        super().on_test_start()
        self._check_sizes()

    def _check_sizes(self) -> list[pd.DataFrame]:
        """Refuse images that are smaller than a tile, once a checkpoint has told the tiles; return all samples.

        Raises:
            ValueError: If there are some.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        subsets = [getattr(datamodule, name, None) for name in ("train_data", "val_data", "test_data")]
        frames = [subset.samples for subset in subsets if subset is not None and hasattr(subset, "samples")]
        if self.model.tiling is not None:
            check_sizes(frames, self.model.tiling.check)
        return frames

    def frozen_parts(self) -> list[nn.Module]:
        """Return the parts of the network that do not change from step to step."""
        return [self.model.backbone, self.model.anomaly_map]

    def on_train_epoch_start(self) -> None:
        """Go on with the random numbers where the next epoch draws its order anew."""
        if not self.trainer.fit_loop.is_resuming:
            self._go_on_with_random_numbers()

    def on_validation_start(self) -> None:
        """Validate, and take statistics of, finite weights alone in a training; else ask whether tiles fit.

        Raises:
            FloatingPointError: If the losses or the weights of a training are not finite.
        """
        self._check_divergence()
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._check_sizes()

    def on_train_epoch_end(self) -> None:
        """End an epoch of finite weights alone.

        Raises:
            FloatingPointError: If the losses or the weights are not finite.
        """
        self._check_divergence()
        super().on_train_epoch_end()

    def _check_divergence(self) -> None:
        if self.is_under_way:
            self._losses.check(self.trainer)
            check_finite(self._trainable(), self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget the random numbers: this training draws its own from here on."""
        del batch, batch_idx
        if self._resumed:
            self._resumed["random_states"] = None

    def _go_on_with_random_numbers(self) -> None:
        """Set the generators as they were when the checkpoint was saved.

        After a checkpoint of the end of an epoch Lightning takes the iterator over the data that is made first; after
        one of a validation, which is in the epoch, it ends that epoch and makes another. Both must draw the same.
        """
        states = self._resumed.get("random_states") if self._resumed else None
        if states and self.trainer.world_size == 1:  # the checkpoint has the states of one process
            set_random_states(states, self.device)

    def training_batches(self, count: int) -> Iterator[Tensor]:
        """Yield up to `count` batches of the training set, in the trainer's order: model inputs ``(B, 3, H, W)``."""
        return self._inputs(islice(self._training_loader(), count))

    def training_images(self) -> Iterator[Tensor]:
        """Yield every training image, in order, each process its share: model inputs ``(B, 3, H, W)``.

        Each once as a whole, or `TILES_OF_IMAGE` times a tile at random.
        """
        loader = self.indexed_training_loader()
        share = range(self.trainer.global_rank, len(cast("Sized", loader.dataset)), self.trainer.world_size)
        passes = 1 if self.model.tiling is None else TILES_OF_IMAGE
        return self._numbered(loader, [*share] * passes, loader.batch_size or 1)  # none where it has a batch sampler

    def random_training_images(self, batches: int, *, size: int) -> Iterator[Tensor]:
        """Yield batches of random training images: model inputs ``(size, 3, H, W)``."""
        loader = self.indexed_training_loader()
        sampler = RandomSampler(cast("Sized", loader.dataset), replacement=True, num_samples=batches * size)
        return self._numbered(loader, sampler, size)

    @torch.no_grad()
    def score_training_images(self) -> None:
        """Give scores and maps of training images to thresholds per category, up to `SCORED_IMAGES` of each.

        Images as they are trained on: with augmentation, but whole. None where they have no numbers or no categories.
        """
        post_processor, loader = self.post_processor, self._training_loader()
        samples = getattr(getattr(loader, "dataset", None), "samples", None)
        if not isinstance(post_processor, CategoryThresholdPostProcessor) or samples is None:
            return
        numbers = [
            number
            for rows in samples.groupby(row_categories(samples)).indices.values()
            for number in rows[:: max(1, len(rows) // SCORED_IMAGES)][:SCORED_IMAGES].tolist()
        ]
        share = numbers[self.trainer.global_rank :: self.trainer.world_size]
        size = 1 if self.model.tiling else loader.batch_size or 1  # photographs may be of any size
        training = self.model.training
        self.model.eval()
        with seeded(0):
            for batch in self._numbered_batches(loader, share, size):
                image = cast("Tensor", batch.image).to(self.device)
                post_processor.learn(batch.update(**self.model(self._prepared(image))._asdict()))
        self.model.train(training)
        post_processor.end_learning()

    def _numbered(self, loader: DataLoader[Any], numbers: Iterable[int], size: int) -> Iterator[Tensor]:
        """Yield the images with these numbers in batches of a size."""
        return self._inputs(self._numbered_batches(loader, numbers, size))

    def _numbered_batches(self, loader: DataLoader[Any], numbers: Iterable[int], size: int) -> Iterable[ImageBatch]:
        return DataLoader(
            loader.dataset, size, sampler=numbers, num_workers=loader.num_workers, collate_fn=loader.collate_fn
        )

    def indexed_training_loader(self) -> DataLoader[Any]:
        """Return a loader whose dataset has its images by number.

        Raises:
            TypeError: If the training set comes otherwise.
        """
        loader = self._training_loader()
        source = loader.dataset if isinstance(loader, DataLoader) else loader
        if source is loader or isinstance(source, IterableDataset) or not isinstance(source, Sized):
            msg = (
                "What this model takes of every training image needs one torch DataLoader of a dataset with a length, "
                f"got {type(source).__name__}. Give it that, or better a datamodule: Unified of this package."
            )
            raise TypeError(msg)
        return loader

    def _training_loader(self) -> Any:
        """Return a new loader of the training set, or the user's own."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return self.trainer.fit_loop._data_source.instance if datamodule is None else datamodule.train_dataloader()

    def _inputs(self, batches: Iterable[ImageBatch]) -> Iterator[Tensor]:
        """Yield the images of batches as the model takes them."""
        for batch in batches:
            yield self.model.tiles_to_learn(self._prepared(cast("Tensor", batch.image).to(self.device)))

    def _prepared(self, image: Tensor) -> Tensor:
        """Return images as the model takes them."""
        if isinstance(self.pre_processor, PreProcessor) and self.pre_processor.transform is not None:
            image = self.pre_processor.transform(image)
        return image

    def complete_pre_processor(self, choice: PreProcessor | bool, image_size: tuple[int, int]) -> None:
        """Make the default pre-processor with the backbone's statistics; refuse one that resizes to something else.

        Args:
            choice: The constructor's argument.
            image_size: Height and width the model works at.

        Raises:
            TypeError: If `choice` is something else.
            ValueError: If the pre-processor makes images of another size, or resizes at all where there are tiles.
        """
        if not isinstance(choice, bool | PreProcessor):
            msg = f"pre_processor must be a PreProcessor, true or false, got {choice!r}."
            raise TypeError(msg)
        if choice is True:
            pyramid = self.model.backbone
            self.pre_processor = self.configure_pre_processor(image_size, mean=pyramid.mean, std=pyramid.std)
            if self.model.tiling is not None:
                self.pre_processor.resize_to(None)
        if self.model.tiling is not None and self.input_size is not None:
            msg = f"Tiles are cut from images as they are, but the pre-processor resizes to {tuple(self.input_size)}."
            raise ValueError(msg)
        if self.pre_processor is not None and self.input_size not in (None, image_size):
            msg = f"The pre-processor makes images of size {tuple(self.input_size)}, but image_size is {image_size}."
            raise ValueError(msg)

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Reconstruct a batch of good images ``(B, 3, H, W)`` and return the loss.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        del args, kwargs  # the trainer's batch index is not needed
        image = self.model.tiles_to_learn(cast("Tensor", batch.image))
        loss = self.loss(*self.model.reconstruct(image))
        if self.is_under_way:  # a search for a learning rate knows how to go too far
            self._losses.look(loss, self.trainer)
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image))
        return {"loss": loss}

    def on_validation_epoch_start(self) -> None:
        """Start a sum of the validation loss."""
        self._validation_loss = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Add anomaly map and score to a batch, for the thresholds; measure the loss on its good images."""
        del args, kwargs
        image = cast("Tensor", batch.image)
        reconstruction = self.model.reconstruct(self.model.tiles_to_validate(image))
        label = torch.zeros(len(image)) if batch.gt_label is None else batch.gt_label
        good = (~label.bool()).nonzero().flatten().to(self.device)
        if len(good):
            loss = float(self.loss(*reconstruction.of(good)))
            self._validation_loss += torch.tensor([loss * len(good), len(good)], dtype=torch.float64)
        found = self.model.detect(reconstruction, image) if self.model.tiling is None else self.model(image)
        return batch.update(**found._asdict())

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss of the good validation images, if there are any, for callbacks to watch.

        Raises:
            FloatingPointError: If it is not finite in a training.
        """
        total, count = self.trainer.strategy.reduce(self._validation_loss.to(self.device), reduce_op="sum").tolist()
        if count and not math.isfinite(total) and self.is_under_way:
            raise FloatingPointError(diverged(f"The validation loss is {total}", self.trainer))
        if count:
            self.log("val_loss", total / count, prog_bar=True, sync_dist=True)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that win over the trainer's: gradient clipping, and `max_epochs` if it was given."""
        arguments: dict[str, Any] = {"gradient_clip_val": GRADIENT_CLIP, "num_sanity_val_steps": 0}
        if self.hparams["max_epochs"] is not None:
            arguments["max_epochs"] = self.hparams["max_epochs"]
        return arguments

    @property
    def learning_type(self) -> LearningType:
        """One-class: good images only."""
        return LearningType.ONE_CLASS

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take architecture and weights from a checkpoint, and what a training goes on from.

        Raises:
            ValueError: If an argument of the architecture was set to something else; the message lists them.
        """
        super().on_load_checkpoint(checkpoint)
        self._keep_constants_local()
        if self._resumed is not None:
            (schedule,) = checkpoint.get("lr_schedulers") or [{}]
            self._resumed = {
                "hyper_parameters": checkpoint["hyper_parameters"],
                "total_steps": schedule.get("total_steps"),
                "random_states": checkpoint.get("random_states"),
            }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the random generators, to go on as if the run had not stopped.

        Raises:
            FloatingPointError: If weights are not finite: they are not to replace good ones.
        """
        if self.is_under_way:
            check_finite(self._trainable(), self.trainer)
        super().on_save_checkpoint(checkpoint)
        checkpoint["random_states"] = random_states(self.device)


def check_arguments(
    *,
    backbone: object,
    pre_trained: object,
    feedforward_dim: object,
    jitter_scale: object,
    jitter_probability: object,
    learning_rate: object,
    weight_decay: object,
    lr_schedule: object,
    lr_step_epochs: object,
    max_epochs: object,
    seed: object,
) -> None:
    """Refuse arguments of both models that are out of range, before anything is built.

    Raises:
        ValueError: If one of them is; the message names it and says what was expected.
    """
    check_text("backbone", backbone)
    check_flag("pre_trained", pre_trained)
    check_whole("feedforward_dim", feedforward_dim, at_least=1)
    check_number("jitter_scale", jitter_scale, at_least=0)
    check_number("jitter_probability", jitter_probability, at_least=0, at_most=1)
    check_number("learning_rate", learning_rate, above=0)
    check_number("weight_decay", weight_decay, at_least=0)
    check_choice("lr_schedule", lr_schedule, get_args(LRSchedule))
    check_whole("lr_step_epochs", lr_step_epochs, at_least=1)
    if max_epochs is not None:
        check_whole("max_epochs", max_epochs, at_least=1)
    if seed is not None:
        check_seed(seed)
