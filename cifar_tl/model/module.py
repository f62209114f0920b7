"""The LightningModule: a ResNet-50 backbone and a dense head that classify 32x32 images."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss, one_hot
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from cifar_tl.data.batch import Batch, class_indices
from cifar_tl.errors import check_choice, check_number
from cifar_tl.model.backbone import FEATURES, Backbone
from cifar_tl.model.head import dense_head, logits_of
from cifar_tl.model.optim import build_optimizer, match_parameters, parameter_groups, restore_options

CONVENTIONS = ("torch", "keras")


class ResNet50Classifier(L.LightningModule):
    """Backbone, head, loss, metrics and optimizer. Which part trains, and how fast, is BackboneUnfreeze's business.

    The backbone starts random; `weights.load_weights` or a checkpoint fills it. The defaults are for checkpoints older
    than an argument: what the model did before it had it. A run gets every value from its config.

    Args:
        classes: Class names, in the order of their indices.
        upscale: Factor by which the model enlarges images before it looks at them.
        head: Units of the head's hidden layers.
        dropout: Probability of dropping a hidden unit of the head while training.
        optimizer: `adam`, `adamw`, `sgd` or `muon`.
        momentum: For `sgd` and `muon`.
        weight_decay: For weight matrices and kernels; biases and norms have none.
        label_smoothing: Share of the target spread over all classes, in the training loss only.
        distill_weight: Weight of `distillation_loss`, for batches that bring a teacher's features.
        conventions: One of CONVENTIONS, whose defaults the layers, Adam and AdamW have (not AdamW beside Muon).
    """

    def __init__(
        self,
        classes: Sequence[str],
        upscale: int = 1,
        head: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        optimizer: str = "adamw",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        distill_weight: float = 0.0,
        conventions: str = "torch",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run logs its whole config
        self.provenance: dict[str, Any] = {}
        """Plain values that say where the weights come from; they travel in checkpoints under `cifar_tl`."""
        self.classes = list(classes)
        self.optimizer = optimizer
        self.momentum = momentum
        self.weight_decay = check_number("finetune.weight_decay", weight_decay, 0)
        self.label_smoothing = check_number("finetune.label_smoothing", label_smoothing, 0, below=1)
        self.distill_weight = check_number("finetune.distill_weight", distill_weight, 0)
        self.map_to_teacher: Tensor | None = None
        """From features to the teacher's, (2049, 2048), the last row being the bias; FeatureDistillation fits it."""
        self.backbone = Backbone(upscale)
        self.head = dense_head(FEATURES, head, len(self.classes), dropout)
        self.adam_eps = 1e-8
        if check_choice("model.conventions", conventions, CONVENTIONS) == "keras":
            self._follow_keras()
        self.val_metrics = self._metrics("val/")
        self.test_metrics = self._metrics("test/")
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))  # no waiting, no gaps

    def _follow_keras(self) -> None:
        """Set what Keras 3 has by default, and its ResNet50: BatchNorm's momentum and eps, Adam's eps, the head."""
        self.adam_eps = 1e-7
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.eps = 0.01, 1.001e-5
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _metrics(self, prefix: str) -> MetricCollection:
        n = len(self.classes)
        # without validation of arguments, for which every step would wait for the GPU
        return MetricCollection(
            {
                "acc": MulticlassAccuracy(n, average="micro", validate_args=False),
                "ece": MulticlassCalibrationError(n, n_bins=15, validate_args=False),
                "precision": MulticlassPrecision(n, average="none", validate_args=False),
                "recall": MulticlassRecall(n, average="none", validate_args=False),
                "f1": MulticlassF1Score(n, average="none", validate_args=False),
                "confusion": MulticlassConfusionMatrix(n, validate_args=False),
            },
            prefix=prefix,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: (batch, 3, height, width), float, ImageNet-normalized; or what the backbone makes of them,
                (batch, 2048).

        Returns:
            Logits, (batch, classes), before the softmax.
        """
        return logits_of(self.head, images if images.ndim == 2 else self.backbone(images))

    def on_train_start(self) -> None:
        """Fit the optimizer's state, if it came from a checkpoint, to this device and to this config."""
        for optimizer in self.trainer.optimizers:
            match_parameters(optimizer)
            fresh: object = self.configure_optimizers()
            if isinstance(fresh, Optimizer):  # a subclass may return whatever Lightning takes
                restore_options(optimizer, fresh)
        self.on_train_epoch_start()  # in mid-epoch no epoch starts

    def on_train_epoch_start(self) -> None:
        """Start the sums of the epoch's training metrics."""
        self._train_sums = torch.zeros(3, device=self.device)
        self._train_images = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, a scalar; `train/loss` is without what distillation adds to it."""
        images, targets, *teacher = batch
        features = self.backbone(images) if teacher else None
        logits = self(images) if features is None else logits_of(self.head, features)
        loss = self.training_loss(logits, targets)
        added = torch.zeros_like(loss)
        if features is not None:
            added = self.distill_weight * self.distillation_loss(features, *teacher)
        # on cached features a step is so short that metric objects, and log() in every step, would double it
        correct = (logits.detach().argmax(dim=1) == class_indices(targets)).sum()
        label_loss, distillation = (value.detach().float() * len(images) for value in (loss, added))
        self._train_sums += torch.stack([label_loss, correct, distillation])
        self._train_images += len(images)
        if self.trainer._logger_connector.should_update_logs:
            self.log("train/loss_step", loss, prog_bar=True)
        if self.trainer.is_last_batch:
            names = ("train/loss", "train/acc", "train/distillation")
            means = dict(zip(names, self._train_sums / self._train_images, strict=True))
            if not teacher:
                del means["train/distillation"]
            self.log_dict(means, on_step=False, on_epoch=True, batch_size=self._train_images, sync_dist=True)
        return loss + added

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar; for a subclass to replace. Validation measures cross-entropy.

        Args:
            logits: (batch, classes).
            targets: Class indices, (batch,), or shares of the classes, (batch, classes), from mixup and CutMix.
        """
        return cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def distillation_loss(self, features: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean square of how far mapped features are from a teacher's, a scalar.

        Args:
            features: (batch, 2048).
            teacher: Of the same images, (batch, 2048).
        """
        assert self.map_to_teacher is not None
        mapped = linear(features, self.map_to_teacher[:-1].T, self.map_to_teacher[-1])
        return mse_loss(mapped.float(), teacher.float())

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the validation metrics; return its logits, (batch, classes), float32."""
        return self._evaluate(batch, self.val_loss, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the test metrics; return its logits, (batch, classes), float32."""
        return self._evaluate(batch, self.test_loss, self.test_metrics)

    def _evaluate(self, batch: Batch, loss: MeanMetric, metrics: MetricCollection) -> Tensor:
        images, targets = batch
        logits: Tensor = self(images).float()
        # per image: with nan_strategy="disable", MeanMetric drops weights (torchmetrics 1.9, its issue 3434)
        loss.update(cross_entropy(logits, targets, reduction="none"))
        indices, classes = class_indices(targets), logits.shape[1]
        # argmax makes class 0 of logits that are no numbers, as often right as that class is frequent
        wrong = one_hot((indices + 1) % classes, classes).to(logits)
        finite = logits.isfinite().all(dim=1, keepdim=True)
        metrics.update(torch.where(finite, logits.softmax(dim=1), wrong), indices)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics(self.val_loss, self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.test_details = self._log_metrics(self.test_loss, self.test_metrics)

    def _log_metrics(self, loss: MeanMetric, metrics: MetricCollection) -> dict[str, list[float] | list[list[int]]]:
        """Log scalars and per-class scalars; return what has no scalar form, as plain lists, and start over."""
        # a mean by log() is too large where processes have unequal numbers of images, which Lightning averages as int
        values = {f"{metrics.prefix}loss": loss.compute(), **metrics.compute()}
        metrics.reset()
        loss.reset()
        details: dict[str, list[float] | list[list[int]]] = {}
        for name, value in values.items():
            if value.ndim == 0:
                self.log(name, value, sync_dist=True)  # every process has the value of all
                continue
            details[name] = value.tolist()
            if value.ndim == 1:
                self.log_dict({f"{name}/{c}": v for c, v in zip(self.classes, value, strict=True)}, sync_dist=True)
        return details

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return probabilities, (batch, classes), for normalized images."""
        return self(batch[0]).float().softmax(dim=1)  # type: ignore[no-any-return]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint, a weights-only one too, sufficient by itself."""
        if self.provenance:  # else a Trainer used by hand writes it, of whose data nothing is known
            checkpoint["cifar_tl"] = self.provenance
        checkpoint["hyper_parameters"]["upscale"] = self.backbone.upscale  # of this epoch, where images grow

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over where the weights come from, unless it is known better, as for a run that goes on."""
        self.provenance = self.provenance or checkpoint.get("cifar_tl", {})

    def configure_optimizers(self) -> Optimizer:
        """Return one optimizer over all groups; it exists with both parts from step 0."""
        groups = parameter_groups(self.head, self.backbone, self.weight_decay)
        return build_optimizer(self.optimizer, groups, self.momentum, self.adam_eps)
