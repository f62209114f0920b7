"""Transfer learning from ImageNet to CIFAR-10 at 32x32.

One way through the code: `conf` says what a run is; `train` reads it; `build` makes the parts; `data` turns CIFAR-10
into batches; `model` holds the ResNet-50 backbone, the dense head and the LightningModule; `callbacks` freeze and
unfreeze the backbone, prove that it happened and record the run in its folder under `outputs`, whose format is that of
`runs`; `reports` draws from these files. `evaluate`, `predict` and `export` start from a checkpoint, which
`checkpoints` loads. README.md beside this file has the layers.
"""

__version__ = "0.1.0"
