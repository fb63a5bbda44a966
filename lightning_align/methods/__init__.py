"""One LightningModule per method: which data, which reward, which loss."""
