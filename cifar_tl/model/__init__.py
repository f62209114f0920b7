"""The backbone, the head, the optimizer groups and the LightningModule."""
