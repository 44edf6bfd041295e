"""Networks: the UNet that predicts noise and the classifier whose features measure it."""
