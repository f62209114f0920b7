"""Transfer learning from ImageNet to CIFAR-10 at 32x32.

One way through the code: `conf` says what a run is; `train` reads it; `data` turns CIFAR-10 into batches; `model` holds
the ResNet-50 backbone, the dense head and the LightningModule; `callbacks` freeze and unfreeze the backbone, prove that
it happened and record the run; everything a run leaves behind is a file in its folder under `outputs`, which `reports`
reads. `evaluate`, `predict` and `export` start from its checkpoint, which `trained` rebuilds.
"""

__version__ = "0.1.0"
